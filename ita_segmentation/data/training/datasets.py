"""What a training run reads: images with one mask per segment, from the Scenes world or from a disk.

A training example is `{"image": (3, H, W) uint8, "mask_labels": (n, H, W) bool, "class_labels": (n,) int64}`
with classes counted in the *training* vocabulary; an evaluation example is `{"image", "label": (H, W) integers}`
with classes counted in the whole vocabulary and the classes' ignore index where there is none. Both have `image_id`,
a str, and perhaps `skipped`, ids of corrupt images that were passed over. Targets are Mask2Former's (arXiv
2112.01527): each thing instance is one mask, and so is each stuff class of an image.
"""

from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from ita_segmentation.data.scenes import IGNORE_INDEX, scene
from ita_segmentation.data.training.classes import (
    TrainingClasses,
    class_names,
    disk_classes,
    scenes_classes,
)
from ita_segmentation.data.training.disk import DiskEvaluation, DiskTraining, load_disk
from ita_segmentation.data.training.rows import CorruptImage, image_tensor
from ita_segmentation.data.training.targets import segment_targets, semantic_targets

__all__ = [
    "ENDLESS",
    "IGNORE_INDEX",
    "CorruptImage",
    "DiskEvaluation",
    "DiskTraining",
    "EvaluationCollator",
    "ScenesEvaluation",
    "ScenesTraining",
    "TrainingClasses",
    "TrainingCollator",
    "class_names",
    "disk_classes",
    "load_disk",
    "scenes_classes",
    "segment_targets",
    "semantic_targets",
]

ENDLESS = 10_000_000  # examples of a world without end: what a sampler counts to


class ScenesTraining(Dataset):
    """Training examples without end: scenes of seen classes only, drawn when asked for.

    Args:
        seed: which world; an index always gives the same image of it.
        size: side of the square images, in pixels.
    """

    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size
        self.training_label = scenes_classes().training_label

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> dict[str, Any]:
        drawn = scene(self.seed, index, self.size, classes="seen")
        masks, labels = segment_targets(drawn.panoptic, drawn.segments, self.training_label)
        return {
            "image": image_tensor(drawn.image).contiguous(),
            "mask_labels": masks,
            "class_labels": labels,
            "image_id": f"scenes{self.seed}[{index}]",
        }


class ScenesEvaluation(Dataset):
    """Evaluation examples: `num_images` scenes of all classes, seen and unseen."""

    def __init__(self, seed: int, size: int, num_images: int) -> None:
        self.seed, self.size, self.num_images = seed, size, num_images

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.num_images:
            raise IndexError(index)
        drawn = scene(self.seed, index, self.size, classes="all")
        image = image_tensor(drawn.image).contiguous()
        return {"image": image, "label": drawn.semantic, "image_id": f"scenes{self.seed}[{index}]"}


# ------------------------------------------------------------------------------------------------------------
# Batches


class TrainingCollator:
    """Training examples -> the model's arguments: `pixel_values`, `pixel_mask`, `mask_labels`, `class_labels`.

    The image processor normalises and pads; masks are padded alike. `pixel_mask` is left out where nothing was
    padded. Beside them `image_names` and `skipped_images` (lists of str), which are for the trainer.

    Args:
        processor: an `ITAImageProcessor`.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        images = [example["image"] for example in examples]
        batch = dict(self.processor(images=images, do_resize=False, return_tensors="pt"))
        height, width = batch["pixel_values"].shape[-2:]
        if bool(batch["pixel_mask"].all()):
            del batch["pixel_mask"]
        batch["mask_labels"] = [padded(example["mask_labels"], height, width) for example in examples]
        batch["class_labels"] = [example["class_labels"] for example in examples]
        return batch | names_of(examples)


def padded(masks: Tensor, height: int, width: int) -> Tensor:
    """Masks (n, h, w) -> (n, height, width), nothing at the bottom and on the right."""
    if masks.shape[-2:] == (height, width):
        return masks
    return pad(masks, (0, width - masks.shape[-1], 0, height - masks.shape[-2]))


class EvaluationCollator:
    """Evaluation examples -> `{"inputs": what the model takes, "labels": list of (H, W) arrays}` and names as above.

    Args:
        processor: an `ITAImageProcessor`.
        do_resize: feed images at the processor's size; otherwise at their own.
    """

    def __init__(self, processor: Any, do_resize: bool) -> None:
        self.processor, self.do_resize = processor, do_resize

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        images = [example["image"] for example in examples]
        inputs = dict(self.processor(images=images, do_resize=self.do_resize, return_tensors="pt"))
        labels = [example["label"] for example in examples]
        return {"inputs": inputs, "labels": labels} | names_of(examples)


def names_of(examples: list[dict[str, Any]]) -> dict[str, list[str]]:
    """`image_names` of a batch's examples, and `skipped_images`, the corrupt images that were passed over."""
    return {
        "image_names": [example.get("image_id", "") for example in examples],
        "skipped_images": [name for example in examples for name in example.get("skipped", [])],
    }
