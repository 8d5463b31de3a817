"""Training and fine-tuning with transformers' Trainer."""

import importlib
from typing import Any

_MODULES = {
    "arguments": ("ITAModelArguments", "ITATrainingArguments"),
    "callbacks": ("TrainingStoppedError",),
    "clip_tuning": ("prepare_clip", "read_clip"),
    "name_tuning": ("tune_class_names",),
    "pseudo_labels": ("PseudoLabeler",),
    "results": ("draw_results", "read_history"),
    "setup": ("build_trainer", "load_model", "run_training"),
    "trainer": ("ITATrainer",),
}
__all__ = [name for names in _MODULES.values() for name in names]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    module = next((module for module, names in _MODULES.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
