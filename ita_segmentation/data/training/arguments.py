"""What a training run can be told about its data, and the data that this names."""

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

from ita_segmentation.data.scenes.dataset import SPLITS
from ita_segmentation.data.training import datasets as source
from ita_segmentation.data.training.augmentation import Augmentation, LargeScaleJitter, ShortestEdgeCrop


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
        default=192, metadata={"help": "Side of the training images or crops, in pixels."}
    )
    augmentation: Literal["jitter", "shortest_edge"] = field(
        default="jitter",
        metadata={
            "help": "Of a data set on disk. 'jitter': fit the crop, times a random factor (panoptic, instance); "
            "'shortest_edge': one of some lengths of the shortest edge, and no crop that one class fills (semantic)."
        },
    )
    min_scale: float = field(default=0.1, metadata={"help": "Random scale of the augmentation: from."})
    max_scale: float = field(default=2.0, metadata={"help": "Random scale of the augmentation: to."})
    max_class_share: float = field(
        default=0.75,
        metadata={"help": "Of 'shortest_edge': largest share of one class in a crop; 1: any."},
    )
    flip: bool = field(default=True, metadata={"help": "Flip half of the images (data set on disk)."})
    color_jitter: bool = field(default=False, metadata={"help": "Distort colours (data set on disk)."})
    fill_crop: bool = field(
        default=False,
        metadata={
            "help": "Fill images smaller than the crop up to it, grey, as the published recipe does; otherwise "
            "they keep their size and padding takes no part in the network."
        },
    )
    skip_corrupt: bool = field(
        default=False,
        metadata={
            "help": "Pass over images that cannot be read, and count them; otherwise they end the run."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the parquet files of a prepared data set where they lie, instead of the memory-mapped "
            "copy that `datasets` makes of them in its cache."
        },
    )
    shuffle_window: int = field(
        default=1024,
        metadata={
            "help": "Of streaming: how many images are shuffled among each other, and kept by a worker."
        },
    )
    scenes_seed: int = field(
        default=SPLITS["train"].seed, metadata={"help": "Which Scenes world to train in."}
    )
    eval_seed: int = field(
        default=SPLITS["validation"].seed, metadata={"help": "Which Scenes world to evaluate in."}
    )
    eval_images: int = field(default=200, metadata={"help": "How many images an evaluation takes at most."})


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
    if data.shuffle_window < 1:
        raise ValueError(f"shuffle_window must be at least 1, got {data.shuffle_window}")
    return source.load_disk(
        data.dataset,
        train_split=data.train_split,
        eval_split=data.eval_split,
        unseen=data.unseen_classes,
        jitter=augmentation_of(data),
        eval_images=data.eval_images,
        seed=training.seed if training.data_seed is None else training.data_seed,
        skip_corrupt=data.skip_corrupt,
        shuffle_window=data.shuffle_window if data.streaming else None,
    )


def augmentation_of(data: ITADataArguments) -> Augmentation:
    """What `data` says of augmentation."""
    scales = data.image_size, data.min_scale, data.max_scale
    if data.augmentation == "jitter":
        return LargeScaleJitter(*scales, data.flip, data.color_jitter, data.fill_crop)
    if data.augmentation == "shortest_edge":
        return ShortestEdgeCrop(*scales, data.flip, data.color_jitter, data.fill_crop, data.max_class_share)
    raise ValueError(f"augmentation must be jitter or shortest_edge, got {data.augmentation!r}")
