"""Batches of images through the network, and what is kept of each: a label map and a description of its segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ita_segmentation.errors import ITAError

TASKS = ("semantic", "panoptic", "instance")
DEFAULT_THRESHOLDS = {"panoptic": 0.8, "instance": 0.5}


@dataclass(frozen=True)
class Prediction:
    """What an image became.

    Attributes:
        label_map: (H, W), uint8 or uint16. Semantic: class indices; else segment ids from 1, 0 being none.
        document: width, height, task, vocabulary, dominant_categories and segments, as in NAME_segments.json.
        run_lengths: COCO entries without `image_id`, of whole masks (instances may overlap); empty if not asked for.
    """

    label_map: np.ndarray
    document: dict[str, Any]
    run_lengths: list[dict[str, Any]] = field(default_factory=list)


class Segmenter:
    """A checkpoint with a vocabulary and a task: images in, predictions out.

    Args:
        model, processor: as `load_checkpoint` gives them.
        vocabulary: classes, each a list of synonyms; None: the checkpoint's own. It is encoded once.
        task: "semantic", "panoptic" or "instance".
        threshold: least score of a segment (None: panoptic 0.8, instance 0.5; semantic has none).
        with_run_lengths: whether predictions carry COCO's run lengths.

    Raises:
        ITAError: if there is no vocabulary at all.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        vocabulary: Sequence[Sequence[str]] | None = None,
        task: str = "semantic",
        threshold: float | None = None,
        with_run_lengths: bool = False,
    ):
        from modeling_ita.vocabulary import normalize_vocabulary

        if vocabulary is None and model.default_vocabulary is None:
            raise ITAError("the checkpoint has no classes of its own: give --classes or --vocabulary")
        self.model, self.processor, self.task = model, processor, task
        self.vocabulary = None if vocabulary is None else normalize_vocabulary(vocabulary)
        self.threshold = DEFAULT_THRESHOLDS.get(task) if threshold is None else threshold
        self.with_run_lengths = with_run_lengths

    @property
    def classes(self) -> list[list[str]]:
        """The vocabulary that images are segmented with."""
        chosen = self.model.default_vocabulary if self.vocabulary is None else self.vocabulary
        return [[names] if isinstance(names, str) else list(names) for names in chosen]

    def segment(self, images: Sequence[Image.Image]) -> list[Prediction | ITAError]:
        """RGB images of any sizes, in one pass -> a prediction of each, or what was wrong with it.

        A batch that memory does not hold is done image by image.
        """
        if not images:
            return []
        try:
            return list(self._segment(images))
        except ITAError as error:
            if len(images) == 1:
                return [error]
        return [result for image in images for result in self.segment([image])]

    def _segment(self, images: Sequence[Image.Image]) -> list[Prediction]:
        import torch

        sizes = [(image.height, image.width) for image in images]
        try:
            with torch.inference_mode():
                inputs = self.processor(images=list(images), return_tensors="pt").to(self.model.device)
                outputs = self.model(**inputs, vocabulary=self.vocabulary)
                results = self._read_out(outputs, sizes)
                run_lengths = self._run_lengths(outputs, sizes, results)
        except (MemoryError, RuntimeError) as error:
            # A GPU out of memory has an error of its own; without one torch says it in words.
            of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
            if not (of_memory or "allocate memory" in str(error)):
                raise
            height, width = max(sizes)
            raise ITAError(f"not enough memory for an image of {width} x {height}") from error
        return [
            self._prediction(outputs, index, result, coco)
            for index, (result, coco) in enumerate(zip(results, run_lengths, strict=True))
        ]

    def _read_out(self, outputs: Any, sizes: list[tuple[int, int]], **options: Any) -> list[Any]:
        if self.task == "semantic":
            return self.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
        read_out = getattr(self.processor, f"post_process_{self.task}_segmentation")
        return read_out(outputs, threshold=self.threshold, target_sizes=sizes, **options)

    def _run_lengths(
        self, outputs: Any, sizes: list[tuple[int, int]], results: list[Any]
    ) -> list[list[dict[str, Any]]]:
        if not self.with_run_lengths:
            return [[] for _ in results]
        from ita_segmentation.integrations import coco_results

        if self.task == "instance":  # a map hides what one instance covers of another
            results = self._read_out(outputs, sizes, return_binary_maps=True)
        try:
            entries = [coco_results(result, image_id=0) for result in results]
        except ImportError as error:
            raise ITAError(str(error)) from error
        for entry in (entry for of_image in entries for entry in of_image):
            del entry["image_id"]
        return entries

    def _prediction(
        self, outputs: Any, index: int, result: Any, run_lengths: list[dict[str, Any]]
    ) -> Prediction:
        classes = outputs.vocabulary[index]
        if self.task == "semantic":
            labels = result
            entries: list[dict[str, Any]] = [
                {"id": one, "label_id": one, "score": None} for one in range(len(classes))
            ]
        else:
            labels, entries = result["segmentation"], result["segments_info"]
        highest = max((entry["id"] for entry in entries), default=0)
        if highest > 65_535:
            raise ITAError(f"{len(classes)} classes are more than a label map of 16 bits can hold")
        label_map = labels.cpu().numpy().astype(np.uint8 if highest < 256 else np.uint16)
        dominant = outputs.dominant_categories
        document = {
            "width": label_map.shape[1],
            "height": label_map.shape[0],
            "task": self.task,
            "vocabulary": [list(names) for names in classes],
            "dominant_categories": list(dominant[index]) if dominant else [],
            "segments": describe_segments(label_map, classes, entries),
        }
        return Prediction(label_map, document, run_lengths)


def describe_segments(
    label_map: np.ndarray, classes: Sequence[Sequence[str]], entries: Sequence[Any]
) -> list[dict[str, Any]]:
    """The segments that have pixels in the map, largest first.

    Args:
        label_map: (H, W) ids.
        classes: the vocabulary.
        entries: "id", "label_id" and "score" of each segment.

    Returns:
        id, label, label_id, score, area in pixels and bbox [x, y, width, height] of each.
    """
    areas = np.bincount(label_map.ravel(), minlength=1)
    segments = []
    for entry in entries:
        if entry["id"] >= len(areas) or not areas[entry["id"]]:
            continue
        mask = label_map == entry["id"]
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        x, y = int(columns[0]), int(rows[0])
        segments.append(
            {
                "id": entry["id"],
                "label": classes[entry["label_id"]][0],
                "label_id": entry["label_id"],
                "score": entry["score"],
                "area": int(areas[entry["id"]]),
                "bbox": [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1],
            }
        )
    return sorted(segments, key=lambda segment: -segment["area"])
