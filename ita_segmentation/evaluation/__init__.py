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

_MODULES = {
    "baselines.loading": ("load_baseline",),
    "benchmarks": ("Benchmark", "load_benchmark"),
    "evaluator": ("EvalConfig", "evaluate_benchmark"),
    "ita_predictor": ("ITAPredictor",),
    "metrics.confusion_matrix": ("ConfusionMatrix",),
    "metrics.evaluate_modules": ("MaskAP", "MeanIoU", "PanopticQualityMetric"),
    "metrics.mask_ap": ("MaskAveragePrecision",),
    "metrics.panoptic_quality": ("PanopticQuality",),
    "predictors": ("ImagePrediction", "Instances", "Predictor"),
    "reporting.report": ("write_results",),
    "tta": ("TestTimeAugmentation",),
}
__all__ = [name for names in _MODULES.values() for name in names]


def __getattr__(name: str) -> Any:
    """Import a public name on its first use: datasets, evaluate and matplotlib take seconds."""
    module = next((module for module, names in _MODULES.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{module}"), name)
