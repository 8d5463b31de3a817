"""Panoptic quality over a whole dataset (Kirillov et al., arXiv 1801.00868, section 4).

A predicted and a reference segment of one class match if their IoU exceeds 0.5; no segment can match two. For each
class, with TP matches, FP predicted and FN reference segments left over,

    SQ = sum of the matches' IoU / TP,    RQ = TP / (TP + FP/2 + FN/2),    PQ = SQ * RQ,

and the means are over classes with TP + FP + FN > 0. Void and crowd follow COCO's evaluation (panopticapi): void pixels
of the reference belong to no union; a crowd segment matches nothing and is not a false negative; an unmatched predicted
segment with more than half of its pixels on void and on the crowd of its own class is not a false positive. If an image
has several crowd segments of one class, the last one listed is that crowd.

The IoUs of the matches are kept and added up exactly (`math.fsum`), so scores do not depend on the order of images.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ita_segmentation.evaluation.metrics.base import ArrayStateMetric, as_integers, class_flags, class_groups

Segments = Sequence[Mapping[str, Any]]


class PanopticQuality(ArrayStateMetric):
    """Matches, false positives and false negatives of each class, and the scores that follow from them.

    Args:
        num_classes: K, at least 1.
        is_thing: (K,) whether each class is a thing; None if that is not known.
        **kwargs: as for `torchmetrics.Metric`.
    """

    matched_classes: list[Tensor]
    matched_ious: list[Tensor]
    false_positives: Tensor
    false_negatives: Tensor

    def __init__(self, num_classes: int, is_thing: Sequence[bool] | None = None, **kwargs: Any) -> None:
        super().__init__(num_classes, **kwargs)
        self.is_thing = None if is_thing is None else class_flags(is_thing, num_classes, "is_thing")
        self.add_rows("matched_classes", torch.int64)
        self.add_rows("matched_ious", torch.float64)
        self.add_sum("false_positives", num_classes)
        self.add_sum("false_negatives", num_classes)

    def update(
        self,
        prediction_map: Any,
        prediction_segments: Segments,
        reference_map: Any,
        reference_segments: Segments,
    ) -> None:
        """Count the segments of one image.

        Args:
            prediction_map: (H, W) integer segment ids, 0 where there is none; array or tensor.
            prediction_segments: {"id", "label_id": class index} for each id of the map, in any order.
            reference_map: (H, W) integer segment ids, 0 is void.
            reference_segments: {"id", "category_id": class index, "iscrowd" (optional)} for each id of the map. One
                without a pixel is a false negative.

        Raises:
            ValueError: the maps and segments do not fit each other; nothing is counted then.
        """
        prediction = as_integers(prediction_map, "prediction")
        reference = as_integers(reference_map, "reference")
        if prediction.shape != reference.shape:
            raise ValueError(f"prediction has shape {prediction.shape}, reference {reference.shape}")
        prediction_ids = _segment_ids(prediction_segments, "prediction")
        reference_ids = _segment_ids(reference_segments, "reference")
        prediction_classes = self._classes(prediction_segments, "label_id", "prediction")
        reference_classes = self._classes(reference_segments, "category_id", "reference")
        crowd = np.array([bool(segment.get("iscrowd", False)) for segment in reference_segments], dtype=bool)
        overlaps = _overlaps(prediction, prediction_ids, reference, reference_ids)
        empty = overlaps[:, 1:].sum(axis=0) == 0
        if empty.any():
            raise ValueError(f"prediction has no pixel of segment {prediction_ids[empty][0]}")

        rows, columns, ious = _matches(overlaps, prediction_classes, reference_classes, crowd)
        unmatched, missed = np.ones(len(prediction_ids), dtype=bool), ~crowd
        unmatched[columns], missed[rows] = False, False
        unmatched &= ~_mostly_ignored(overlaps, prediction_classes, reference_classes, crowd)
        self.append_rows("matched_classes", reference_classes[rows])
        self.append_rows("matched_ious", ious)
        self.false_positives = self.false_positives + self._count(prediction_classes[unmatched])
        self.false_negatives = self.false_negatives + self._count(reference_classes[missed])

    def compute(self, seen: Sequence[bool] | None = None) -> dict[str, Any]:
        """Return all scores in [0, 1], NaN where no segment decides one.

        `pq`, `sq`, `rq`: means over the classes that have a segment; `num_classes_counted`, how many these are; the
        same over things and stuff if these are known (`pq_things`, ..., `num_stuff_counted`), and with `seen` (K,),
        whether masks of each class were in training, over seen and unseen classes; `per_class_pq`, `per_class_sq`,
        `per_class_rq`: (K,) float64.
        """
        groups = {"": np.ones(self.num_classes, dtype=bool)}
        if self.is_thing is not None:
            groups |= {"things": self.is_thing, "stuff": ~self.is_thing}
        groups |= class_groups(seen, self.num_classes)
        quality = self._per_class()
        counted = ~np.isnan(quality["pq"])
        scores: dict[str, Any] = {}
        for group, members in groups.items():
            for name, values in quality.items():
                scores[f"{name}_{group}" if group else name] = _mean(values[members & counted])
            scores[f"num_{group or 'classes'}_counted"] = int((members & counted).sum())
        return scores | {f"per_class_{name}": values for name, values in quality.items()}

    def _per_class(self) -> dict[str, np.ndarray]:
        state = self.arrays()
        classes, ious = state["matched_classes"], state["matched_ious"]
        order = np.argsort(classes, kind="stable")
        true_positives = np.bincount(classes, minlength=self.num_classes)
        parts = np.split(ious[order], np.cumsum(true_positives)[:-1])
        iou = np.array([math.fsum(part) for part in parts])
        segments = true_positives + 0.5 * state["false_positives"] + 0.5 * state["false_negatives"]
        zero = np.where(segments > 0, 0.0, np.nan)
        return {
            "pq": np.divide(iou, segments, out=zero.copy(), where=segments > 0),
            "sq": np.divide(iou, true_positives, out=zero.copy(), where=true_positives > 0),
            "rq": np.divide(true_positives, segments, out=zero.copy(), where=segments > 0),
        }

    def _count(self, classes: np.ndarray) -> Tensor:
        return torch.from_numpy(np.bincount(classes, minlength=self.num_classes)).to(self.device)

    def _classes(self, segments: Segments, key: str, role: str) -> np.ndarray:
        for segment in segments:
            if key not in segment:
                raise ValueError(f"{role} segment {segment['id']} has no {key}")
            if not 0 <= segment[key] < self.num_classes:
                raise ValueError(
                    f"{role} segment {segment['id']} is of class {segment[key]}, outside the "
                    f"{self.num_classes} classes 0..{self.num_classes - 1}"
                )
        return np.array([int(segment[key]) for segment in segments], dtype=np.int64)


def _segment_ids(segments: Segments, role: str) -> np.ndarray:
    """Return the (n,) int64 ids of segments; none is 0 and each comes once."""
    if not all("id" in segment for segment in segments):
        raise ValueError(f"{role} has a segment without an id")
    ids = np.array([int(segment["id"]) for segment in segments], dtype=np.int64)
    values, counts = np.unique(ids, return_counts=True)
    if 0 in values:
        raise ValueError(f"{role} has a segment with id 0, which means no segment")
    if (counts > 1).any():
        raise ValueError(f"{role} has several segments with id {values[counts > 1][0]}")
    return ids


def _overlaps(
    prediction: np.ndarray, prediction_ids: np.ndarray, reference: np.ndarray, reference_ids: np.ndarray
) -> np.ndarray:
    """Count the pixels of each pair of segments: (G + 1, P + 1) int64, rows are references, index 0 is id 0."""
    columns = _indices(prediction.reshape(-1), prediction_ids, "prediction")
    rows = _indices(reference.reshape(-1), reference_ids, "reference")
    shape = len(reference_ids) + 1, len(prediction_ids) + 1
    return np.bincount(rows * shape[1] + columns, minlength=shape[0] * shape[1]).reshape(shape)


def _indices(values: np.ndarray, ids: np.ndarray, role: str) -> np.ndarray:
    """Return for each value 1 + its index in `ids`, or 0 for the value 0."""
    known = np.append(0, ids)
    order = np.argsort(known)
    indices = order[np.searchsorted(known[order], values).clip(max=len(ids))]
    unknown = known[indices] != values
    if unknown.any():
        raise ValueError(f"{role} has pixels of id {values[unknown][0]}, which is none of its segments")
    return indices


def _matches(
    overlaps: np.ndarray, prediction_classes: np.ndarray, reference_classes: np.ndarray, crowd: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return reference index, predicted index and IoU of each match, from (G + 1, P + 1) overlaps."""
    shared, on_void = overlaps[1:, 1:], overlaps[0, 1:]
    union = overlaps[:, 1:].sum(axis=0) + overlaps[1:].sum(axis=1)[:, None] - shared - on_void
    may_match = (reference_classes[:, None] == prediction_classes) & ~crowd[:, None] & (shared > 0)
    iou = np.divide(shared, union, out=np.zeros(shared.shape), where=may_match)
    rows, columns = np.nonzero(iou > 0.5)
    return rows, columns, iou[rows, columns]


def _mostly_ignored(
    overlaps: np.ndarray, prediction_classes: np.ndarray, reference_classes: np.ndarray, crowd: np.ndarray
) -> np.ndarray:
    """Return (P,) bool: predicted segments with more than half of their pixels on void and their class's crowd."""
    ignored = overlaps[0, 1:].copy()
    crowd_of_class = {reference_classes[row]: row + 1 for row in np.flatnonzero(crowd)}
    for column, label in enumerate(prediction_classes):
        if label in crowd_of_class:
            ignored[column] += overlaps[crowd_of_class[label], 1 + column]
    return 2 * ignored > overlaps[:, 1:].sum(axis=0)


def _mean(values: np.ndarray) -> float:
    """Return the mean, added up one by one as panopticapi does; NaN of none."""
    return float(np.cumsum(values)[-1] / len(values)) if len(values) else float("nan")
