"""Average precision of masks as COCO defines it (Lin et al., arXiv 1405.0312; the numbers of pycocotools' COCOeval).

In each image, the 100 best detections of each class are matched with reference masks, best score first, at ten IoU
thresholds from 0.50 to 0.95 and for four ranges of area. Over all images, detections sorted by score give a curve of
precision over recall, read off at 101 recalls. AP is the mean over thresholds, recalls and classes. All scores are
the same floats as COCOeval's.

Matching needs one image only, so masks are never kept. What stays of a detection is its class, score and rank, and
for each threshold and area range one bit that says whether it was right, and one whether it is left out: 29 bytes.
Ties of scores between images go by the order of the image ids, as in COCOeval, so that the states of several
processes, added up, give what one process would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ita_segmentation.evaluation.metrics.label_maps import as_integers, checked_state, class_flags
from ita_segmentation.evaluation.metrics.mask_matching import (
    AREA_RANGES,
    MAX_DETECTIONS,
    in_area_ranges,
    mask_overlaps,
    match_detections,
)
from ita_segmentation.evaluation.metrics.packed_masks import PackedMasks, pack_masks
from ita_segmentation.evaluation.metrics.precision_recall import (
    LARGE,
    MEDIUM,
    RECALL_SETTINGS,
    SMALL,
    Detections,
    curves,
)

NUM_RANGES = len(AREA_RANGES)
DETECTION = np.dtype(
    [
        ("labels", np.int32),
        ("scores", np.float64),
        ("ranks", np.uint8),  # among the detections of its class in its image, best first
        ("right", np.uint16, NUM_RANGES),  # bit t: right at threshold t
        ("left_out", np.uint16, NUM_RANGES),  # bit t: neither right nor wrong at threshold t
    ]
)


class MaskAveragePrecision:
    """Matched detections of many images, and the scores that follow from them.

    Attributes:
        detections: image id -> (n,) array of `DETECTION`, best first; of every image that was counted.
        num_references: (K, 4) int64, references that count, of each class in each area range.

    Args:
        num_classes: K, at least 1.

    Raises:
        ValueError: if `num_classes` is below 1.
    """

    def __init__(self, num_classes: int):
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes
        self.detections: dict[int | str, np.ndarray] = {}
        self.num_references = np.zeros((num_classes, NUM_RANGES), dtype=np.int64)

    def update(
        self,
        image_id: int | str,
        scores: Any,
        labels: Any,
        masks: Any,
        reference_labels: Any,
        reference_masks: Any,
        reference_crowd: Any = None,
        reference_areas: Any = None,
    ) -> None:
        """Counts the detections of one image.

        Args:
            image_id: integers for all images, or strings for all.
            scores: (n,) finite floats, in any order.
            labels: (n,) class indices.
            masks: (n, H, W) bool array or tensor, or a list of (H, W) ones or of COCO run-length encodings.
            reference_labels: (m,) class indices.
            reference_masks: m masks, as `masks`.
            reference_crowd: (m,) whether each is a crowd; None: none is.
            reference_areas: (m,) areas that decide about the area range; None: the masks' pixels.

        Raises:
            ValueError: if the image was counted before, its id is of the other kind, numbers or sizes do not fit
                each other, a score is not finite, or a class index is not in [0, num_classes). Nothing is counted
                then.
        """
        self.accumulate(
            self.measure(
                image_id,
                scores,
                labels,
                masks,
                reference_labels,
                reference_masks,
                reference_crowd,
                reference_areas,
            )
        )

    def measure(
        self,
        image_id: int | str,
        scores: Any,
        labels: Any,
        masks: Any,
        reference_labels: Any,
        reference_masks: Any,
        reference_crowd: Any = None,
        reference_areas: Any = None,
    ) -> tuple[int | str, np.ndarray, np.ndarray]:
        """What `update` would add, arguments and errors as there.

        Returns:
            the image id, (n,) array of `DETECTION`, and what to add to `num_references`.
        """
        image_id = self._new_image_id(image_id)
        found = pack_masks(masks, "prediction")
        referred = pack_masks(reference_masks, "reference")
        if len(found) and len(referred) and found.size != referred.size:
            raise ValueError(f"prediction masks have size {found.size}, reference masks {referred.size}")
        score = _scores(scores, len(found))
        label = self._labels(labels, len(found), "prediction")
        reference_label = self._labels(reference_labels, len(referred), "reference")
        crowd = _per_mask(reference_crowd, len(referred), "reference_crowd", False).astype(bool)
        areas = _per_mask(reference_areas, len(referred), "reference_areas", referred.areas())
        counts = in_area_ranges(areas) & ~crowd

        order = np.argsort(-score, kind="stable")
        rank = _ranks(label[order])
        order, rank = order[rank < MAX_DETECTIONS], rank[rank < MAX_DETECTIONS]
        rows = np.zeros(len(order), dtype=DETECTION)
        rows["labels"], rows["scores"], rows["ranks"] = label[order], score[order], rank
        _match_classes(rows, found[order], reference_label, referred, crowd, ~counts)
        num_references = np.zeros_like(self.num_references)
        np.add.at(num_references, reference_label, counts.T.astype(np.int64))
        return image_id, rows, num_references

    def accumulate(self, measured: tuple[int | str, np.ndarray, np.ndarray]) -> None:
        """Adds what `measure` found."""
        image_id, rows, num_references = measured
        self.detections[self._new_image_id(image_id)] = rows
        self.num_references = self.num_references + num_references

    def _new_image_id(self, image_id: Any) -> int | str:
        known = str(image_id) if isinstance(image_id, str) else int(image_id)
        if known in self.detections:
            raise ValueError(f"image {known} was counted before")
        other = next(iter(self.detections), known)
        if isinstance(other, str) != isinstance(known, str):
            raise ValueError(f"image ids must all be integers or all strings, got {other!r} and {known!r}")
        return known

    def _labels(self, labels: Any, number: int, role: str) -> np.ndarray:
        array = as_integers(labels, role) if len(labels) else np.zeros(0, np.int64)
        if array.shape != (number,):
            raise ValueError(f"{role} has {number} masks and labels of shape {array.shape}")
        wrong = (array < 0) | (array >= self.num_classes)
        if wrong.any():
            raise ValueError(
                f"{role} holds label {array[wrong][0]}, outside the {self.num_classes} classes "
                f"0..{self.num_classes - 1}"
            )
        return array.astype(np.int64)

    def state_dict(self) -> dict[str, np.ndarray]:
        """The state as arrays, images in the order of their ids.

        Returns:
            `image_ids` (i,) int64 or str; `num_detections` (i,) int64; of all n detections `labels`, `scores`,
            `ranks` (n,) and `right`, `left_out` (n, 4), as in `DETECTION`; `num_references` (K, 4) int64.
        """
        image_ids = sorted(self.detections)  # type: ignore[type-var]
        rows = [self.detections[image_id] for image_id in image_ids]
        joined = np.concatenate([np.zeros(0, DETECTION), *rows])
        return {
            "image_ids": np.array(image_ids) if image_ids else np.zeros(0, np.int64),
            "num_detections": np.array([len(row) for row in rows], dtype=np.int64),
            "num_references": self.num_references.copy(),
        } | {name: np.ascontiguousarray(joined[name]) for name in DETECTION.fields or ()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave.

        Raises:
            ValueError: if it is of another number of classes, or no such state.
        """
        shapes = {name: (None, *DETECTION[name].shape) for name in DETECTION.fields or ()}
        others = {
            "image_ids": (None,),
            "num_detections": (None,),
            "num_references": self.num_references.shape,
        }
        arrays = checked_state(state, shapes | others)
        rows = np.zeros(len(arrays["labels"]), dtype=DETECTION)
        numbers = arrays["num_detections"].astype(np.int64)
        if len(numbers) != len(arrays["image_ids"]) or numbers.sum() != len(rows):
            raise ValueError("the state's numbers of detections and of images do not fit its detections")
        for name in shapes:
            rows[name] = arrays[name]
        parts = np.split(rows, np.cumsum(numbers)[:-1]) if len(numbers) else []
        self.detections = dict(zip(arrays["image_ids"].tolist(), parts, strict=True))
        self.num_references = arrays["num_references"].astype(np.int64)

    def __add__(self, other: MaskAveragePrecision) -> MaskAveragePrecision:
        if self.num_classes != other.num_classes:
            raise ValueError("average precisions of different classes do not add up")
        total = MaskAveragePrecision(self.num_classes)
        total.detections = dict(self.detections)
        total.num_references = self.num_references + other.num_references
        for image_id, rows in other.detections.items():
            total.detections[total._new_image_id(image_id)] = rows
        return total

    def compute(self, seen: Sequence[bool] | None = None) -> dict[str, Any]:
        """All scores, each in [0, 1]; nan where no reference speaks for one (COCOeval's -1).

        Args:
            seen: (K,) whether each class's masks were seen in training; adds the means over both groups.

        Returns:
            `ap`, `ap50`, `ap75`, `aps`, `apm`, `apl` (small, medium and large masks), `ar1`, `ar10`, `ar100`, `ars`,
            `arm`, `arl`: float, means over the classes that have a reference; `num_classes_counted`: how many these
            are; with `seen` also `ap_seen`, `ap_unseen`, `num_seen_counted`, `num_unseen_counted`; `per_class_ap`:
            (K,) float64, nan for classes that are not counted.

        Raises:
            ValueError: if `seen` has not one entry for each class.
        """
        state = self.state_dict()
        curve = curves(
            Detections(**{name: state[name] for name in DETECTION.fields or ()}), self.num_references
        )
        counted = self.num_references[:, 0] > 0
        scores: dict[str, Any] = {
            "ap": curve.average_precision(),
            "ap50": curve.average_precision(threshold=0.5),
            "ap75": curve.average_precision(threshold=0.75),
            "aps": curve.average_precision(SMALL),
            "apm": curve.average_precision(MEDIUM),
            "apl": curve.average_precision(LARGE),
        }
        scores |= {name: curve.average_recall(name) for name in RECALL_SETTINGS}
        scores["num_classes_counted"] = int(counted.sum())
        if seen is not None:
            is_seen = class_flags(seen, self.num_classes, "seen")
            for name, group in (("seen", is_seen), ("unseen", ~is_seen)):
                scores[f"ap_{name}"] = curve.average_precision(classes=group)
                scores[f"num_{name}_counted"] = int((counted & group).sum())
        scores["per_class_ap"] = np.array(
            [curve.average_precision(classes=np.array([label])) for label in range(self.num_classes)]
        )
        return scores


def _match_classes(
    rows: np.ndarray,
    found: PackedMasks,
    reference_label: np.ndarray,
    referred: PackedMasks,
    crowd: np.ndarray,
    left_out: np.ndarray,
) -> None:
    """Fills in `right` and `left_out` of the (n,) rows of one image, class by class.

    Args:
        found: the rows' masks.
        reference_label: (m,) int.
        referred: the references' masks.
        crowd: (m,) bool.
        left_out: (4, m) bool, references that do not count in each area range.
    """
    areas, reference_areas = found.areas(), referred.areas()
    in_range = in_area_ranges(areas)
    for label in np.unique(rows["labels"]):
        mine, theirs = np.flatnonzero(rows["labels"] == label), np.flatnonzero(reference_label == label)
        overlaps = mask_overlaps(
            found[mine].intersections(referred[theirs]), areas[mine], reference_areas[theirs], crowd[theirs]
        )
        rows["right"][mine], rows["left_out"][mine] = match_detections(
            overlaps, in_range[:, mine], left_out[:, theirs], crowd[theirs]
        )


def _scores(scores: Any, number: int) -> np.ndarray:
    array = np.asarray(scores.detach().cpu() if hasattr(scores, "detach") else scores, dtype=np.float64)
    if array.shape != (number,):
        raise ValueError(f"prediction has {number} masks and scores of shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"prediction holds the score {array[~np.isfinite(array)][0]}")
    return array


def _per_mask(values: Any, number: int, role: str, default: Any) -> np.ndarray:
    """(m,) values, or the default for each mask."""
    if values is None:
        return np.broadcast_to(default, (number,))
    array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    if array.shape != (number,):
        raise ValueError(f"{role} has shape {array.shape} for {number} reference masks")
    return array


def _ranks(labels: np.ndarray) -> np.ndarray:
    """(n,) how many earlier entries have the same label."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[order] = np.arange(len(labels)) - np.searchsorted(ordered, ordered)
    return ranks
