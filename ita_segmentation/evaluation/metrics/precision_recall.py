"""Curves of precision over recall from matched detections, and the twelve numbers that COCO reads off them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ita_segmentation.evaluation.metrics.mask_matching import AREA_RANGES, MAX_DETECTIONS, THRESHOLDS

RECALLS = np.linspace(0.0, 1.0, 101)  # where precision is read off
ALL, SMALL, MEDIUM, LARGE = range(len(AREA_RANGES))
# Name of a mean recall -> area range, and how many detections of each class in each image are looked at.
RECALL_SETTINGS = {
    "ar1": (ALL, 1),
    "ar10": (ALL, 10),
    "ar100": (ALL, MAX_DETECTIONS),
    "ars": (SMALL, MAX_DETECTIONS),
    "arm": (MEDIUM, MAX_DETECTIONS),
    "arl": (LARGE, MAX_DETECTIONS),
}


@dataclass(frozen=True)
class Detections:
    """Detections of a data set: image after image in the order of their ids, in each image best first.

    Attributes:
        labels: (n,) int class indices.
        scores: (n,) float64.
        ranks: (n,) int, place among the detections of its class in its image, from 0.
        right: (n, A) uint16, bit t: right at threshold t.
        left_out: (n, A) uint16, bit t: left out at threshold t.
    """

    labels: np.ndarray
    scores: np.ndarray
    ranks: np.ndarray
    right: np.ndarray
    left_out: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> Detections:
        return Detections(
            self.labels[chosen],
            self.scores[chosen],
            self.ranks[chosen],
            self.right[chosen],
            self.left_out[chosen],
        )


@dataclass(frozen=True)
class Curves:
    """Precision and recall of each class; -1 where a class has no reference.

    Attributes:
        precision: (A, T, R, K) float64, at each area range, IoU threshold and recall.
        recall: for each name of `RECALL_SETTINGS`, (T, K) float64, the highest recall at each IoU threshold.
    """

    precision: np.ndarray
    recall: dict[str, np.ndarray]

    def average_precision(
        self, area_range: int = ALL, threshold: float | None = None, classes: np.ndarray | slice = slice(None)
    ) -> float:
        """The mean over recalls, classes and IoU thresholds (or at one); nan if no class has a reference.

        Args:
            classes: (K,) bool or indices of the classes to be averaged.
        """
        chosen = slice(None) if threshold is None else np.isclose(THRESHOLDS, threshold)
        return _mean_of_known(self.precision[area_range][chosen][:, :, classes])

    def average_recall(self, name: str) -> float:
        """The mean over classes and IoU thresholds of a setting of `RECALL_SETTINGS`; nan likewise."""
        return _mean_of_known(self.recall[name])


def curves(detections: Detections, num_references: np.ndarray) -> Curves:
    """Precision and recall of each class.

    Args:
        num_references: (K, A) int64, references that count, for each class and area range.
    """
    num_classes, num_ranges = num_references.shape
    precision = -np.ones((num_ranges, len(THRESHOLDS), len(RECALLS), num_classes))
    recall = {name: -np.ones((len(THRESHOLDS), num_classes)) for name in RECALL_SETTINGS}
    detections = detections[np.argsort(detections.labels, kind="stable")]
    limits = np.searchsorted(detections.labels, np.arange(num_classes + 1))
    for label in np.flatnonzero(num_references.any(axis=1)):
        of_class = detections[np.arange(limits[label], limits[label + 1])]
        of_class = of_class[np.argsort(-of_class.scores, kind="stable")]
        for name, (area_range, max_detections) in RECALL_SETTINGS.items():
            number = num_references[label, area_range]
            if number:
                chosen = of_class[of_class.ranks < max_detections]
                right, wrong = _running_counts(chosen, area_range)
                recall[name][:, label] = right[-1] / number if len(right) else 0.0
                if max_detections == MAX_DETECTIONS:
                    precision[area_range, :, :, label] = _precision_at_recalls(right, wrong, number)
    return Curves(precision, recall)


def _running_counts(detections: Detections, area_range: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, T) float64 numbers of right, and of wrong, detections up to each one."""
    bits = np.arange(len(THRESHOLDS), dtype=np.uint16)
    right = (detections.right[:, area_range, None] >> bits) & 1
    left_out = (detections.left_out[:, area_range, None] >> bits) & 1
    wrong = 1 - (right | left_out)
    return right.cumsum(axis=0, dtype=np.float64), wrong.cumsum(axis=0, dtype=np.float64)


def _precision_at_recalls(right: np.ndarray, wrong: np.ndarray, number: int) -> np.ndarray:
    """(T, R) the highest precision at each recall or above; 0 at recalls that are not reached."""
    read_off = np.zeros((len(THRESHOLDS), len(RECALLS)))
    if len(right) == 0:
        return read_off
    precision = right / (wrong + right + np.spacing(1))
    precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    recall = right / number
    for threshold, row in enumerate(read_off):
        places = np.searchsorted(recall[:, threshold], RECALLS, side="left")
        reached = places < len(recall)
        row[reached] = precision[places[reached], threshold]
    return read_off


def _mean_of_known(values: np.ndarray) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else float("nan")
