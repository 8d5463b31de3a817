"""Training and evaluation examples of Scenes, drawn on demand."""

from typing import Any

from torch.utils.data import Dataset

from ita_segmentation.data.scenes import scene
from ita_segmentation.data.training.classes import scenes_classes
from ita_segmentation.data.training.rows import image_tensor
from ita_segmentation.data.training.targets import segment_targets

INFINITE_LENGTH = 10_000_000
"""The length of a dataset without end, which samplers need to know."""


class ScenesTraining(Dataset):
    """Training examples without end: square scenes of seen classes only; an index always gives the same image."""

    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size
        self.training_label = scenes_classes().training_label

    def __len__(self) -> int:
        return INFINITE_LENGTH

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Draw an example: `image`, `mask_labels`, `class_labels` and `image_id`."""
        drawn = scene(self.seed, index, self.size, classes="seen")
        masks, labels = segment_targets(drawn.panoptic, drawn.segments, self.training_label).masks()
        return {
            "image": image_tensor(drawn.image).contiguous(),
            "mask_labels": masks,
            "class_labels": labels,
            "image_id": f"scenes{self.seed}[{index}]",
        }


class ScenesEvaluation(Dataset):
    """Evaluation examples: square scenes of all classes, seen and unseen."""

    def __init__(self, seed: int, size: int, num_images: int) -> None:
        self.seed, self.size, self.num_images = seed, size, num_images

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Draw an example: `image`, `label` and `image_id`."""
        if not 0 <= index < self.num_images:
            raise IndexError(index)
        drawn = scene(self.seed, index, self.size, classes="all")
        image = image_tensor(drawn.image).contiguous()
        return {"image": image, "label": drawn.semantic, "image_id": f"scenes{self.seed}[{index}]"}
