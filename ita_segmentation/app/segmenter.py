"""What happens between a person's click and the answer: image and words in, everything the page shows out."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ita_segmentation.app.class_names import vocabulary_of_chips
from ita_segmentation.app.class_scores import RecordingModel, mean_class_scores
from ita_segmentation.app.code_snippet import python_lines
from ita_segmentation.app.images import data_uri, id_map_data, image_data, png_bytes, read_limited_image
from ita_segmentation.errors import ITAError
from ita_segmentation.integrations import coco_document
from ita_segmentation.prediction.segmenter import DEFAULT_THRESHOLDS, TASKS, Prediction, Segmenter
from ita_segmentation.visualization import color_of

MAX_ABSENT_SHOWN = 60


@dataclass
class Limits:
    """What one request may ask for."""

    max_pixels: int = 25_000_000
    max_classes: int = 2_000


class PageSegmenter:
    """A model that several people use at once: one call runs through the network at a time.

    Nothing about a person is kept: an answer depends on its own request alone.

    Args:
        model: in eval mode.
        processor: its image processor.
        checkpoint: what the Python lines call the checkpoint.
        limits: what one request may ask for.
    """

    def __init__(self, model: Any, processor: Any, checkpoint: str, limits: Limits):
        self.model = model
        self.processor = processor
        self.checkpoint = checkpoint
        self.limits = limits
        self._turn = threading.Lock()

    def answer(
        self, path: Any, chips: Any, task: Any, threshold: Any, name: str | None = None
    ) -> dict[str, Any]:
        """`segment`, with what the person can put right as {"error": sentence}."""
        try:
            return self.segment(path, chips, task, threshold, name)
        except ITAError as error:
            return {"error": str(error), "run": secrets.token_hex(4)}

    def segment(
        self, path: Any, chips: Any, task: Any, threshold: Any, name: str | None = None
    ) -> dict[str, Any]:
        """Segments one image.

        Args:
            path: the image's file; None where the person gave none.
            chips: class words, see `vocabulary_of_chips`.
            task: "semantic", "panoptic" or "instance".
            threshold: least score of a segment, 0 to 1; None for the task's own.
            name: what the person calls the image (default: the file's name).

        Returns:
            what JSON can hold: see `view_of_prediction`.

        Raises:
            ITAError: what the person can put right, in a sentence.
        """
        started = time.perf_counter()
        if not path:
            raise ITAError("There is no image yet: drop one on the page, or choose an example.")
        if task not in TASKS:
            raise ITAError(f"The task is one of {', '.join(TASKS)}; got “{str(task)[:40]}”.")
        least = _checked_threshold(threshold, task)
        vocabulary, remarks = vocabulary_of_chips(chips, self.limits.max_classes)
        if vocabulary is None and self.model.default_vocabulary is None:
            raise ITAError("This model has no classes of its own: please type at least one class word.")
        name = Path(name or path).name
        image = read_limited_image(Path(path), name, self.limits.max_pixels)
        prediction = self._run(image, vocabulary, task, least)
        view = view_of_prediction(image, prediction, name, own_words=vocabulary is not None)
        view["remarks"] = remarks
        view["python"] = python_lines(self.checkpoint, name, vocabulary, task, least)
        view["seconds"] = round(time.perf_counter() - started, 3)
        return view

    def _run(
        self, image: Image.Image, vocabulary: list[list[str]] | None, task: str, threshold: float | None
    ) -> Prediction:
        recorded = RecordingModel(self.model)
        segmenter = Segmenter(recorded, self.processor, vocabulary, task, threshold, with_run_lengths=True)
        with self._turn:
            [prediction] = segmenter.segment([image])
        if isinstance(prediction, ITAError):
            raise prediction
        if task == "semantic":
            _add_class_scores(prediction, recorded.outputs)
        return prediction


def _add_class_scores(prediction: Prediction, outputs: Any) -> None:
    """Writes into a semantic prediction what `mean_class_scores` says."""
    segments = prediction.document["segments"]
    scores = mean_class_scores(outputs, prediction.label_map, [segment["label_id"] for segment in segments])
    for segment in segments:
        segment["score"] = scores.get(segment["label_id"])
    for entry in prediction.run_lengths:
        entry["score"] = scores.get(entry["category_id"] - 1, 0.0)


def _checked_threshold(threshold: Any, task: str) -> float | None:
    if threshold is None or task == "semantic":
        return DEFAULT_THRESHOLDS.get(task)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise ITAError(f"The least score is a number from 0 to 1; got “{str(threshold)[:40]}”.")
    return float(threshold)


def view_of_prediction(
    image: Image.Image, prediction: Prediction, name: str, own_words: bool
) -> dict[str, Any]:
    """What the browser draws and offers for download.

    Args:
        image: RGB.
        prediction: of that image, with run lengths.
        name: the image's file name.
        own_words: whether the person typed the vocabulary; only then the classes not found are named.

    Returns:
        `image`, `ids` and `labels` (data URIs: the image and the id map as shown, and the label map as it is),
        `segments` and `classes` (largest first, each with colour, score, and share of the image), `absent` (names
        of classes not found), `coco` (a JSON text), `name`, `task`, `width`, `height`, `run` (different each time).
    """
    label_map, document = prediction.label_map, prediction.document
    pixels = label_map.size
    segments = [
        {
            "id": segment["id"],
            "class": segment["label_id"],
            "score": segment["score"],
            "share": segment["area"] / pixels,
        }
        for segment in document["segments"]
    ]
    classes = _classes_of_segments(document["vocabulary"], segments)
    found = {entry["class"] for entry in classes}
    absent = [names[0] for index, names in enumerate(document["vocabulary"]) if index not in found]
    return {
        "run": secrets.token_hex(4),
        "name": name,
        "task": document["task"],
        "width": document["width"],
        "height": document["height"],
        "image": image_data(image),
        "ids": id_map_data(label_map),
        "labels": data_uri(png_bytes(Image.fromarray(label_map)), "image/png"),
        "segments": segments,
        "classes": classes,
        "absent": absent[:MAX_ABSENT_SHOWN] if own_words else [],
        "absent_count": len(absent) if own_words else 0,
        "coco": _coco_text(prediction, name),
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
                "color": list(color_of(index)),
                "score": max(scores, default=None),
                "share": sum(segment["share"] for segment in own),
                "count": len(own),
            }
        )
    return sorted(classes, key=lambda entry: -entry["share"])


def _coco_text(prediction: Prediction, name: str) -> str:
    document = prediction.document
    image = {"id": 1, "file_name": name, "width": document["width"], "height": document["height"]}
    entries = [{"image_id": 1, **entry} for entry in prediction.run_lengths]
    return json.dumps(coco_document([image], entries, document["vocabulary"]), ensure_ascii=False)
