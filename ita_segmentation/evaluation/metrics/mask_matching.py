"""Which detections of one image and class are right, at each IoU threshold and for each range of area (COCO's rules).

Detections choose in the order of their scores. Each takes the reference that it overlaps best, among those that
reach the threshold and are not taken; only if there is none, a reference that is left out: a crowd, which is never
taken, or one outside the area range. A detection is left out if it matched a reference that is, or if it matched
none and is itself outside the area range.
"""

from __future__ import annotations

import numpy as np

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of IoU
AREA_RANGES = {"all": (0, 10**10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 10**10)}
MAX_DETECTIONS = 100  # of one class in one image


def in_area_ranges(areas: np.ndarray) -> np.ndarray:
    """(A, n) bool: whether each of (n,) areas in pixels is in each range, whose ends belong to it."""
    limits = np.array(list(AREA_RANGES.values()))
    return (areas >= limits[:, :1]) & (areas <= limits[:, 1:])


def mask_overlaps(
    intersections: np.ndarray, areas: np.ndarray, reference_areas: np.ndarray, crowd: np.ndarray
) -> np.ndarray:
    """(D, G) IoU; with a crowd, the share of the detection that is in it.

    Args:
        intersections: (D, G) pixels.
        areas: (D,) pixels of the detections.
        reference_areas: (G,) pixels of the references.
        crowd: (G,) bool.
    """
    union = np.where(crowd, areas[:, None], areas[:, None] + reference_areas - intersections)
    return np.divide(intersections, union, out=np.zeros(union.shape), where=intersections > 0)


def match_detections(
    overlaps: np.ndarray, in_range: np.ndarray, left_out: np.ndarray, crowd: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Matches the detections of one class in one image.

    Args:
        overlaps: (D, G) float64 IoU, detections best first.
        in_range: (A, D) bool, whether a detection's area is in each range.
        left_out: (A, G) bool, whether a reference is left out in each range.
        crowd: (G,) bool.

    Returns:
        (D, A) uint16: bit t says that the detection is right at threshold t; and (D, A) uint16: bit t says that it
        is left out there.
    """
    num_detections, num_references = overlaps.shape
    shape = (len(AREA_RANGES), len(THRESHOLDS), num_detections)
    right = np.zeros(shape, dtype=bool)
    aside = np.broadcast_to(~in_range[:, None], shape).copy()
    free = np.ones((*shape[:2], num_references), dtype=bool)
    left_out = left_out[:, None]
    for index in np.flatnonzero((overlaps >= THRESHOLDS[0]).any(axis=1)):
        possible = free & (overlaps[index] >= THRESHOLDS[:, None])
        regular = possible & ~left_out
        possible = np.where(regular.any(axis=-1, keepdims=True), regular, possible)
        best_from_the_end = np.where(possible, overlaps[index], -1.0)[..., ::-1].argmax(axis=-1)
        chosen = num_references - 1 - best_from_the_end  # the last one, of several that overlap alike
        matched = possible.any(axis=-1)
        matches_left_out = np.take_along_axis(left_out[:, 0], chosen, axis=1)
        right[..., index] = matched & ~matches_left_out
        aside[..., index] = np.where(matched, matches_left_out, aside[..., index])
        area_range, threshold = np.nonzero(matched)
        taken = chosen[area_range, threshold]
        free[area_range, threshold, taken] = crowd[taken]
    return _bits(right), _bits(aside)


def _bits(flags: np.ndarray) -> np.ndarray:
    """(A, T, D) bool -> (D, A) uint16, bit t from threshold t."""
    weights = 1 << np.arange(flags.shape[1], dtype=np.uint16)
    return (flags * weights[:, None]).sum(axis=1, dtype=np.uint16).T
