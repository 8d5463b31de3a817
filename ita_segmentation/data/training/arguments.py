"""The data arguments of a training run, and the datasets that they name."""

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

from ita_segmentation.data.scenes.dataset import SPLITS
from ita_segmentation.data.training.augmentation import Augmentation, LargeScaleJitter, ShortestEdgeCrop
from ita_segmentation.data.training.classes import TrainingClasses, scenes_classes
from ita_segmentation.data.training.examples import ScenesEvaluation, ScenesTraining, load_disk
from ita_segmentation.errors import UsageError


def option(default: Any, text: str, **metadata: Any) -> Any:
    """Make a field of arguments with its help."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text, **metadata})
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class ITADataArguments:
    """The data of a training run."""

    _argument_group_name = "data"

    dataset: str = option(
        "scenes",
        "'scenes', the folder of a prepared dataset, or of one saved by `datasets` with columns "
        "image and label (8-bit PNG of class ids, 255 ignored), or image, panoptic and segments.",
    )
    train_split: str = option("train", "Split to train on (dataset on disk).")
    eval_split: str = option("validation", "Split to evaluate on, if it exists.")
    unseen_classes: list[str] = option([], "Names of classes whose masks are withheld (dataset on disk).")
    image_size: int = option(192, "Side of the training images or crops, in pixels.")
    augmentation: Literal["jitter", "shortest_edge"] = option(
        "jitter",
        "Of a dataset on disk. 'jitter': fit the crop, times a random factor (panoptic, instance); "
        "'shortest_edge': a random length of the shortest edge, and no crop filled by one class "
        "(semantic).",
    )
    min_scale: float = option(0.1, "Smallest random scale of the augmentation.")
    max_scale: float = option(2.0, "Largest random scale of the augmentation.")
    max_class_share: float = option(0.75, "Largest share of one class in a crop ('shortest_edge'); 1: any.")
    flip: bool = option(True, "Flip half of the images (dataset on disk).")
    color_jitter: bool = option(False, "Distort colors (dataset on disk).")
    fill_crop: bool = option(
        False,
        "Pad images smaller than the crop with gray, as the published recipe does; otherwise they "
        "keep their size, and the network does not see the padding of a batch.",
    )
    skip_corrupt: bool = option(
        False, "Skip images that cannot be read, and count them; otherwise they end the run."
    )
    streaming: bool = option(
        False,
        "Read the parquet files of a prepared dataset in place, instead of the memory-mapped copy "
        "that `datasets` makes in its cache.",
    )
    shuffle_window: int = option(
        1024, "With streaming: how many images are shuffled among each other, and kept in memory by a worker."
    )
    scenes_seed: int = option(SPLITS["train"].seed, "Seed of Scenes for training.")
    eval_seed: int = option(SPLITS["validation"].seed, "Seed of Scenes for evaluation.")
    eval_images: int = option(200, "Evaluate on at most this many images.")


def load_data(data: ITADataArguments, training: TrainingArguments) -> tuple[TrainingClasses, Any, Any]:
    """Load the classes, training examples and evaluation examples (None if there are none) that the arguments name.

    Args:
        data: the data arguments.
        training: the training arguments, for the seed and the length of the run.

    Raises:
        ITAError: if arguments are out of range or do not fit together, or the dataset cannot be used.
    """
    if data.image_size < 32:
        raise UsageError(f"image_size must be at least 32 pixels, got {data.image_size}")
    if data.dataset == "scenes":
        if training.max_steps <= 0 and not getattr(training, "max_minutes", None):
            raise UsageError("Scenes is infinite: give max_steps or max_minutes")
        evaluation = ScenesEvaluation(data.eval_seed, data.image_size, data.eval_images)
        return scenes_classes(), ScenesTraining(data.scenes_seed, data.image_size), evaluation
    if data.shuffle_window < 1:
        raise UsageError(f"shuffle_window must be at least 1, got {data.shuffle_window}")
    return load_disk(
        data.dataset,
        train_split=data.train_split,
        eval_split=data.eval_split,
        unseen=data.unseen_classes,
        augmentation=build_augmentation(data),
        eval_images=data.eval_images,
        seed=training.seed if training.data_seed is None else training.data_seed,
        skip_corrupt=data.skip_corrupt,
        shuffle_window=data.shuffle_window if data.streaming else None,
    )


def build_augmentation(data: ITADataArguments) -> Augmentation:
    """Build the augmentation that the arguments describe; UsageError if they are out of range."""
    kwargs: dict[str, Any] = {
        "size": data.image_size,
        "min_scale": data.min_scale,
        "max_scale": data.max_scale,
        "flip": data.flip,
        "color_jitter": data.color_jitter,
        "fill": data.fill_crop,
    }
    if data.augmentation not in ("jitter", "shortest_edge"):
        raise UsageError(f"augmentation must be jitter or shortest_edge, got {data.augmentation!r}")
    try:
        if data.augmentation == "jitter":
            return LargeScaleJitter(**kwargs)
        return ShortestEdgeCrop(**kwargs, max_class_share=data.max_class_share)
    except ValueError as error:
        raise UsageError(str(error)) from error
