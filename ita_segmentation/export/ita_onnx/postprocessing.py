"""Outputs of the network -> semantic maps, panoptic segments and instances, by the rules of the image processor.

Symbols: Q queries, K classes, (h, w) a mask's size, (H, W) the result's size, p_q(c) the probability of class c for
query q, m_q(x) the mask probability of query q at pixel x.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

IGNORE_INDEX = 255
"""Label of pixels that show none of the classes."""
MAX_INSTANCES = 100
MASK_STRIDE = 4
"""A mask logit covers 4 x 4 pixels of the network's input."""
TILE_BYTES = 8 * 2**20

Segments = list[dict[str, Any]]


@dataclass(frozen=True)
class OnnxOutputs:
    """The network's outputs for one image.

    Attributes:
        class_logits: (Q, K + 1) float32, log-probabilities, void last.
        mask_logits: (Q, h, w) float32.
        image_size: height and width of the image in the network's input.
        target_size: height and width of the results.
        vocabulary: the K classes, each a list of names.
        stuff_ids: classes that are stuff.
        dominant_categories: the names nearest to the image, nearest first.
    """

    class_logits: np.ndarray
    mask_logits: np.ndarray
    image_size: tuple[int, int]
    target_size: tuple[int, int]
    vocabulary: list[list[str]]
    stuff_ids: frozenset[int] = frozenset()
    dominant_categories: tuple[str, ...] = ()

    @property
    def probabilities(self) -> np.ndarray:
        """(Q, K + 1) float32."""
        exponentials = np.exp(self.class_logits - self.class_logits.max(axis=-1, keepdims=True))
        return exponentials / exponentials.sum(axis=-1, keepdims=True)


def semantic_map(
    outputs: OnnxOutputs,
    threshold: float | None = None,
    num_classes: int | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> np.ndarray:
    """Give each pixel the class of the highest sum over q of p_q(c) m_q(x).

    Args:
        outputs: of the network.
        threshold: pixels whose best class has a probability 1 - prod over q of (1 - p_q(c) m_q(x)) below it get
            `ignore_index`; None: every pixel gets a class.
        num_classes: classes from this index on are distractors, whose pixels get `ignore_index`.
        ignore_index: label of pixels without a class.

    Returns:
        (H, W) int64.

    Raises:
        ValueError: `threshold` is not from 0 to 1, or `ignore_index` is one of the classes.
    """
    _check_fractions(threshold=threshold)
    probabilities = outputs.probabilities[:, :-1]
    total = probabilities.shape[1]
    num_classes = total if num_classes is None else num_classes
    if (threshold is not None or num_classes < total) and 0 <= ignore_index < num_classes:
        raise ValueError(
            f"ignore_index {ignore_index} is one of {num_classes} classes: choose another, such as -1"
        )
    labels = np.empty(outputs.target_size, np.int64)
    for rows, logits in _tiles(outputs, sum(probabilities.shape)):
        masks = sigmoid(logits).reshape(-1, len(probabilities))
        best = (masks @ probabilities).argmax(axis=1)
        if threshold is not None:
            shown = 1 - (1 - masks * probabilities.T[best]).prod(axis=1)
            best[shown < threshold] = ignore_index
        best[best >= num_classes] = ignore_index
        labels[rows] = best.reshape(-1, labels.shape[1])
    return labels


def panoptic_segments(
    outputs: OnnxOutputs,
    threshold: float = 0.8,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    stuff_ids: Collection[int] | None = None,
    num_classes: int | None = None,
) -> dict[str, Any]:
    """Find segments that do not overlap; see `modeling_ita.postprocessing.panoptic_segments`.

    Args:
        outputs: of the network.
        threshold: segments have a score above it.
        mask_threshold: a query's own pixels have at least this mask probability.
        overlap_mask_area_threshold: lowest share of its own pixels that a segment has to win.
        stuff_ids: classes whose segments are fused; None for those of the outputs.
        num_classes: classes from this index on are distractors, whose segments are dropped.

    Returns:
        `segmentation` (H, W) int32, 0 being no segment, and `segments_info`: "id", "label_id", "was_fused", "score"
        and "label" of each.

    Raises:
        ValueError: a threshold is not from 0 to 1.
    """
    _check_fractions(threshold=threshold, mask_threshold=mask_threshold, overlap=overlap_mask_area_threshold)
    stuff_ids = outputs.stuff_ids if stuff_ids is None else stuff_ids
    probabilities = outputs.probabilities
    void = probabilities.shape[1] - 1
    num_classes = void if num_classes is None else num_classes
    labels, scores = probabilities.argmax(axis=1), probabilities.max(axis=1)
    kept = (labels != void) & (scores > threshold)
    labels, scores, count = labels[kept], scores[kept], int(kept.sum())
    if not count:
        return {"segmentation": np.zeros(outputs.target_size, np.int32), "segments_info": []}
    winner = np.empty(outputs.target_size, np.int64)
    owned = np.empty(outputs.target_size, bool)
    own_areas = np.zeros(count, np.int64)
    for rows, logits in _tiles(outputs, 2 * count, kept):
        masks = sigmoid(logits)
        own_areas += (masks >= mask_threshold).sum(axis=(0, 1))
        winner[rows] = (masks * scores).argmax(axis=-1)
        owned[rows] = np.take_along_axis(masks, winner[rows][..., None], -1)[..., 0] >= mask_threshold
    won_areas = np.bincount(winner.ravel(), minlength=count)
    segment_areas = np.bincount(winner[owned], minlength=count)
    segments: Segments = []
    fused: dict[int, dict[str, Any]] = {}
    ids = np.zeros(count, np.int32)
    for query in range(count):
        label, own, won = int(labels[query]), own_areas[query], won_areas[query]
        if label >= num_classes or 0 in (own, won, segment_areas[query]):
            continue
        if won / own < overlap_mask_area_threshold:
            continue
        if label in fused:
            segment = fused[label]
            segment["score"] = max(segment["score"], round(float(scores[query]), 6))
        else:
            segment = _segment(outputs, len(segments) + 1, label, scores[query], label in stuff_ids)
            segments.append(segment)
            if segment["was_fused"]:
                fused[label] = segment
        ids[query] = segment["id"]
    return {"segmentation": ids[winner] * owned, "segments_info": segments}


def instance_segments(
    outputs: OnnxOutputs,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    stuff_ids: Collection[int] | None = None,
    num_classes: int | None = None,
    return_binary_maps: bool = False,
) -> dict[str, Any]:
    """Find instances of things, best first; see `modeling_ita.postprocessing.instance_segments`.

    Args:
        outputs: of the network.
        threshold: lowest score of an instance.
        mask_threshold: an instance's pixels have a mask probability above it.
        stuff_ids: classes without instances; None for those of the outputs.
        num_classes: classes from this index on are distractors, whose instances are left out.
        return_binary_maps: give a mask for each instance, (n, H, W) bool.

    Returns:
        As `panoptic_segments`; the better of two instances hides the other.

    Raises:
        ValueError: a threshold is not from 0 to 1.
    """
    _check_fractions(threshold=threshold, mask_threshold=mask_threshold)
    stuff_ids = outputs.stuff_ids if stuff_ids is None else stuff_ids
    probabilities = outputs.probabilities[:, :-1]
    total = probabilities.shape[1]
    flat = probabilities.ravel()
    pairs = np.argsort(-flat, kind="stable")[:MAX_INSTANCES]
    most = total if num_classes is None else num_classes
    pairs = pairs[[label not in stuff_ids and label < most for label in (pairs % total).tolist()]]
    pairs = pairs[flat[pairs] > 0]
    queries, place = np.unique(pairs // total, return_inverse=True)
    cut = math.log(mask_threshold / (1 - mask_threshold)) if 0 < mask_threshold < 1 else math.inf
    cut = -math.inf if mask_threshold <= 0 else cut
    areas, sums = np.zeros(len(queries), np.int64), np.zeros(len(queries), np.float32)
    for _, logits in _tiles(outputs, 2 * len(queries), queries):
        inside = logits > cut
        areas += inside.sum(axis=(0, 1))
        sums += (sigmoid(logits) * inside).sum(axis=(0, 1))
    scores = flat[pairs] * (sums / np.maximum(areas, 1))[place]
    order = np.argsort(-scores, kind="stable")
    order = order[(areas[place] > 0)[order] & (scores >= threshold)[order]]
    segments = [
        _segment(outputs, number, int(pairs[one] % total), scores[one])
        for number, one in enumerate(order, start=1)
    ]
    shape = (len(order), *outputs.target_size) if return_binary_maps else outputs.target_size
    segmentation = np.zeros(shape, bool if return_binary_maps else np.int32)
    for rows, logits in _tiles(outputs, len(queries) + 2 * len(order), queries):
        inside = logits > cut
        for number in range(len(order), 0, -1):  # the best is drawn last
            mask = inside[..., place[order[number - 1]]]
            if return_binary_maps:
                segmentation[number - 1, rows] = mask
            else:
                segmentation[rows][mask] = number
    return {"segmentation": segmentation, "segments_info": segments}


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Turn logits into probabilities."""
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-logits))


def _segment(
    outputs: OnnxOutputs, number: int, label: int, score: Any, fused: bool = False
) -> dict[str, Any]:
    name = outputs.vocabulary[label][0]
    return {
        "id": number,
        "label_id": label,
        "was_fused": fused,
        "score": round(float(score), 6),
        "label": name,
    }


def _check_fractions(**values: float | None) -> None:
    for name, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 <= value <= 1):
            raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}")


def _tiles(
    outputs: OnnxOutputs, values_per_pixel: int, queries: Any = slice(None)
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield tiles of rows of the result and the mask logits there, (rows, W, Q)."""
    sides = [math.ceil(side / 32) * 32 // MASK_STRIDE for side in outputs.image_size]
    cells = np.ascontiguousarray(outputs.mask_logits[queries, : sides[0], : sides[1]].transpose(1, 2, 0))
    down, across = (
        _mask_weights(cells.shape[axis], outputs.image_size[axis], outputs.target_size[axis])
        for axis in (0, 1)
    )
    height, width = outputs.target_size
    step = max(1, TILE_BYTES // (4 * width * max(1, values_per_pixel)))
    for start in range(0, height, step):
        tile = slice(start, min(start + step, height))
        yield tile, _interpolate(_interpolate(cells, down[0][tile], down[1][tile]), *across, axis=1)


def _mask_weights(cells: int, image: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """First cell (target,) and weights (target, n) of masks that are resized to the input, cropped, and resized."""
    weights = _bilinear(image, target) @ _bilinear(cells, cells * MASK_STRIDE)[:image]
    first = (weights != 0).argmax(axis=1)
    count = int(((weights != 0).cumsum(axis=1).argmax(axis=1) - first).max()) + 1
    places = np.minimum(first[:, None] + np.arange(count), cells - 1)
    taken = np.take_along_axis(weights, places, axis=1)
    taken[first[:, None] + np.arange(count) >= cells] = 0
    return first, taken.astype(np.float32)


def _bilinear(old: int, new: int) -> np.ndarray:
    """Weights (new, old) of bilinear resizing with aligned edges."""
    if old == new:
        return np.eye(old)
    place = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0)
    lower = np.minimum(place.astype(np.int64), old - 1)
    upper, share = np.minimum(lower + 1, old - 1), place - lower
    weights = np.zeros((new, old))
    np.add.at(weights, (np.arange(new), lower), 1 - share)
    np.add.at(weights, (np.arange(new), upper), share)
    return weights


def _interpolate(values: np.ndarray, first: np.ndarray, weights: np.ndarray, axis: int = 0) -> np.ndarray:
    last = values.shape[axis] - 1
    shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
    steps = range(weights.shape[1])
    parts = (
        values.take(np.minimum(first + step, last), axis=axis) * weights[:, step].reshape(shape)
        for step in steps
    )
    total = next(parts)
    for part in parts:
        total += part
    return total
