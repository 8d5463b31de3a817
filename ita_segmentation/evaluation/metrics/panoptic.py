"""Panoptic quality: how well segments are found, over a whole data set (Kirillov et al., arXiv 1801.00868, section 4).

A predicted and a reference segment of one class match if their IoU exceeds 0.5; no segment can match two. For each
class, with TP matched pairs, FP predicted and FN reference segments left over,

    SQ = sum of the matches' IoU / TP,    RQ = TP / (TP + FP/2 + FN/2),    PQ = SQ * RQ,

and the means are over classes with TP + FP + FN > 0. The rules for what is not labelled are those of COCO's
evaluation (panopticapi): void pixels of the reference belong to no union; a crowd segment matches nothing and is not
missed; a predicted segment that is left over and has more than half its pixels on void and on the crowd of its own
class is not counted. If an image has several crowd segments of one class, the last one listed is that crowd.

The state is a sum of integers for each class. An IoU above 0.5 is a float64 that is a multiple of 2^-53, so IoUs are
added up as whole multiples of it: the sum is exact, and the same whatever the order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ita_segmentation.evaluation.metrics.label_maps import as_integers, checked_state, class_flags, run_ends

SUMS = ("true_positives", "false_positives", "false_negatives", "iou_high", "iou_low")
IOU_UNIT_BITS = 53  # an IoU in (0.5, 1] is a multiple of 2^-53
LOW_BITS = 27  # such a multiple is high * 2^27 + low; 2^36 of either add up without overflow


class PanopticQuality:
    """Matches, misses and false alarms of each class, and the scores that follow from them.

    Attributes:
        sums: (5, K) int64, one row for each of `SUMS`: numbers of segments, and the summed IoU of the matches in
            units of 2^-53, as `iou_high` * 2^27 + `iou_low`.

    Args:
        num_classes: K, at least 1.
        is_thing: (K,) whether each class is a thing; None if that is not known.

    Raises:
        ValueError: if `num_classes` is below 1 or `is_thing` has not one entry for each class.
    """

    def __init__(self, num_classes: int, is_thing: Sequence[bool] | None = None):
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes
        self.is_thing = None if is_thing is None else class_flags(is_thing, num_classes, "is_thing")
        self.sums = np.zeros((len(SUMS), num_classes), dtype=np.int64)

    def update(
        self,
        prediction_map: Any,
        prediction_segments: Sequence[Mapping[str, Any]],
        reference_map: Any,
        reference_segments: Sequence[Mapping[str, Any]],
    ) -> None:
        """Counts the segments of one image.

        Args:
            prediction_map: (H, W) integer segment ids, 0 where there is none; array or tensor.
            prediction_segments: for each id of the map, {"id", "label_id": class index}; more keys do not matter,
                and neither does the order.
            reference_map: (H, W) integer segment ids, 0 = void.
            reference_segments: for each id of the map, {"id", "category_id": class index}, and "iscrowd" if it may
                be a crowd. One that has no pixel is a missed segment.

        Raises:
            ValueError: if shapes differ, an id of a map is in no segment, a segment's id is 0 or comes twice, a
                predicted segment has no pixel, or a class index is not in [0, num_classes). Nothing is counted
                then.
        """
        self.accumulate(self.measure(prediction_map, prediction_segments, reference_map, reference_segments))

    def measure(
        self,
        prediction_map: Any,
        prediction_segments: Sequence[Mapping[str, Any]],
        reference_map: Any,
        reference_segments: Sequence[Mapping[str, Any]],
    ) -> np.ndarray:
        """What `update` would add to `sums`, (5, K) int64: arguments and errors as there."""
        predicted, referred = (
            as_integers(prediction_map, "prediction"),
            as_integers(reference_map, "reference"),
        )
        if predicted.shape != referred.shape:
            raise ValueError(f"prediction has shape {predicted.shape}, reference {referred.shape}")
        predicted_ids = _segment_ids(prediction_segments, "prediction")
        referred_ids = _segment_ids(reference_segments, "reference")
        predicted_classes = self._classes(prediction_segments, "label_id", "prediction")
        referred_classes = self._classes(reference_segments, "category_id", "reference")
        crowd = np.array([bool(segment.get("iscrowd", False)) for segment in reference_segments], dtype=bool)
        overlaps = _overlaps(predicted, predicted_ids, referred, referred_ids)
        empty = overlaps[:, 1:].sum(axis=0) == 0
        if empty.any():
            raise ValueError(f"prediction has no pixel of segment {predicted_ids[empty][0]}")
        return _matches(overlaps, predicted_classes, referred_classes, crowd, self.num_classes)

    def accumulate(self, measured: np.ndarray) -> None:
        """Adds what `measure` found."""
        self.sums = self.sums + measured

    def _classes(self, segments: Sequence[Mapping[str, Any]], key: str, role: str) -> np.ndarray:
        for segment in segments:
            if key not in segment:
                raise ValueError(f"{role} segment {segment['id']} has no {key}")
            if not 0 <= segment[key] < self.num_classes:
                raise ValueError(
                    f"{role} segment {segment['id']} is of class {segment[key]}, outside the "
                    f"{self.num_classes} classes 0..{self.num_classes - 1}"
                )
        return np.array([int(segment[key]) for segment in segments], dtype=np.int64)

    def state_dict(self) -> dict[str, np.ndarray]:
        """(K,) int64 for each name of `SUMS`; the states of several processes add up entry by entry."""
        return dict(zip(SUMS, self.sums.copy(), strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave.

        Raises:
            ValueError: if it is of another number of classes, or no such state.
        """
        arrays = checked_state(state, dict.fromkeys(SUMS, (self.num_classes,)))
        self.sums = np.stack([arrays[name].astype(np.int64) for name in SUMS])

    def __add__(self, other: PanopticQuality) -> PanopticQuality:
        if self.num_classes != other.num_classes or _flags(self) != _flags(other):
            raise ValueError("panoptic qualities of different classes do not add up")
        total = PanopticQuality(self.num_classes, _flags(self))
        total.sums = self.sums + other.sums
        return total

    def compute(self, seen: Sequence[bool] | None = None) -> dict[str, Any]:
        """All scores, each in [0, 1]; nan where no segment speaks for one.

        Args:
            seen: (K,) whether each class's masks were seen in training; adds the means over both groups.

        Returns:
            `pq`, `sq`, `rq`: float, means over the classes that have a segment to be counted;
            `num_classes_counted`: how many these are; the same over things and stuff if these are known
            (`pq_things`, ..., `num_things_counted`, `pq_stuff`, ...) and with `seen` over seen and unseen classes
            (`pq_seen`, ..., `num_unseen_counted`); `per_class_pq`, `per_class_sq`, `per_class_rq`: (K,) float64,
            nan for classes that are not counted.

        Raises:
            ValueError: if `seen` has not one entry for each class.
        """
        groups = {"": np.ones(self.num_classes, dtype=bool)}
        if self.is_thing is not None:
            groups |= {"things": self.is_thing, "stuff": ~self.is_thing}
        if seen is not None:
            is_seen = class_flags(seen, self.num_classes, "seen")
            groups |= {"seen": is_seen, "unseen": ~is_seen}
        quality = self.per_class()
        counted = ~np.isnan(quality["pq"])
        scores: dict[str, Any] = {}
        for group, members in groups.items():
            chosen = members & counted
            for name, values in quality.items():
                key = f"{name}_{group}" if group else name
                scores[key] = _mean(values[chosen])
            scores[f"num_{group or 'classes'}_counted"] = int(chosen.sum())
        return scores | {f"per_class_{name}": values for name, values in quality.items()}

    def per_class(self) -> dict[str, np.ndarray]:
        """`pq`, `sq` and `rq` of each class, (K,) float64; nan where a class has no segment to be counted.

        The mean over any subset of classes is the mean of those of its entries that are not nan.
        """
        hits, false_alarms, misses, high, low = self.sums
        unit = 1 << IOU_UNIT_BITS
        units = ((int(upper) << LOW_BITS) + int(lower) for upper, lower in zip(high, low, strict=True))
        iou = np.array([total / unit for total in units])  # of whole numbers: rounded once
        segments = hits + 0.5 * false_alarms + 0.5 * misses
        nothing = np.where(segments > 0, 0.0, np.nan)
        return {
            "pq": np.divide(iou, segments, out=nothing.copy(), where=segments > 0),
            "sq": np.divide(iou, hits, out=nothing.copy(), where=hits > 0),
            "rq": np.divide(hits, segments, out=nothing.copy(), where=segments > 0),
        }


def _mean(values: np.ndarray) -> float:
    """The mean of some classes' values, added one after the other as panopticapi does; nan of none."""
    return float(np.cumsum(values)[-1] / len(values)) if len(values) else float("nan")


def _flags(quality: PanopticQuality) -> list[bool] | None:
    return None if quality.is_thing is None else quality.is_thing.tolist()


def _segment_ids(segments: Sequence[Mapping[str, Any]], role: str) -> np.ndarray:
    """(n,) int64 ids of segments; they are not 0 and each comes once."""
    if not all("id" in segment for segment in segments):
        raise ValueError(f"{role} has a segment without an id")
    ids = np.array([int(segment["id"]) for segment in segments], dtype=np.int64)
    values, counts = np.unique(ids, return_counts=True)
    if 0 in values:
        raise ValueError(f"{role} has a segment with id 0, which is no segment")
    if (counts > 1).any():
        raise ValueError(f"{role} has several segments with id {values[counts > 1][0]}")
    return ids


def _overlaps(
    predicted: np.ndarray, predicted_ids: np.ndarray, referred: np.ndarray, referred_ids: np.ndarray
) -> np.ndarray:
    """(G + 1, P + 1) int64 pixels of each reference (row) and predicted segment (column); row and column 0: id 0."""
    predicted, referred = predicted.reshape(-1), referred.reshape(-1)
    changed = (predicted[1:] != predicted[:-1]) | (referred[1:] != referred[:-1])
    ends, lengths = run_ends(changed) if predicted.size else (np.zeros(0, np.int64),) * 2
    columns = _positions(predicted[ends], predicted_ids, "prediction")
    rows = _positions(referred[ends], referred_ids, "reference")
    width = len(predicted_ids) + 1
    table = np.zeros((len(referred_ids) + 1) * width, dtype=np.int64)
    np.add.at(table, rows * width + columns, lengths)
    return table.reshape(-1, width)


def _positions(values: np.ndarray, ids: np.ndarray, role: str) -> np.ndarray:
    """For each value, 1 + its place among `ids`, or 0 for the value 0."""
    known = np.append(0, ids)
    order = np.argsort(known)
    places = order[np.searchsorted(known, values, sorter=order).clip(max=len(ids))]
    unknown = known[places] != values
    if unknown.any():
        raise ValueError(f"{role} has pixels of id {values[unknown][0]}, which is none of its segments")
    return places


def _matches(
    overlaps: np.ndarray,
    predicted_classes: np.ndarray,
    referred_classes: np.ndarray,
    crowd: np.ndarray,
    num_classes: int,
) -> np.ndarray:
    """(5, K) int64 sums of one image, from its (G + 1, P + 1) overlaps, (P,) and (G,) classes and (G,) crowd flags."""
    areas = overlaps[:, 1:].sum(axis=0)
    shared, on_void = overlaps[1:, 1:], overlaps[0, 1:]
    union = areas + overlaps[1:].sum(axis=1)[:, None] - shared - on_void
    may_match = (referred_classes[:, None] == predicted_classes) & ~crowd[:, None] & (shared > 0)
    iou = np.divide(shared, union, out=np.zeros(shared.shape), where=may_match)
    rows, columns = np.nonzero(iou > 0.5)

    missed, left_over = ~crowd, np.ones(len(areas), dtype=bool)
    missed[rows], left_over[columns] = False, False
    crowd_row = np.zeros(num_classes, dtype=np.int64)  # of `overlaps`; 0: the class has no crowd here
    for row in np.flatnonzero(crowd):
        crowd_row[referred_classes[row]] = row + 1
    row_of_crowd = crowd_row[predicted_classes]
    on_crowd = np.where(row_of_crowd > 0, overlaps[row_of_crowd, 1 + np.arange(len(areas))], 0)
    left_over &= 2 * (on_void + on_crowd) <= areas

    units = (iou[rows, columns] * (1 << IOU_UNIT_BITS)).astype(np.int64)
    sums = np.zeros((len(SUMS), num_classes), dtype=np.int64)
    matched_classes = referred_classes[rows]
    np.add.at(sums[0], matched_classes, 1)
    np.add.at(sums[1], predicted_classes[left_over], 1)
    np.add.at(sums[2], referred_classes[missed], 1)
    np.add.at(sums[3], matched_classes, units >> LOW_BITS)
    np.add.at(sums[4], matched_classes, units & ((1 << LOW_BITS) - 1))
    return sums
