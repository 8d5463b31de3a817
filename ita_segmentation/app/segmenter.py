"""Answer the page's requests: an image and class names in, everything that the page shows out."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ita_segmentation.app.class_names import NameLimits, read_class_list
from ita_segmentation.app.code_snippet import python_lines
from ita_segmentation.app.images import id_map_data, image_data, png_data, read_limited_image
from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.integrations.coco import coco_document, coco_results
from ita_segmentation.prediction.image_files import empty_line
from ita_segmentation.prediction.segmenter import DEFAULT_THRESHOLDS, TASKS, SegmentedImage, Segmenter
from ita_segmentation.visualization import assign_colors
from modeling_ita.tiling import Tiling

MAX_ABSENT_SHOWN = 60
CLASSES_PER_STEP = 16
"""Classes that are encoded before a request that nobody waits for is given up."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_pixels: int = 25_000_000
    names: NameLimits = field(default_factory=NameLimits)
    tiles: int = 100


@dataclass(frozen=True)
class ClassExample:
    """An example of a class, as the page's fields give it.

    Attributes:
        path: the image's file.
        image_name: what the user calls it.
        class_name: the class that it shows.
        box: "left, top, right, bottom" in pixels of the image; empty for the whole image.
    """

    path: str
    image_name: str
    class_name: Any
    box: Any = ""

    def pixels(self) -> tuple[float, ...] | None:
        """Read the box; None for the whole image."""
        text = str(self.box or "").strip()
        try:
            numbers = tuple(map(float, text.replace(",", " ").split()))
        except ValueError:
            numbers = (0.0,)
        if text and len(numbers) != 4:
            raise ITAError(
                f"The box of the example is four numbers, left, top, right, bottom; got “{one_line(text, 40)}”."
            )
        return tuple(int(one) if one.is_integer() else one for one in numbers) or None


class GradioSegmenter:
    """A model that several people use at once: one call runs through the network at a time.

    Nothing about a person is kept: an answer depends on its own request alone.
    """

    def __init__(
        self, model: Any, processor: Any, checkpoint: str, limits: Limits, notice: str | None = None
    ):
        self.model = model
        self.processor = processor
        self.checkpoint = checkpoint
        self.limits = limits
        self.notice = notice
        self._turn = threading.Lock()

    def answer(self, *request: Any) -> Iterator[dict[str, Any] | None]:
        """Answer in steps (None, and at last the view), so that a caller who has left can be noticed between them."""
        try:
            yield from self._steps(*request)
        except ITAError as error:
            yield {"error": str(error), "run": secrets.token_hex(4)}

    def segment(self, *request: Any) -> dict[str, Any]:
        """Segment one image: the last step; raises ITAError for what the user can put right."""
        return [step for step in self._steps(*request) if step is not None][-1]

    def _steps(
        self,
        path: Any,
        tags: Any,
        task: Any,
        threshold: Any,
        name: str | None = None,
        tiles: Any = None,
        example: ClassExample | None = None,
    ) -> Iterator[dict[str, Any] | None]:
        started = time.perf_counter()
        if not path:
            raise ITAError("There is no image yet: drop one on the page, or choose an example.")
        if task not in TASKS:
            raise ITAError(f"The task is one of {', '.join(TASKS)}; got “{str(task)[:40]}”.")
        threshold = _checked_threshold(threshold, task)
        tiling = _checked_tiling(tiles)
        vocabulary, remarks = read_class_list(tags, self.limits.names)
        if vocabulary is None and self.model.default_vocabulary is None:
            raise ITAError("This model has no classes of its own: please type at least one class name.")
        name = Path(name or path).name
        image = read_limited_image(Path(path), name, self.limits.max_pixels)
        shown = None if example is None else self._read_example(example)
        with self._turn if shown else nullcontext():
            options = {"threshold": threshold, "keep_overlaps": True, "tiling": tiling, "examples": shown}
            segmenter = Segmenter(self.model, self.processor, vocabulary, task, **options)
        self._check_tiles(segmenter, image)
        classes = segmenter.encoded_classes
        for start in range(0, len(classes), CLASSES_PER_STEP):
            yield None
            with self._turn:
                segmenter.encode(classes[start : start + CLASSES_PER_STEP])
        yield None
        with self._turn:
            [result] = segmenter.segment_images([image])
        if isinstance(result, ITAError):
            raise result
        yield None
        view = view_of_result(image, result, name, typed=vocabulary is not None)
        if not result.segments:
            remarks = [*remarks, f"{empty_line(result, segmenter).capitalize()}."]
        view["remarks"] = [*remarks, *([f"Note: {self.notice}."] if self.notice else [])]
        view["python"] = python_lines(
            self.checkpoint, name, vocabulary, task, threshold, tiling, _named(example, shown)
        )
        view["seconds"] = round(time.perf_counter() - started, 3)
        yield view

    def _read_example(self, example: ClassExample) -> dict[str, list[tuple[Any, Any]]]:
        name, limit = str(example.class_name or "").strip(), self.limits.names.characters
        if not name:
            raise ITAError("Please say which of the classes the example shows.")
        if len(name) > limit:
            raise ITAError(f"A class name is longer than {limit} characters: “{one_line(name, 40)}”.")
        image = read_limited_image(Path(example.path), example.image_name, self.limits.max_pixels)
        return {name: [(image, example.pixels() or (0, 0, *image.size))]}

    def _check_tiles(self, segmenter: Segmenter, image: Image.Image) -> None:
        if segmenter.tiling is None:
            return
        count = len(segmenter.tiling.crops((image.height, image.width)))
        if count > self.limits.tiles:
            raise ITAError(
                f"These are {count:,} tiles; this page takes up to {self.limits.tiles:,}. Please make them larger."
            )


def _named(example: ClassExample | None, shown: Any) -> dict[str, list[tuple[str, Any]]] | None:
    """Give the example with its image's name in the place of the image."""
    if example is None:
        return None
    return {name: [(example.image_name, region)] for name, [(_, region)] in shown.items()}


def _checked_tiling(tiles: Any) -> Tiling | None:
    if not tiles:
        return None
    try:
        return Tiling(int(tiles) if isinstance(tiles, float) and tiles.is_integer() else tiles)
    except ValueError as error:
        raise ITAError(f"The tiles cannot be used: {one_line(error, 120)}.") from error


def _checked_threshold(threshold: Any, task: str) -> float | None:
    if threshold is None:
        return DEFAULT_THRESHOLDS.get(task)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise ITAError(f"The minimum score is a number from 0 to 1; got “{str(threshold)[:40]}”.")
    return float(threshold)


def view_of_result(image: Image.Image, result: SegmentedImage, name: str, typed: bool) -> dict[str, Any]:
    """Return what the browser draws and offers for download.

    Args:
        image: RGB.
        result: its segments.
        name: the image's file name.
        typed: whether the user typed the vocabulary; only then the classes not found are named.

    Returns:
        `image`, `ids` and `labels` (data URIs: the image and the id map as shown, and the label map itself),
        `segments` and `classes` (largest first, each with color, score, and share of the image), `absent` (names of
        classes not found), `coco` (a JSON text), `name`, `task`, `width`, `height`, `run` (different each time).
    """
    pixels = result.label_map.size
    segments = [
        {
            "id": segment["id"],
            "class": segment["label_id"],
            "score": segment["score"],
            "share": segment["area"] / pixels,
        }
        for segment in result.segments
    ]
    classes = _classes_of_segments(result.vocabulary, segments)
    found = {entry["class"] for entry in classes}
    absent = [names[0] for index, names in enumerate(result.vocabulary) if index not in found]
    return {
        "run": secrets.token_hex(4),
        "name": name,
        "task": result.task,
        "width": result.width,
        "height": result.height,
        "image": image_data(image),
        "ids": id_map_data(result.label_map),
        "labels": png_data(Image.fromarray(result.label_map)),
        "segments": segments,
        "classes": classes,
        "absent": absent[:MAX_ABSENT_SHOWN] if typed else [],
        "absent_count": len(absent) if typed else 0,
        "coco": _coco_text(result, name),
    }


def _classes_of_segments(
    vocabulary: Sequence[Sequence[str]], segments: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """One entry for each class that has a segment, largest first; its score is that of its best segment."""
    members = defaultdict(list)
    for segment in segments:
        members[segment["class"]].append(segment)
    classes = []
    for index, own in members.items():
        scores = [segment["score"] for segment in own if segment["score"] is not None]
        classes.append(
            {
                "class": index,
                "name": vocabulary[index][0],
                "synonyms": list(vocabulary[index][1:]),
                "score": max(scores, default=None),
                "share": sum(segment["share"] for segment in own),
                "count": len(own),
            }
        )
    classes.sort(key=lambda entry: -entry["share"])
    colors = assign_colors(entry["class"] for entry in classes)
    return [{**entry, "color": list(colors[entry["class"]])} for entry in classes]


def _coco_text(result: SegmentedImage, name: str) -> str:
    image = {"id": 1, "file_name": name, "width": result.width, "height": result.height}
    entries = coco_results(result.result, image_id=1)
    return json.dumps(coco_document([image], entries, result.vocabulary), ensure_ascii=False)
