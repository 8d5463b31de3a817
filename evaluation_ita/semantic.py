"""Mean intersection over union from one confusion matrix over a whole data set.

The score of the field (Everingham et al., PASCAL VOC 2010, section 4.3; Long et al., arXiv 1411.4038, section 5):
pixels of all images are counted into one K x K matrix, and every score is read off that matrix at the end. The
matrix is a sum, so images may come in any order, batches of any size, and several processes add theirs up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class ConfusionMatrix:
    """Pixel counts of (reference class, predicted class), and the scores that follow from them.

    Attributes:
        matrix: (K, K) int64; row = reference class, column = predicted class, entry = number of pixels.

    Args:
        num_classes: K, at least 1.
        ignore_index: the reference label of pixels that are left out; not a class index.

    Raises:
        ValueError: if `num_classes` is below 1 or `ignore_index` is one of the classes.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255):
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if 0 <= ignore_index < num_classes:
            raise ValueError(f"ignore_index {ignore_index} is the index of a class (there are {num_classes})")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.matrix = np.zeros((num_classes, num_classes), dtype=np.int64)

    def update(self, prediction: Any, reference: Any) -> None:
        """Counts the pixels of one image, or of a batch.

        Args:
            prediction: class indices, any integer dtype and shape (array or tensor, on any device); what it says
                on ignored pixels does not matter.
            reference: class indices or `ignore_index`, same shape.

        Raises:
            ValueError: if shapes differ, a dtype is not integer, or a label on a counted pixel is not in
                [0, num_classes). Nothing is counted then.
        """
        predicted, referred = _integers(prediction, "prediction"), _integers(reference, "reference")
        if predicted.shape != referred.shape:
            raise ValueError(f"prediction has shape {predicted.shape}, reference {referred.shape}")
        counted = referred != self.ignore_index
        predicted, referred = predicted[counted].astype(np.int64), referred[counted].astype(np.int64)
        self._check_range(predicted, "prediction")
        self._check_range(referred, "reference")
        pairs = referred * self.num_classes + predicted
        self.matrix += np.bincount(pairs, minlength=self.num_classes**2).reshape(self.matrix.shape)

    def _check_range(self, labels: np.ndarray, role: str) -> None:
        if labels.size and not (labels.min() >= 0 and labels.max() < self.num_classes):
            worst = int(labels.min()) if labels.min() < 0 else int(labels.max())
            raise ValueError(
                f"{role} holds label {worst}, outside the {self.num_classes} classes 0..{self.num_classes - 1} "
                f"(ignore_index is {self.ignore_index})"
            )

    def __add__(self, other: ConfusionMatrix) -> ConfusionMatrix:
        if (self.num_classes, self.ignore_index) != (other.num_classes, other.ignore_index):
            raise ValueError("confusion matrices of different classes or ignore indices do not add up")
        total = ConfusionMatrix(self.num_classes, self.ignore_index)
        total.matrix = self.matrix + other.matrix
        return total

    def compute(self, seen: Sequence[bool] | None = None) -> dict[str, Any]:
        """All scores, each in [0, 1]; nan where no pixel speaks for one.

        Classes with neither ground truth nor prediction are left out of the means of IoU; classes without ground
        truth are left out of the mean accuracy.

        Args:
            seen: (K,) whether each class's masks were seen in training; adds the means over both groups.

        Returns:
            `miou`, `fwiou` (IoU weighted by each class's share of the reference pixels), `macc`, `pacc`: float;
            `per_class_iou`: (K,) float64 array, nan for classes left out; `num_classes_counted`: int; and with
            `seen`: `miou_seen`, `miou_unseen`, `num_seen_counted`, `num_unseen_counted`.

        Raises:
            ValueError: if `seen` has not one entry for each class.
        """
        hits = np.diag(self.matrix).astype(np.float64)
        referred = self.matrix.sum(axis=1).astype(np.float64)
        union = referred + self.matrix.sum(axis=0) - hits
        counted = union > 0
        iou = _ratio(hits, union)
        total = referred.sum()
        scores: dict[str, Any] = {
            "miou": _mean(iou, counted),
            "fwiou": float((referred[counted] * iou[counted]).sum() / total) if total else float("nan"),
            "macc": _mean(_ratio(hits, referred), referred > 0),
            "pacc": float(hits.sum() / total) if total else float("nan"),
            "per_class_iou": iou,
            "num_classes_counted": int(counted.sum()),
        }
        if seen is not None:
            is_seen = np.asarray(seen, dtype=bool)
            if is_seen.shape != (self.num_classes,):
                raise ValueError(f"seen has {is_seen.size} entries for {self.num_classes} classes")
            for name, group in (("seen", counted & is_seen), ("unseen", counted & ~is_seen)):
                scores[f"miou_{name}"] = _mean(iou, group)
                scores[f"num_{name}_counted"] = int(group.sum())
        return scores


def _integers(labels: Any, role: str) -> np.ndarray:
    array = np.asarray(labels.detach().cpu() if hasattr(labels, "detach") else labels)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{role} must hold integer labels, got {array.dtype}")
    return array


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Elementwise numerator / denominator, nan where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0)


def _mean(values: np.ndarray, chosen: np.ndarray) -> float:
    return float(values[chosen].mean()) if chosen.any() else float("nan")
