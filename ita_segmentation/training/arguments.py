"""What a training run can be told about its model and its optimisation."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import yaml
from transformers import TrainingArguments

from ita_segmentation.training.schedules import STEP_MILESTONES


class BadInput(Exception):
    """Something the user gave cannot serve; the message says what, in one line."""


@dataclass
class ITAModelArguments:
    """Where the network comes from: give `clip` for a new one, or `model` to go on with one."""

    clip: str | None = field(
        default=None,
        metadata={
            "help": "A trained CLIP: a folder with open_clip_config.json and open_clip_model.safetensors, or what "
            "open_clip can fetch: NAME:PRETRAINED, or hf-hub:ID."
        },
    )
    model: str | None = field(default=None, metadata={"help": "Folder of an ITA checkpoint to fine-tune."})
    model_config: str | None = field(
        default=None,
        metadata={"help": "Fields of ITAConfig, as JSON or YAML; one alone is --model_config.FIELD VALUE."},
    )

    keep_vocabulary: float = field(
        default=0.0,
        metadata={
            "help": "Of --model: its classes that the data set lacks are kept. What it segments of them with at least "
            "this score (0..1) where the data set has no label is learned, too; 0: nothing is."
        },
    )

    learn_words: bool = field(
        default=False,
        metadata={
            "help": "With keep_vocabulary: first move the token embeddings of the data set's names, where no name that "
            "is kept shares them, to where CLIP sees its masks. For words that CLIP does not know."
        },
    )

    def __post_init__(self) -> None:
        if self.learn_words and not self.keep_vocabulary:
            raise ValueError("learn_words needs keep_vocabulary: new words are told from those that are kept")
        if not 0 <= self.keep_vocabulary < 1:
            raise ValueError(f"keep_vocabulary must be at least 0 and below 1, got {self.keep_vocabulary}")

    @property
    def config_changes(self) -> dict[str, Any]:
        """`model_config` as a mapping."""
        return read_mapping(self.model_config or "", "model_config")


@dataclass
class ITATrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with the method's defaults, and what a run of this network needs beside."""

    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of AdamW after warm-up."})
    weight_decay: float = field(default=0.05, metadata={"help": "None on norms and embeddings."})
    max_grad_norm: float = field(default=0.01, metadata={"help": "Clips the gradient of the whole model."})
    warmup_steps: float = field(default=10, metadata={"help": "Steps of linear warm-up; below 1: a share."})
    lr_scheduler_type: Literal["step", "cosine", "linear", "poly", "constant"] = field(
        default="step",
        metadata={"help": "'step': a tenth after each of lr_milestones; 'poly': linear to the power 0.9."},
    )
    lr_milestones: list[float] = field(
        default_factory=lambda: list(STEP_MILESTONES),
        metadata={"help": "Shares of the run (0..1), rising, after each of which 'step' falls to a tenth."},
    )
    max_minutes: float | None = field(
        default=None,
        metadata={"help": "Ends the run after so many minutes; the learning rate follows the clock."},
    )
    train_clip: Literal["none", "norms", "all"] = field(
        default="none",
        metadata={"help": "What of CLIP's image tower learns: nothing, its normalisation layers, or all."},
    )
    clip_learning_rate_factor: float = field(
        default=0.1, metadata={"help": "CLIP's learning rate as a share of learning_rate, where CLIP learns."}
    )
    lora_rank: int = field(
        default=0, metadata={"help": "Adapts CLIP's image tower by LoRA of this rank; 0: not. Needs peft."}
    )
    clip_dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Precision in which a frozen CLIP's image tower is kept."}
    )
    channels_last: bool = field(
        default=False, metadata={"help": "CLIP's image tower in channels-last memory: faster convolutions."}
    )
    ema_decay: float = field(
        default=0.0,
        metadata={"help": "Evaluates and saves a moving average of the weights, such as 0.9998; 0: none."},
    )
    half_weights: bool = field(
        default=False,
        metadata={
            "help": "Write the final checkpoint's weights in float16, half the size; it loads in float32."
        },
    )
    sample_images: int = field(
        default=6,
        metadata={"help": "Draw predictions of so many images at each evaluation, in samples/; 0: none."},
    )
    logging_steps: float = field(default=50, metadata={"help": "Log losses every so many steps."})
    report_to: None | str | list[str] = field(
        default=None,
        metadata={"help": "Trackers, such as 'tensorboard' (the default where it is installed) or 'wandb'."},
    )

    def __post_init__(self) -> None:
        schedule, self.lr_scheduler_type = self.lr_scheduler_type, "constant"
        if self.report_to is None:
            self.report_to = "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
        # Without being told so, processes that find no accelerator do not find each other either.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        self.lr_scheduler_type = schedule  # "step" is none of transformers' own
        self.remove_unused_columns = False  # examples are tensors that the collator takes as they are
        self.label_names = ["mask_labels", "class_labels"]
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        self.logging_nan_inf_filter = False  # a loss that is no number ends the run
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # each trainable weight takes part in each step
        if self.ddp_broadcast_buffers is None:
            self.ddp_broadcast_buffers = False  # all buffers are the frozen CLIP's
        self._check()

    def _check(self) -> None:
        """Raises ValueError for what cannot be."""
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ValueError(f"max_minutes must be positive, got {self.max_minutes}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and below 1, got {self.ema_decay}")
        if self.sample_images < 0:
            raise ValueError(f"sample_images must not be negative, got {self.sample_images}")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must not be negative, got {self.lora_rank}")
        if self.clip_learning_rate_factor <= 0:
            raise ValueError(
                f"clip_learning_rate_factor must be positive, got {self.clip_learning_rate_factor}"
            )
        if not rises_within(self.lr_milestones, 0.0, 1.0):
            raise ValueError(f"lr_milestones must rise from above 0 to below 1, got {self.lr_milestones}")


def rises_within(values: Sequence[float], low: float, high: float) -> bool:
    """Whether each value is greater than the one before, all between the limits."""
    bounded = [low, *values, high]
    return all(a < b for a, b in zip(bounded[:-1], bounded[1:], strict=True))


def read_mapping(text: str, source: str) -> dict[str, Any]:
    """A YAML or JSON mapping."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadInput(f"{source} is not valid YAML or JSON: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise BadInput(f"{source} must hold a mapping of names to values, not a {type(values).__name__}")
    return values
