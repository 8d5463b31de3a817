"""Predictions in other tools' formats: COCO, Label Studio, CVAT, supervision and FiftyOne.

The packages of those tools are imported when a function needs them; the module `ita_segmentation.integrations.cvat`,
which is for CVAT's own tools, imports cvat_sdk.
"""

from ita_segmentation.integrations.coco import coco_document, coco_panoptic, coco_results
from ita_segmentation.integrations.fiftyone_labels import (
    mask_targets,
    to_fiftyone_detections,
    to_fiftyone_segmentation,
)
from ita_segmentation.integrations.formats import EXCHANGE_FORMATS
from ita_segmentation.integrations.label_studio import label_studio_task, labeling_config
from ita_segmentation.integrations.polygons import mask_polygons
from ita_segmentation.integrations.supervision_detections import to_detections
from ita_segmentation.prediction.segments import Segment, segments_of

__all__ = [
    "EXCHANGE_FORMATS",
    "Segment",
    "coco_document",
    "coco_panoptic",
    "coco_results",
    "label_studio_task",
    "labeling_config",
    "mask_polygons",
    "mask_targets",
    "segments_of",
    "to_detections",
    "to_fiftyone_detections",
    "to_fiftyone_segmentation",
]
