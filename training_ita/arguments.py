"""What a training run can be told about its model and its optimisation."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import yaml
from transformers import TrainingArguments


class BadInput(Exception):
    """Something the user gave cannot serve; the message says what, in one line."""


@dataclass
class ITAModelArguments:
    """Where the network comes from: give `clip` for a new one, or `model` to go on with one."""

    clip: str | None = field(
        default=None,
        metadata={"help": "Folder of a trained CLIP: open_clip_config.json and open_clip_model.safetensors."},
    )
    model: str | None = field(default=None, metadata={"help": "Folder of an ITA checkpoint to fine-tune."})
    model_config: str | None = field(
        default=None,
        metadata={"help": "Fields of ITAConfig, as JSON or YAML; one alone is --model_config.FIELD VALUE."},
    )

    @property
    def config_changes(self) -> dict[str, Any]:
        """`model_config` as a mapping."""
        return read_mapping(self.model_config or "", "model_config")


@dataclass
class ITATrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with the method's defaults, and a budget in minutes."""

    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of AdamW after warm-up."})
    weight_decay: float = field(default=0.05, metadata={"help": "None on norms and embeddings."})
    max_grad_norm: float = field(default=0.01, metadata={"help": "Clips the gradient of the whole model."})
    warmup_steps: float = field(default=10, metadata={"help": "Steps of linear warm-up; below 1: a share."})
    lr_scheduler_type: Literal["step", "cosine", "linear", "constant"] = field(
        default="step", metadata={"help": "'step': a tenth after 0.89 of the run, again after 0.96."}
    )
    max_minutes: float | None = field(
        default=None,
        metadata={"help": "Ends the run after so many minutes; the learning rate follows the clock."},
    )
    half_weights: bool = field(
        default=False,
        metadata={
            "help": "Write the final checkpoint's weights in float16, half the size; it loads in float32."
        },
    )
    logging_steps: float = field(default=50, metadata={"help": "Log losses every so many steps."})
    report_to: None | str | list[str] = field(
        default="none", metadata={"help": "Trackers, as 'tensorboard'."}
    )

    def __post_init__(self) -> None:
        schedule, self.lr_scheduler_type = self.lr_scheduler_type, "constant"
        super().__post_init__()
        self.lr_scheduler_type = schedule  # "step" is none of transformers' own
        self.remove_unused_columns = False  # examples are tensors that the collator takes as they are
        self.label_names = ["mask_labels", "class_labels"]
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ValueError(f"max_minutes must be positive, got {self.max_minutes}")


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
