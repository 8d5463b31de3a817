"""The exchange room: predictions as COCO JSON, `supervision.Detections` and FiftyOne labels.

The packages of those formats are imported when a function needs them. `ita_segmentation.integrations.fiftyone_model.ITAFiftyOneModel` is
what FiftyOne's `dataset.apply_model` takes; its module imports fiftyone.
"""

from ita_segmentation.integrations.coco import coco_document, coco_panoptic, coco_results
from ita_segmentation.integrations.fiftyone_labels import (
    mask_targets,
    to_fiftyone_detections,
    to_fiftyone_segmentation,
)
from ita_segmentation.integrations.segments import Segment, segments_of
from ita_segmentation.integrations.supervision_detections import to_detections

__all__ = [
    "Segment",
    "coco_document",
    "coco_panoptic",
    "coco_results",
    "mask_targets",
    "segments_of",
    "to_detections",
    "to_fiftyone_detections",
    "to_fiftyone_segmentation",
]
