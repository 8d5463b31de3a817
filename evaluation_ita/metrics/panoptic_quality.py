"""For `evaluate.load`, which takes the path of this file."""

from evaluation_ita.metric_modules import PanopticQualityMetric

__all__ = ["PanopticQualityMetric"]
