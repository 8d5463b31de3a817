"""The state of an evaluation: three metrics, and the mean IoU of each image."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ita_segmentation.evaluation.metrics.base import ArrayStateMetric
from ita_segmentation.evaluation.metrics.confusion_matrix import ConfusionMatrix, count_pixels, iou_scores
from ita_segmentation.evaluation.metrics.mask_ap import MaskAveragePrecision
from ita_segmentation.evaluation.metrics.panoptic_quality import PanopticQuality
from ita_segmentation.evaluation.predictors import EVALUATION_TASKS, ImagePrediction

CLASS_SCORES = ("iou", "acc", "pq", "sq", "rq", "ap")
"""Scores of a class; the metrics give them as `per_class_*` arrays."""


class BenchmarkScores:
    """Counts over the images of a benchmark; `metrics` maps each task that is scored to its metric."""

    def __init__(
        self, num_classes: int, ignore_index: int, is_thing: Sequence[bool] | None, tasks: frozenset[str]
    ) -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.metrics: dict[str, ArrayStateMetric] = {}
        # The evaluator gathers the states itself: parts of interrupted runs are among them.
        if "semantic" in tasks:
            self.confusion = ConfusionMatrix(num_classes, ignore_index, sync_on_compute=False)
            self.metrics["semantic"] = self.confusion
        if "panoptic" in tasks:
            self.metrics["panoptic"] = PanopticQuality(num_classes, is_thing, sync_on_compute=False)
        if "instance" in tasks:
            self.metrics["instance"] = MaskAveragePrecision(num_classes, sync_on_compute=False)
        self._image_mious: dict[int, float] = {}

    def update(self, index: int, sample: Mapping[str, Any], prediction: ImagePrediction) -> None:
        """Count one image, the `index`-th of the benchmark; ValueError if it and its prediction do not fit.

        The sample has `label` (H, W), and `panoptic` (H, W) with `segments` for the other tasks.
        """
        miou = math.nan
        if "semantic" in self.metrics:
            counts = count_pixels(prediction.semantic, sample["label"], self.num_classes, self.ignore_index)
            self.confusion.merge_state({"matrix": counts})
            miou = iou_scores(counts.numpy())["miou"]
        if "panoptic" in self.metrics:
            self.metrics["panoptic"].update(
                prediction.panoptic, prediction.segments, sample["panoptic"], sample["segments"]
            )
        if "instance" in self.metrics:
            self._update_instances(index, sample, prediction)
        self._image_mious[index] = miou

    def _update_instances(self, index: int, sample: Mapping[str, Any], prediction: ImagePrediction) -> None:
        found = prediction.instances
        if found is None:
            raise ValueError("the predictor gave no instances")
        things = [segment for segment in sample["segments"] if segment["isthing"]]
        ids = np.array([segment["id"] for segment in things], dtype=np.int64)
        self.metrics["instance"].update(
            image_id=index,
            scores=found.scores,
            labels=found.labels,
            masks=found.masks,
            reference_labels=np.array([segment["category_id"] for segment in things], dtype=np.int64),
            reference_masks=sample["panoptic"][None] == ids[:, None, None],
            reference_crowd=np.array([segment.get("iscrowd", False) for segment in things], dtype=bool),
        )

    @property
    def image_scores(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices (n,) int64 of the images so far, ascending, and the mean IoU (n,) float64 of each."""
        indices = sorted(self._image_mious)
        scores = [self._image_mious[index] for index in indices]
        return np.array(indices, dtype=np.int64), np.array(scores, dtype=np.float64)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the state as arrays, which `merge` takes."""
        indices, scores = self.image_scores
        state = {"images.index": indices, "images.miou": scores}
        for task, metric in self.metrics.items():
            state |= {f"{task}.{name}": array for name, array in metric.arrays().items()}
        return state

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        """Add the counts of another process or of an earlier run; ValueError if they are of other classes or tasks."""
        for task, metric in self.metrics.items():
            prefix = f"{task}."
            metric.merge_arrays(
                {name.removeprefix(prefix): one for name, one in state.items() if name.startswith(prefix)}
            )
        self._image_mious |= zip(state["images.index"].tolist(), state["images.miou"].tolist(), strict=True)

    def results(
        self, names: Sequence[str], seen: Sequence[bool] | None, is_thing: Sequence[bool] | None
    ) -> dict[str, Any]:
        """Compute the scores of all tasks in one flat dictionary, and `classes`, a row of scores for each class.

        `names` (K,) are first names; `seen` and `is_thing` (K,) are None if not known.
        """
        scores: dict[str, Any] = {"num_images": len(self._image_mious), "tasks": sorted(self.metrics)}
        for task in EVALUATION_TASKS:
            if task in self.metrics:
                found = self.metrics[task].compute(seen)
                # Each task counts its own classes; the keys without a task's name are those of the first task.
                counts = {f"{task}_{key}": value for key, value in found.items() if key.startswith("num_")}
                scores = {**found, **counts, **scores}
        classes: list[dict[str, Any]] = [
            {
                "name": name,
                "seen": None if seen is None else bool(seen[index]),
                "is_thing": None if is_thing is None else bool(is_thing[index]),
            }
            for index, name in enumerate(names)
        ]
        for key in CLASS_SCORES:
            if f"per_class_{key}" in scores:
                for row, value in zip(classes, scores[f"per_class_{key}"].tolist(), strict=True):
                    row[key] = value
        totals = {key: value for key, value in scores.items() if not key.startswith("per_class_")}
        return totals | {"classes": classes}
