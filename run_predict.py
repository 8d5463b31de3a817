"""Segments pictures by the words typed: an overlay with its legend, a label map and a JSON file for each.

    python run_predict.py --model models/ita-tiny --images examples --classes "cat, sofa|couch, wall" --output out

For a picture NAME.jpg the output folder gets
- NAME_overlay.png: the picture with its segments in colour, and a legend;
- NAME_labels.png: one channel of 8 bits (16 where more are needed). Semantic: the index of the class in the
  vocabulary. Panoptic and instance: the segment's id, from 1; 0 is no segment;
- NAME_segments.json: the vocabulary, the image's dominant categories, and of each segment id, label, class index,
  score (null for semantic, which has none), area in pixels and box [x, y, width, height].
A second picture of the same name is NAME_2, and so on. A picture that cannot be read is named at the end, the others
are done all the same, and the exit status is 1.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image
from tqdm import tqdm

from evaluation_ita.door import (
    DoorError,
    DoorParser,
    find_pictures,
    fraction,
    load_checkpoint,
    one_line,
    open_door,
    output_folder,
    positive_int,
    read_picture,
    read_vocabulary,
    set_shortest_side,
    write_files,
)
from evaluation_ita.overlay import draw_overlay

OUTPUT_ENDINGS = ("_overlay.png", "_labels.png", "_segments.json")


def build_parser() -> DoorParser:
    parser = DoorParser(description="Segments pictures by the words of a vocabulary.")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint folder")
    parser.add_argument(
        "--images",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE_OR_DIR",
        help="pictures, or folders of them",
    )
    words = parser.add_mutually_exclusive_group()
    words.add_argument(
        "--classes", help='such as "cat, sofa|couch, wall"; without, the checkpoint\'s own classes'
    )
    words.add_argument(
        "--vocabulary", type=Path, metavar="FILE", help="JSON list of classes, or lines id:name,synonym,..."
    )
    parser.add_argument("--task", choices=("semantic", "panoptic", "instance"), default="semantic")
    parser.add_argument(
        "--threshold",
        type=fraction,
        help="least score of a segment, panoptic (default 0.8) and instance (0.5)",
    )
    parser.add_argument(
        "--size", type=positive_int, help="shortest side fed to the network (the checkpoint's own)"
    )
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    return parser


def main() -> NoReturn:
    """The door: the process's arguments in, its exit status out."""
    open_door(predict)


def predict(argv: Sequence[str] | None = None) -> int:
    """Does what the arguments say. Returns 0, or 1 where some of several pictures failed.

    Raises:
        DoorError: what stops everything, in one line.
    """
    arguments = build_parser().parse_door(argv)
    vocabulary = _vocabulary(arguments)
    if arguments.threshold is not None and arguments.task == "semantic":
        raise DoorError("--threshold is for the tasks panoptic and instance")
    paths = find_pictures(arguments.images)
    names = output_names(paths)
    _keep_inputs(paths, names, output_folder(arguments.output))

    model, processor = load_checkpoint(arguments.model, arguments.device)
    set_shortest_side(processor, arguments.size)
    if vocabulary is None and model.default_vocabulary is None:
        raise DoorError(
            f"the checkpoint {arguments.model} has no classes of its own: give --classes or --vocabulary"
        )

    failures: list[str] = []
    for path, name in tqdm(list(zip(paths, names, strict=True)), unit="picture", disable=len(paths) < 2):
        try:
            picture = read_picture(path)
            label_map, document = segment_picture(
                model, processor, picture, vocabulary, arguments.task, arguments.threshold
            )
            document = {"image": str(path), "model": str(arguments.model), **document}
            _write_results(arguments.output / name, picture, label_map, document)
        except DoorError as error:
            message = one_line(error)
            failures.append(message if str(path) in message else f"{path}: {message}")
    done = len(paths) - len(failures)
    if done:
        print(f"{done} picture{'s' if done > 1 else ''} segmented: see {arguments.output}/*_overlay.png")
    if not failures:
        return 0
    if len(paths) == 1:
        raise DoorError(failures[0])
    print(f"run_predict.py: error: {len(failures)} of {len(paths)} pictures failed:", file=sys.stderr)
    print("\n".join(f"  {failure}" for failure in failures), file=sys.stderr)
    return 1


def output_names(paths: Sequence[Path]) -> list[str]:
    """A name for each picture's files: its stem; NAME_2, NAME_3, ... where another picture has that name already."""
    taken: set[str] = set()
    stems = {path.stem.casefold() for path in paths}
    names = []
    for path in paths:
        name, number = path.stem, 1
        while name.casefold() in taken or (number > 1 and name.casefold() in stems):
            number += 1
            name = f"{path.stem}_{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def segment_picture(
    model: Any,
    processor: Any,
    picture: Image.Image,
    vocabulary: Sequence[Sequence[str]] | None,
    task: str,
    threshold: float | None = None,
) -> tuple[np.ndarray, dict[str, Any]]:
    """One picture through the network.

    Args:
        picture: RGB.
        vocabulary: classes, each a list of synonyms; None for the model's own.
        task: "semantic", "panoptic" or "instance".
        threshold: least score of a segment (panoptic 0.8, instance 0.5; semantic has none).

    Returns:
        the label map (H, W), uint8 or uint16, and what NAME_segments.json says beside the picture's name.

    Raises:
        DoorError: if memory does not suffice or there are more classes than 16 bits can tell apart.
    """
    import torch

    size = [(picture.height, picture.width)]
    try:
        with torch.inference_mode():
            inputs = processor(images=picture, return_tensors="pt").to(model.device)
            outputs = model(**inputs, vocabulary=vocabulary)
            if task == "semantic":
                labels = processor.post_process_semantic_segmentation(outputs, target_sizes=size)[0]
                scores = None
            else:
                read_out = getattr(processor, f"post_process_{task}_segmentation")
                least = {"panoptic": 0.8, "instance": 0.5}[task] if threshold is None else threshold
                result = read_out(outputs, threshold=least, target_sizes=size)[0]
                labels, scores = result["segmentation"], result["segments_info"]
    except (MemoryError, RuntimeError) as error:
        # A GPU out of memory has an error of its own; without one torch says it in words.
        out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(
            error
        )
        if not out_of_memory:
            raise
        raise DoorError(f"not enough memory for a picture of {picture.width} x {picture.height}") from error
    classes = outputs.vocabulary[0]
    if scores is None:
        scores = [{"id": index, "label_id": index, "score": None} for index in range(len(classes))]
    highest = max((entry["id"] for entry in scores), default=0)
    if highest > 65_535:
        raise DoorError(f"{len(classes)} classes are more than a label map of 16 bits can hold")
    label_map = labels.cpu().numpy().astype(np.uint8 if highest < 256 else np.uint16)
    document = {
        "width": picture.width,
        "height": picture.height,
        "task": task,
        "vocabulary": [list(names) for names in classes],
        "dominant_categories": list(outputs.dominant_categories[0]) if outputs.dominant_categories else [],
        "segments": _segments(label_map, classes, scores),
    }
    return label_map, document


def _segments(
    label_map: np.ndarray, classes: Sequence[Sequence[str]], entries: Sequence[Any]
) -> list[dict[str, Any]]:
    """The segments that have pixels in the map, largest first."""
    areas = np.bincount(label_map.ravel(), minlength=1)
    segments = []
    for entry in entries:
        if entry["id"] >= len(areas) or not areas[entry["id"]]:
            continue
        mask = label_map == entry["id"]
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        segments.append(
            {
                "id": entry["id"],
                "label": classes[entry["label_id"]][0],
                "label_id": entry["label_id"],
                "score": entry["score"],
                "area": int(areas[entry["id"]]),
                "bbox": [
                    int(columns[0]),
                    int(rows[0]),
                    int(columns[-1] - columns[0]) + 1,
                    int(rows[-1] - rows[0]) + 1,
                ],
            }
        )
    return sorted(segments, key=lambda segment: -segment["area"])


def _vocabulary(arguments: Any) -> list[list[str]] | None:
    if arguments.vocabulary is not None:
        return read_vocabulary(arguments.vocabulary)
    if arguments.classes is None:
        return None
    from modeling_ita.vocabulary import parse_classes

    try:
        return parse_classes(arguments.classes)
    except ValueError as error:
        raise DoorError(f"--classes: {one_line(error)}") from error


def _keep_inputs(paths: Sequence[Path], names: Sequence[str], output: Path) -> None:
    """Raises DoorError where a result would take the place of one of the pictures given."""
    given = {path.resolve() for path in paths}
    for path in (output / f"{name}{ending}" for name in names for ending in OUTPUT_ENDINGS):
        if path.resolve() in given:
            raise DoorError(
                f"{path} is one of the pictures given and would be overwritten: choose another --output"
            )


def _write_results(base: Path, picture: Image.Image, label_map: np.ndarray, document: dict[str, Any]) -> None:
    """The three files of a picture; `base` is the output folder and the picture's name."""
    legend = [(segment["id"], segment["label"], segment["score"]) for segment in document["segments"]]
    contents = (
        _png(draw_overlay(picture, label_map, legend)),
        _png(Image.fromarray(label_map)),
        (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode(),
    )
    paths = (base.with_name(base.name + ending) for ending in OUTPUT_ENDINGS)
    write_files(dict(zip(paths, contents, strict=True)))


def _png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return stream.getvalue()


if __name__ == "__main__":
    main()
