"""For `evaluate.load`, which takes the path of this file."""

from ita_segmentation.evaluation.metrics.evaluate_modules import PanopticQualityMetric

__all__ = ["PanopticQualityMetric"]
