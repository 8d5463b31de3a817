"""Predictions as `supervision.Detections`: masks, boxes, scores and names, ready for its annotators and trackers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from ita_segmentation.prediction.segments import ClassNames, as_array, iterate_segments, name_of, size_of


def to_detections(result: Any, names: ClassNames) -> Any:
    """Convert one image's segments to `supervision.Detections`.

    Args:
        result: a semantic, panoptic or instance result, see `segments_of`.
        names: the vocabulary that the image was segmented with, or `config.id2label`.

    Returns:
        `xyxy` (n, 4) float32 in pixels, right and lower side one past the last pixel; `mask` (n, H, W) bool, the
        result's own array where it has one without empty masks;
        `class_id` (n,) int64; `confidence` (n,) float32, None for a result without scores; and `data["class_name"]`
        (n,).

    Raises:
        ImportError: without supervision.
        ValueError: see `segments_of`, and for a class without a name.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it warns of OpenCV's absence
        import supervision

    corners, scores, label_ids = [], [], []
    for segment in iterate_segments(result):
        x, y, width, height = segment.box
        corners.append((x, y, x + width, y + height))
        scores.append(segment.score)
        label_ids.append(segment.label_id)
    is_scored = None not in scores[:1]
    return supervision.Detections(
        xyxy=np.array(corners, dtype=np.float32).reshape(-1, 4),
        mask=_stacked_masks(result, len(corners)),
        confidence=np.array(scores, dtype=np.float32) if is_scored else None,
        class_id=np.array(label_ids, dtype=np.int64),
        data={"class_name": np.array([name_of(names, label_id) for label_id in label_ids], dtype=str)},
    )


def _stacked_masks(result: Any, count: int) -> np.ndarray:
    """Give the masks of the `count` segments that have pixels, (n, H, W) bool, holding none of them twice."""
    maps = as_array(result["segmentation"] if isinstance(result, Mapping) else result)
    if maps.ndim == 3 and maps.dtype == bool and len(maps) == count:
        return maps
    masks = np.zeros((count, *size_of(result)), dtype=bool)
    for mask, segment in zip(masks, iterate_segments(result), strict=True):
        mask[:] = segment.mask
    return masks
