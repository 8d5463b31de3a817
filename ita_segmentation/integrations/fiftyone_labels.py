"""Predictions as FiftyOne's labels.

A semantic map is a `Segmentation`. Panoptic and instance results are `Detections` with a mask in each box, which is how
FiftyOne stores all three tasks of its own models (its FC-CLIP too): it has no panoptic label.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ita_segmentation.integrations.segments import Names, name_of, segments_of


def to_fiftyone_segmentation(result: Any) -> Any:
    """A semantic result (H, W) as `fiftyone.Segmentation`.

    The mask is uint8 (uint16 above 254 classes) of class index plus 1, as FiftyOne paints 0 as background; pixels of
    negative class are 0. `mask_targets` gives the names of the values.

    Raises:
        ImportError: without fiftyone. ValueError: if the result is not semantic.
    """
    labels = _fiftyone_labels()
    segments = segments_of(result)
    if isinstance(result, dict) and "segments_info" in result:
        raise ValueError("a Segmentation is made of a semantic result; use to_fiftyone_detections")
    classes = np.asarray(result.detach().cpu() if hasattr(result, "detach") else result)
    highest = max((segment.label_id for segment in segments), default=0) + 1
    values = np.where(classes < 0, 0, classes.astype(np.int64) + 1)
    return labels.Segmentation(mask=values.astype(np.uint8 if highest < 256 else np.uint16))


def mask_targets(names: Names) -> dict[int, str]:
    """What the values of `to_fiftyone_segmentation` mean, for `dataset.mask_targets` or `default_mask_targets`."""
    return {index + 1: name_of(names, index) for index in range(len(names))}


def to_fiftyone_detections(result: Any, names: Names) -> Any:
    """A panoptic or instance result (or the regions of a semantic one) as `fiftyone.Detections`.

    Each has its class's first name as `label`, its score as `confidence` (None for semantic), `bounding_box` [x, y,
    width, height] in shares of the image's sides, and `mask`, the part of the mask in that box (bool).

    Raises:
        ImportError: without fiftyone. ValueError: see `segments_of`, and for a class without a name.
    """
    labels = _fiftyone_labels()
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


def _fiftyone_labels() -> Any:
    try:
        import fiftyone.core.labels
    except ImportError as error:
        raise ImportError("FiftyOne's labels need fiftyone: pip install fiftyone") from error
    return fiftyone.core.labels
