"""Evaluation: benchmarks, predictors, metrics, baselines and reports."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ita_segmentation.evaluation.baselines.loading import load_baseline
    from ita_segmentation.evaluation.benchmarks import Benchmark, load_benchmark
    from ita_segmentation.evaluation.evaluator import EvalConfig, evaluate_benchmark
    from ita_segmentation.evaluation.ita_predictor import ITAPredictor
    from ita_segmentation.evaluation.metrics.confusion_matrix import ConfusionMatrix
    from ita_segmentation.evaluation.metrics.evaluate_modules import MaskAP, MeanIoU, PanopticQualityMetric
    from ita_segmentation.evaluation.metrics.mask_ap import MaskAveragePrecision
    from ita_segmentation.evaluation.metrics.panoptic_quality import PanopticQuality
    from ita_segmentation.evaluation.predictors import ImagePrediction, Instances, Predictor
    from ita_segmentation.evaluation.reporting.report import write_results
    from ita_segmentation.evaluation.tta import TestTimeAugmentation

__all__ = [
    "Benchmark",
    "ConfusionMatrix",
    "EvalConfig",
    "ITAPredictor",
    "ImagePrediction",
    "Instances",
    "MaskAP",
    "MaskAveragePrecision",
    "MeanIoU",
    "PanopticQuality",
    "PanopticQualityMetric",
    "Predictor",
    "TestTimeAugmentation",
    "evaluate_benchmark",
    "load_baseline",
    "load_benchmark",
    "write_results",
]

_MODULES = {
    "Benchmark": "benchmarks",
    "ConfusionMatrix": "metrics.confusion_matrix",
    "EvalConfig": "evaluator",
    "ITAPredictor": "ita_predictor",
    "MaskAP": "metrics.evaluate_modules",
    "MaskAveragePrecision": "metrics.mask_ap",
    "MeanIoU": "metrics.evaluate_modules",
    "PanopticQuality": "metrics.panoptic_quality",
    "PanopticQualityMetric": "metrics.evaluate_modules",
    "TestTimeAugmentation": "tta",
    "evaluate_benchmark": "evaluator",
    "load_baseline": "baselines.loading",
    "load_benchmark": "benchmarks",
    "write_results": "reporting.report",
}


def __getattr__(name: str) -> Any:
    """Import a public name on its first use: datasets, evaluate and matplotlib take seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'predictors')}"), name)
