"""Arguments of a training run: its model and its optimization."""

import dataclasses
import importlib.util
import math
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from ita_segmentation.data.training.arguments import option
from ita_segmentation.files import parse_mapping
from ita_segmentation.training.schedules import STEP_MILESTONES

MAY_BE_NEGATIVE = ("max_steps", "local_rank")
MUST_BE_POSITIVE = (
    "clip_learning_rate_factor",
    "gradient_accumulation_steps",
    "logging_steps",
    "max_minutes",
    "num_train_epochs",
    "per_device_eval_batch_size",
    "per_device_train_batch_size",
    "save_steps",
)
COMMON = (
    "output_dir",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "fp16",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "seed",
    "dataloader_num_workers",
    "use_cpu",
)
"""Arguments of transformers that `--help` describes beside our own."""
DERIVED = (
    "ddp_broadcast_buffers",
    "ddp_find_unused_parameters",
    "dataloader_pin_memory",
    "label_names",
    "local_rank",
    "logging_nan_inf_filter",
    "remove_unused_columns",
    "report_to",
    "resume_from_checkpoint",
    "train_sampling_strategy",
    "use_cpu",
)
"""Arguments that `ITATrainingArguments` sets itself, or that describe one start of a run."""


@dataclass
class ITAModelArguments:
    """Source of the network: `clip` for a new one, `model` to fine-tune a checkpoint."""

    _argument_group_name = "model"

    clip: str | None = option(
        None,
        "Build a new model on this trained CLIP: a folder with open_clip_config.json and "
        "open_clip_model.safetensors, or what open_clip can download: MODEL:TAG or hf-hub:OWNER/NAME",
    )
    model: str | None = option(None, "Fine-tune the ITA checkpoint in this folder")
    model_config: list[str] = option(
        [],
        "Fields of ITAConfig as a JSON or YAML mapping; a single one is --model_config.FIELD VALUE",
        action="extend",
    )
    keep_vocabulary: float = option(
        0.0,
        "With --model: keep the checkpoint's classes that the dataset lacks. Segments that the "
        "original checkpoint predicts with at least this score (0..1) where the dataset has no label "
        "become pseudo-labels; 0 turns it off",
    )
    tune_class_names: bool = option(
        False,
        "With --keep_vocabulary: before training, tune the token embeddings that only the dataset's "
        "class names use, for names that CLIP does not know",
    )

    def __post_init__(self) -> None:
        if self.tune_class_names and not self.keep_vocabulary:
            raise ValueError("tune_class_names needs keep_vocabulary, which says which names must not change")
        if not 0 <= self.keep_vocabulary < 1:
            raise ValueError(f"keep_vocabulary must be at least 0 and below 1, got {self.keep_vocabulary}")

    @property
    def config_changes(self) -> dict[str, Any]:
        """All mappings in `model_config` merged, later ones over earlier ones. Raises ITAError if one is none."""
        changes: dict[str, Any] = {}
        for text in self.model_config:
            changes |= parse_mapping(text, "model_config")
        return changes


@dataclass
class ITATrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` with the method's defaults and the options of this trainer."""

    _argument_group_name = "training"

    learning_rate: float = option(1e-4, "AdamW's learning rate after warm-up")
    weight_decay: float = option(0.05, "Not applied to norms and embeddings")
    max_grad_norm: float = option(0.01, "Clip the norm of the whole gradient")
    warmup_steps: float = option(10, "Steps of linear warm-up; a share of the run if below 1")
    lr_scheduler_type: Literal["step", "cosine", "linear", "poly", "constant"] = option(
        "step", "'step' divides by ten at each of lr_milestones; 'poly' has a power of 0.9"
    )
    lr_milestones: list[float] = option(
        list(STEP_MILESTONES), "Increasing shares of the run (0..1) at which 'step' divides by ten"
    )
    max_minutes: float | None = option(
        None, "End the run after this many minutes; the learning rate follows the clock"
    )
    train_adapter: Literal["none", "ground_truth", "mixed"] = option(
        "none",
        "Train only the mask adapter of a model with mask_pooling 'adapter', all else frozen: on "
        "ground-truth masks, or with predicted masks mixed in",
    )
    train_clip: Literal["none", "norms", "all"] = option(
        "none", "Train nothing of CLIP's image tower, its normalization layers, or all of it"
    )
    clip_learning_rate_factor: float = option(
        0.1, "CLIP's learning rate as a share of learning_rate, where it is trained"
    )
    lora_rank: int = option(0, "Adapt CLIP's image tower by LoRA of this rank (needs peft); 0: no LoRA")
    clip_dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "Precision of a frozen CLIP's image tower"
    )
    channels_last: bool = option(False, "CLIP's image tower in channels-last memory: faster convolutions")
    ema_decay: float = option(
        0.0, "Evaluate and save a moving average of the weights, e.g. 0.9998; 0: no average"
    )
    half_weights: bool = option(
        False, "Write the final weights in float16, half the size; they load in float32"
    )
    sample_images: int = option(6, "Draw the predictions for this many images at each evaluation")
    logging_steps: float = option(50, "Log every so many steps")
    logging_first_step: bool = option(True, "Log the first step, too")
    report_to: None | str | list[str] = option(
        None, "Trackers such as 'tensorboard' (the default where installed), 'wandb', or 'none'"
    )
    resume_from_checkpoint: str | None = option(
        None,
        "Resume from the last checkpoint of output_dir ('last', or no value), from the last one if "
        "there is any ('auto'), or from this folder",
        nargs="?",
        const="last",
    )

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.max_steps < -1 or self.max_steps == 0:
            raise ValueError(f"max_steps must be positive, or -1 for no limit, got {self.max_steps}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and below 1, got {self.ema_decay}")
        bounded = [0.0, *self.lr_milestones, 1.0]
        if not all(before < after for before, after in pairwise(bounded)):
            raise ValueError(f"lr_milestones must increase between 0 and 1, got {self.lr_milestones}")
        schedule, self.lr_scheduler_type = self.lr_scheduler_type, "constant"
        if self.report_to is None:
            self.report_to = "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
        # Without `use_cpu`, processes that find no accelerator do not form a process group either.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        self.lr_scheduler_type = schedule  # transformers has no "step" and no "poly" of this kind
        self.remove_unused_columns = False  # examples are tensors, which the collator takes unchanged
        self.label_names = ["mask_labels", "class_labels"]
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        self.logging_nan_inf_filter = False  # a non-finite loss ends the run
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # each trainable weight takes part in each step
        if self.ddp_broadcast_buffers is None:
            self.ddp_broadcast_buffers = False  # all buffers are the frozen CLIP's


def check_numbers(arguments: Any) -> None:
    """Raise ValueError for the first number that is not finite, is negative, or 0 where it must be positive."""
    for one in dataclasses.fields(arguments):
        value = getattr(arguments, one.name)
        for number in value if isinstance(value, list) else [value]:
            if not isinstance(number, (int, float)):
                continue
            if not math.isfinite(number):
                raise ValueError(f"{one.name} must be a finite number, got {number}")
            if number < 0 and one.name not in MAY_BE_NEGATIVE:
                raise ValueError(f"{one.name} must not be negative, got {number}")
            if number == 0 and one.name in MUST_BE_POSITIVE:
                raise ValueError(f"{one.name} must be positive, got {number}")


def changed_arguments(*arguments: Any) -> dict[str, Any]:
    """Collect the arguments that are not the default, as `--config` reads them, without tokens and `DERIVED` ones."""
    changed: dict[str, Any] = {}
    for group in arguments:
        for one in dataclasses.fields(group):
            default = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
            value = getattr(group, one.name, default)
            value = value.value if isinstance(value, Enum) else value
            is_recorded = one.init and one.name not in DERIVED and not one.name.endswith("_token")
            if is_recorded and value not in (default, []) and isinstance(value, (str, int, float, list)):
                changed[one.name] = value
    return changed
