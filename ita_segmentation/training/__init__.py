"""Training and fine-tuning with transformers' Trainer."""

import importlib
from typing import Any

_MODULE_OF = {
    "ITAModelArguments": "arguments",
    "ITATrainer": "trainer",
    "ITATrainingArguments": "arguments",
    "PseudoLabeler": "pseudo_labels",
    "TrainingStoppedError": "callbacks",
    "build_trainer": "setup",
    "draw_results": "results",
    "load_model": "setup",
    "prepare_clip": "clip_tuning",
    "read_clip": "clip_tuning",
    "read_history": "results",
    "run_training": "setup",
    "tune_class_names": "name_tuning",
}

__all__ = [
    "ITAModelArguments",
    "ITATrainer",
    "ITATrainingArguments",
    "PseudoLabeler",
    "TrainingStoppedError",
    "build_trainer",
    "draw_results",
    "load_model",
    "prepare_clip",
    "read_clip",
    "read_history",
    "run_training",
    "tune_class_names",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
