"""All that an evaluation adds up over a benchmark: three metrics' states and each image's own score.

Nothing of an image is kept but two numbers. States of several processes, or of the parts of an interrupted run, add
up to the same bits as one pass over all images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ita_segmentation.evaluation.metrics.instance import MaskAveragePrecision
from ita_segmentation.evaluation.metrics.panoptic import PanopticQuality
from ita_segmentation.evaluation.metrics.semantic import ConfusionMatrix
from ita_segmentation.evaluation.predictors import Prediction

# Column of a class's row -> key of the per-class array that `compute` of a metric gives.
CLASS_COLUMNS = {
    "iou": "per_class_iou",
    "acc": "per_class_acc",
    "pq": "per_class_pq",
    "sq": "per_class_sq",
    "rq": "per_class_rq",
    "ap": "per_class_ap",
}


class BenchmarkScores:
    """The state of an evaluation.

    Attributes:
        tasks: those of "semantic", "panoptic" and "instance" that are scored.
        metrics: task -> its state.

    Args:
        num_classes: K.
        ignore_index: label of pixels that are left out.
        is_thing: (K,) which classes have instances; needed for the panoptic task.
        tasks: what is scored.
    """

    def __init__(
        self, num_classes: int, ignore_index: int, is_thing: Sequence[bool] | None, tasks: frozenset[str]
    ) -> None:
        self.arguments = (num_classes, ignore_index, is_thing, tasks)
        self.num_classes, self.ignore_index, self.tasks = num_classes, ignore_index, tasks
        self.metrics: dict[str, Any] = {}
        if "semantic" in tasks:
            self.metrics["semantic"] = ConfusionMatrix(num_classes, ignore_index)
        if "panoptic" in tasks:
            self.metrics["panoptic"] = PanopticQuality(num_classes, is_thing)
        if "instance" in tasks:
            self.metrics["instance"] = MaskAveragePrecision(num_classes)
        self._numbers: list[np.ndarray] = []
        self._images: list[np.ndarray] = []

    def update(self, index: int, sample: Mapping[str, Any], prediction: Prediction) -> None:
        """Counts one image.

        Args:
            index: the image's number in the benchmark.
            sample: `label` (H, W), and `panoptic` (H, W) with `segments` for the other tasks.
            prediction: of the same size, with what `tasks` needs.

        Raises:
            ValueError: shapes differ, or labels or segments are not what they should be.
        """
        own = math.nan
        if "semantic" in self.tasks:
            image = ConfusionMatrix(self.num_classes, self.ignore_index)
            image.update(prediction.semantic, sample["label"])
            self.metrics["semantic"].matrix += image.matrix
            own = image.compute()["miou"]
        if "panoptic" in self.tasks:
            self.metrics["panoptic"].update(
                prediction.panoptic, prediction.segments, sample["panoptic"], sample["segments"]
            )
        if "instance" in self.tasks:
            self._update_instances(index, sample, prediction)
        self._numbers.append(np.array([index], dtype=np.int64))
        self._images.append(np.array([own], dtype=np.float64))

    def _update_instances(self, index: int, sample: Mapping[str, Any], prediction: Prediction) -> None:
        found = prediction.instances
        if found is None:
            raise ValueError("the predictor gave no instances")
        things = [segment for segment in sample["segments"] if segment["isthing"]]
        ids = np.array([segment["id"] for segment in things], dtype=np.int64)
        self.metrics["instance"].update(
            index,
            found.scores,
            found.labels,
            found.masks,
            np.array([segment["category_id"] for segment in things], dtype=np.int64),
            sample["panoptic"][None] == ids[:, None, None],
            np.array([segment.get("iscrowd", False) for segment in things], dtype=bool),
        )

    @property
    def image_scores(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers (n,) int64 of the images so far, ascending, and the mean IoU (n,) float64 of each."""
        numbers = np.concatenate([np.zeros(0, np.int64), *self._numbers])
        scores = np.concatenate([np.zeros(0, np.float64), *self._images])
        order = numbers.argsort(kind="stable")
        return numbers[order], scores[order]

    def state_dict(self) -> dict[str, np.ndarray]:
        """Everything as arrays, which `load_state_dict` takes."""
        state = {
            f"{task}.{name}": array
            for task, metric in self.metrics.items()
            for name, array in metric.state_dict().items()
        }
        numbers, scores = self.image_scores
        return {**state, "images.number": numbers, "images.miou": scores}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes the place of what was counted so far.

        Raises:
            ValueError: the state is of other classes or tasks.
        """
        for task, metric in self.metrics.items():
            own = {name.split(".", 1)[1]: one for name, one in state.items() if name.startswith(f"{task}.")}
            metric.load_state_dict(own)
        self._numbers, self._images = [state["images.number"]], [state["images.miou"]]

    def __add__(self, other: BenchmarkScores) -> BenchmarkScores:
        total = BenchmarkScores(*self.arguments)
        total.metrics = {task: metric + other.metrics[task] for task, metric in self.metrics.items()}
        total._numbers = self._numbers + other._numbers
        total._images = self._images + other._images
        return total

    def results(
        self, names: Sequence[str], seen: Sequence[bool] | None, is_thing: Sequence[bool] | None
    ) -> dict[str, Any]:
        """The scores of all tasks in one flat dictionary, and `classes`: a row of scores for each class.

        Args:
            names: (K,) primary names.
            seen: (K,) whether masks of the class were in training; None if not known.
            is_thing: (K,), or None if not known.
        """
        scores: dict[str, Any] = {"num_images": len(self.image_scores[0]), "tasks": sorted(self.tasks)}
        for task in ("semantic", "panoptic", "instance"):
            if task in self.metrics:
                found = self.metrics[task].compute(seen)
                # Each task counts classes of its own; without a task's name before it, the first task's count.
                counts = {f"{task}_{key}": value for key, value in found.items() if key.startswith("num_")}
                scores = {**found, **counts, **scores}
        rows: list[dict[str, Any]] = [
            {
                "name": name,
                "seen": None if seen is None else bool(seen[index]),
                "is_thing": None if is_thing is None else bool(is_thing[index]),
            }
            for index, name in enumerate(names)
        ]
        for column, key in CLASS_COLUMNS.items():
            if key in scores:
                for row, value in zip(rows, scores[key].tolist(), strict=True):
                    row[column] = value
        return {
            **{name: value for name, value in scores.items() if not name.startswith("per_class_")},
            "classes": rows,
        }
