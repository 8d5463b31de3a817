"""Predictions as `supervision.Detections`: masks, boxes, scores and names, ready for its annotators and trackers."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from ita_segmentation.prediction.segments import ClassNames, name_of, segments_of, size_of


def to_detections(result: Any, names: ClassNames) -> Any:
    """Convert one image's segments to `supervision.Detections`.

    Args:
        result: a semantic, panoptic or instance result, see `segments_of`.
        names: the vocabulary that the image was segmented with, or `config.id2label`.

    Returns:
        `xyxy` (n, 4) float32 in pixels, right and lower side one past the last pixel; `mask` (n, H, W) bool;
        `class_id` (n,) int64; `confidence` (n,) float32, None for a result without scores; and `data["class_name"]`
        (n,).

    Raises:
        ImportError: without supervision.
        ValueError: see `segments_of`, and for a class without a name.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it warns of OpenCV's absence
        import supervision

    segments = segments_of(result)
    height, width = size_of(result)
    corners = [(x, y, x + w, y + h) for x, y, w, h in (segment.box for segment in segments)]
    masks = [segment.mask for segment in segments]
    is_scored = not segments or segments[0].score is not None
    scores = [segment.score for segment in segments]
    return supervision.Detections(
        xyxy=np.array(corners, dtype=np.float32).reshape(-1, 4),
        mask=np.stack(masks) if masks else np.zeros((0, height, width), dtype=bool),
        confidence=np.array(scores, dtype=np.float32) if is_scored else None,
        class_id=np.array([segment.label_id for segment in segments], dtype=np.int64),
        data={"class_name": np.array([name_of(names, segment.label_id) for segment in segments], dtype=str)},
    )
