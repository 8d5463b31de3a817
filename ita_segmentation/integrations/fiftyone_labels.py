"""Predictions as FiftyOne's labels (`pip install fiftyone`).

A semantic map is a `Segmentation`. Panoptic and instance results are `Detections` with a mask in each box, which is how
FiftyOne stores all three tasks of its own models (its FC-CLIP too): it has no panoptic label.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ita_segmentation.prediction.segments import ClassNames, name_of, segments_of, size_of


def to_fiftyone_segmentation(result: Any) -> Any:
    """Convert a semantic result to `fiftyone.Segmentation`.

    Args:
        result: (H, W) class indices; negative ones are no class. See `segments_of`.

    Returns:
        the label, whose mask is uint8 (uint16 above 254 classes) of class index plus 1, as FiftyOne paints 0 as
        background. `mask_targets` gives the names of the values.

    Raises:
        ImportError: without fiftyone.
        ValueError: the result is not semantic.
    """
    import fiftyone.core.labels as labels

    segments = segments_of(result)
    if isinstance(result, dict) and "segments_info" in result:
        raise ValueError("a Segmentation is made of a semantic result; use to_fiftyone_detections")
    highest = max((segment.label_id for segment in segments), default=0) + 1
    mask = np.zeros(size_of(result), dtype=np.uint8 if highest < 256 else np.uint16)
    for segment in segments:
        mask[segment.mask] = segment.label_id + 1
    return labels.Segmentation(mask=mask)


def mask_targets(names: ClassNames) -> dict[int, str]:
    """Name the values of `to_fiftyone_segmentation`, for `dataset.mask_targets` or `default_mask_targets`."""
    return {index + 1: name_of(names, index) for index in range(len(names))}


def to_fiftyone_detections(result: Any, names: ClassNames) -> Any:
    """Convert a panoptic or instance result (or the regions of a semantic one) to `fiftyone.Detections`.

    Args:
        result: see `segments_of`.
        names: the vocabulary that the image was segmented with, or `config.id2label`.

    Returns:
        detections with the first name of the class as `label`, the score as `confidence`, `bounding_box` [x, y, width,
        height] in shares of the image's sides, and `mask`, the part of the mask in that box (bool).

    Raises:
        ImportError: without fiftyone.
        ValueError: see `segments_of`, and for a class without a name.
    """
    import fiftyone.core.labels as labels

    detections = []
    for segment in segments_of(result):
        x, y, width, height = segment.box
        rows, columns = segment.mask.shape
        detections.append(
            labels.Detection(
                label=name_of(names, segment.label_id),
                confidence=None if segment.score is None else float(segment.score),
                bounding_box=[x / columns, y / rows, width / columns, height / rows],
                mask=np.ascontiguousarray(segment.mask[y : y + height, x : x + width]),
            )
        )
    return labels.Detections(detections=detections)
