"""Evaluation: benchmarks, predictors, metrics, baselines and reports."""

from importlib import import_module
from typing import Any

_MODULES = {
    "Benchmark": "benchmarks",
    "ConfusionMatrix": "metrics.confusion_matrix",
    "EvalConfig": "evaluator",
    "ITAPredictor": "ita_predictor",
    "ImagePrediction": "predictors",
    "Instances": "predictors",
    "MaskAP": "metrics.evaluate_modules",
    "MaskAveragePrecision": "metrics.mask_ap",
    "MeanIoU": "metrics.evaluate_modules",
    "PanopticQuality": "metrics.panoptic_quality",
    "PanopticQualityMetric": "metrics.evaluate_modules",
    "Predictor": "predictors",
    "TestTimeAugmentation": "tta",
    "evaluate_benchmark": "evaluator",
    "load_baseline": "baselines.loading",
    "load_benchmark": "benchmarks",
    "write_results": "reporting.report",
}
__all__ = sorted(_MODULES)  # noqa: PLE0605 (imported on first use: datasets, evaluate and matplotlib take seconds)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
