"""Evaluation: predictors, metrics and reports."""

from ita_segmentation.evaluation.metrics.instance import MaskAveragePrecision
from ita_segmentation.evaluation.metrics.panoptic import PanopticQuality
from ita_segmentation.evaluation.metrics.semantic import ConfusionMatrix
from ita_segmentation.evaluation.reporting.report import markdown_table, write_results

__all__ = [
    "ConfusionMatrix",
    "MaskAveragePrecision",
    "PanopticQuality",
    "markdown_table",
    "write_results",
]
