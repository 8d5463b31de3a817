"""What a training run can be told about its data, and the data that this names."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from . import training as source
from .augmentation import LargeScaleJitter
from .scenes_dataset import SPLITS


@dataclass
class ITADataArguments:
    """What is learned from."""

    dataset: str = field(
        default="scenes",
        metadata={
            "help": "'scenes', or the folder of a data set saved by `datasets` with columns image and label "
            "(8-bit PNG of class ids, 255 ignored), or image, panoptic and segments."
        },
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on, of a data set on disk."})
    eval_split: str = field(default="validation", metadata={"help": "Split to evaluate on, if there is one."})
    unseen_classes: list[str] = field(
        default_factory=list,
        metadata={"help": "Names of classes whose masks are withheld, of a data set on disk."},
    )
    image_size: int = field(
        default=192, metadata={"help": "Side of the training pictures or crops, in pixels."}
    )
    min_scale: float = field(default=0.1, metadata={"help": "Large-scale jitter (data set on disk): from."})
    max_scale: float = field(default=2.0, metadata={"help": "Large-scale jitter (data set on disk): to."})
    scenes_seed: int = field(
        default=SPLITS["train"].seed, metadata={"help": "Which Scenes world to train in."}
    )
    eval_seed: int = field(
        default=SPLITS["validation"].seed, metadata={"help": "Which Scenes world to evaluate in."}
    )
    eval_images: int = field(default=200, metadata={"help": "How many pictures an evaluation takes at most."})


def load_data(data: ITADataArguments, training: TrainingArguments) -> tuple[source.TrainingClasses, Any, Any]:
    """Classes, training examples and evaluation examples (None if there are none).

    Raises:
        ValueError, FileNotFoundError: what `data` names cannot serve.
    """
    if data.image_size < 32:
        raise ValueError(f"image_size must be at least 32 pixels, got {data.image_size}")
    if data.dataset == "scenes":
        if training.max_steps <= 0 and not getattr(training, "max_minutes", None):
            raise ValueError("Scenes has no end: give max_steps or max_minutes")
        evaluation = source.ScenesEvaluation(data.eval_seed, data.image_size, data.eval_images)
        return source.scenes_classes(), source.ScenesTraining(data.scenes_seed, data.image_size), evaluation
    return source.load_disk(
        data.dataset,
        train_split=data.train_split,
        eval_split=data.eval_split,
        unseen=data.unseen_classes,
        jitter=LargeScaleJitter(data.image_size, data.min_scale, data.max_scale),
        eval_images=data.eval_images,
    )
