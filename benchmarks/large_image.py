"""A large image with many small things, in tiles: seconds, memory, and how many of the things are found.

    python benchmarks/large_image.py --model models/ita-tiny
    python benchmarks/large_image.py --model models/ita-tiny --task instance --sizes 4000x3000

The image is drawn: textures of Scenes with a pictogram of about 40 pixels in every 100 x 100. A thing is found if most
of its pixels have its class. It is found twice if two segments of its class each have at least a fifth of its pixels,
or, with instances, overlap it by an IoU of at least a half. Memory is the peak above the loaded model and image, beside
the bytes of the image and its label map. Each size is measured in a process of its own. Prints a Markdown table.
"""

import argparse
import ctypes
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import CLEAR_REFS, at_least, memory
from PIL import Image
from speed import machine

from ita_segmentation.checkpoints import load_checkpoint, resolve_checkpoint
from ita_segmentation.data.scenes import scenes_vocabulary
from ita_segmentation.data.scenes.classes import select_classes
from ita_segmentation.data.scenes.glyphs import draw_thing, num_drawings
from ita_segmentation.data.scenes.photo import photograph
from ita_segmentation.data.scenes.textures import draw_stuff
from ita_segmentation.errors import ITAError
from ita_segmentation.prediction.segmenter import SegmentedImage, Segmenter
from modeling_ita.tiling import Crop, Tiling

SEED = 4_000_037
BLOCK, SPACING, SIDE = 400, 100, 40
"""Pixels: of one texture, from one thing to the next, of a thing's longer side."""
SCENE_SIDE = 192
"""Textures are as coarse as in images of this side."""
TWICE_SHARE, TWICE_IOU = 0.2, 0.5
HEADS = (
    "size",
    "tiles",
    "seconds",
    "memory, MiB",
    "x image and label map",
    "things",
    "found",
    "of those that a border cuts",
    "found twice",
    "found without tiles",
)


@dataclass(frozen=True)
class Thing:
    """A thing in the image: its class, its first row and column, and its mask (h, w) bool from there on."""

    class_id: int
    top: int
    left: int
    mask: np.ndarray

    @property
    def place(self) -> tuple[slice, slice]:
        """Its rows and columns."""
        height, width = self.mask.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


def draw(height: int, width: int) -> tuple[Image.Image, list[Thing]]:
    """Draw the image of a size, and list its things."""
    rng = np.random.default_rng([SEED, height, width])
    canvas, things = np.zeros((height, width, 3), np.uint8), []
    for top in range(0, height, BLOCK):
        for left in range(0, width, BLOCK):
            sides = min(BLOCK, height - top), min(BLOCK, width - left)
            block, own = _draw_block(rng, *sides)
            canvas[top : top + sides[0], left : left + sides[1]] = block
            things += [Thing(one.class_id, top + one.top, left + one.left, one.mask) for one in own]
    return Image.fromarray(canvas), things


def _draw_block(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, list[Thing]]:
    """Draw one texture with a thing in every whole square of SPACING pixels."""
    thing_ids, stuff_ids = select_classes("seen")
    name = scenes_vocabulary().names[int(rng.choice(stuff_ids))]
    canvas, things = draw_stuff(rng, name, (height, width), SCENE_SIDE), []
    for top in range(0, height - SPACING + 1, SPACING):
        for left in range(0, width - SPACING + 1, SPACING):
            class_id = int(rng.choice(thing_ids))
            drawing, turn = int(rng.integers(num_drawings(class_id))), 50 * rng.random() - 25
            pixels = draw_thing(class_id, drawing, SIDE, turn, rng.random() < 0.5, 1.0)
            x, y = (
                start + int(rng.integers(SPACING - side + 1))
                for start, side in ((left, pixels.width), (top, pixels.height))
            )
            canvas.paste(pixels, (x, y), pixels)
            things.append(Thing(class_id, y, x, np.asarray(pixels.getchannel("A")) > 127))
    return photograph(rng, canvas), things


def is_cut(thing: Thing, crops: Sequence[Crop]) -> bool:
    """Say whether a border of a tile goes through a thing."""
    rows, columns = thing.place
    for crop in crops:
        top, left, bottom, right = crop.region
        is_inside = (
            top <= rows.start and rows.stop <= bottom and left <= columns.start and columns.stop <= right
        )
        is_outside = (
            rows.stop <= top or bottom <= rows.start or columns.stop <= left or right <= columns.start
        )
        if not is_inside and not is_outside:
            return True
    return False


def is_found(found: SegmentedImage, thing: Thing) -> bool:
    """Say whether most of a thing's pixels have its class."""
    ids = found.label_map[thing.place][thing.mask]
    own = [segment["id"] for segment in found.segments if segment["label_id"] == thing.class_id]
    return bool(2 * np.isin(ids, own).sum() > len(ids))


def times_found(found: SegmentedImage, things: Sequence[Thing]) -> Iterator[int]:
    """Count for each thing the segments that are it."""
    if found.task != "instance":
        class_of = {segment["id"]: segment["label_id"] for segment in found.segments}
        for thing in things:
            ids, counts = np.unique(found.label_map[thing.place][thing.mask], return_counts=True)
            shares = zip(ids.tolist(), counts / np.count_nonzero(thing.mask), strict=True)
            yield sum(class_of.get(one) == thing.class_id and share >= TWICE_SHARE for one, share in shares)
        return
    instances = list(zip(found.result["segments_info"], found.result["masks"], strict=True))
    of_class: dict[int, list[Any]] = {}
    for segment, mask in instances:
        of_class.setdefault(segment["label_id"], []).append(mask)
    for thing in things:
        yield sum(_iou(thing, *mask) >= TWICE_IOU for mask in of_class.get(thing.class_id, ()))


def _iou(thing: Thing, box: tuple[int, int, int, int], mask: np.ndarray) -> float:
    rows, columns = thing.place
    top, left = max(rows.start, box[0]), max(columns.start, box[1])
    bottom, right = min(rows.stop, box[2]), min(columns.stop, box[3])
    if top >= bottom or left >= right:
        return 0.0
    own = thing.mask[top - rows.start : bottom - rows.start, left - columns.start : right - columns.start]
    both = np.count_nonzero(own & mask[top - box[0] : bottom - box[0], left - box[1] : right - box[1]])
    return both / (np.count_nonzero(thing.mask) + np.count_nonzero(mask) - both)


def measure(arguments: argparse.Namespace, size: tuple[int, int]) -> dict[str, Any]:
    """Measure one size, (height, width)."""
    torch.set_num_threads(arguments.threads)
    tiling = Tiling(arguments.tiles, arguments.tile_overlap)
    model, processor = load_checkpoint(Path(arguments.model), "cpu")
    options = {"task": arguments.task, "threshold": arguments.threshold}
    tiled = Segmenter(
        model, processor, **options, keep_overlaps=True, tiling=tiling, tiles_at_once=arguments.batch_size
    )
    image, things = draw(*size)
    segment(tiled, image.crop((0, 0, 2 * tiling.size, 2 * tiling.size)))  # what is loaded once does not count
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR_REFS.write_text("5")  # the peak starts from what is resident now
    loaded, start = memory("VmRSS"), time.perf_counter()
    found = segment(tiled, image)
    seconds, peak = time.perf_counter() - start, memory("VmHWM") - loaded
    whole = segment(Segmenter(model, processor, **options), image)
    crops = tiling.crops(size)
    are_found = np.array([is_found(found, thing) for thing in things])
    are_cut = np.array([is_cut(thing, crops) for thing in things])
    return {
        "size": f"{size[1]} x {size[0]}",
        "tiles": len(crops),
        "seconds": f"{seconds:.0f}",
        "memory, MiB": f"{peak / 2**20:.0f}",
        "x image and label map": f"{peak / (3 * size[0] * size[1] + found.label_map.nbytes):.2f}",
        "things": len(things),
        "found": f"{are_found.mean():.1%}",
        "of those that a border cuts": f"{are_found[are_cut].mean():.1%}",
        "found twice": f"{np.mean([count > 1 for count in times_found(found, things)]):.1%}",
        "found without tiles": f"{np.mean([is_found(whole, thing) for thing in things]):.1%}",
    }


def segment(segmenter: Segmenter, image: Image.Image) -> SegmentedImage:
    """Segment one image. Raises ITAError where it cannot be done."""
    [found] = segmenter.segment_images([image])
    if isinstance(found, ITAError):
        raise found
    return found


def size_of(text: str) -> tuple[int, int]:
    """Read WIDTHxHEIGHT as (height, width)."""
    try:
        width, height = map(int, text.split("x"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"a size is WIDTHxHEIGHT, got {text!r}") from error
    return height, width


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=size_of,
        default=[(1500, 2000), (3000, 4000), (6000, 8000)],
        metavar="WIDTHxHEIGHT",
    )
    parser.add_argument("--task", choices=("semantic", "panoptic", "instance"), default="panoptic")
    parser.add_argument("--threshold", type=float, help="least score of a segment (default: the task's)")
    parser.add_argument("--tiles", type=at_least(1), default=192, help="side of a tile in pixels")
    parser.add_argument("--tile_overlap", type=at_least(0), default=64, help="pixels that neighbors share")
    parser.add_argument("--batch_size", type=at_least(1), default=1, help="tiles in one pass")
    parser.add_argument("--threads", type=at_least(1), default=torch.get_num_threads())
    arguments = parser.parse_args()
    try:
        resolve_checkpoint(arguments.model)
        Tiling(arguments.tiles, arguments.tile_overlap)
    except (ITAError, ValueError) as error:
        parser.error(str(error))
    print(machine(arguments.threads))
    print(f"| {' | '.join(HEADS)} |\n|{' --- |' * len(HEADS)}", flush=True)
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawned, max_tasks_per_child=1) as pool:
        for row in pool.map(measure, [arguments] * len(arguments.sizes), arguments.sizes):
            print(f"| {' | '.join(str(row[head]) for head in HEADS)} |", flush=True)


if __name__ == "__main__":
    main()
