"""Augmentation of photographs for training: large-scale jitter and horizontal flip.

Large-scale jitter (Ghiasi et al., arXiv 2012.07177) as Mask2Former trains panoptic models (arXiv 2112.01527,
section 4): the picture is scaled so that it fits the crop, times a random factor, and cropped where it is
larger. What is smaller stays smaller: the image processor pads a batch at the bottom and on the right.
"""

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F


class LargeScaleJitter:
    """Random scale, crop and flip of a picture with its label map.

    Args:
        size: side of the square crop, in pixels.
        min_scale, max_scale: range of the random factor; 1 makes the picture fit the crop.
        flip: flip half of the pictures horizontally.
    """

    def __init__(self, size: int, min_scale: float = 0.1, max_scale: float = 2.0, flip: bool = True) -> None:
        if not 0 < min_scale <= max_scale:
            raise ValueError(
                f"scales must satisfy 0 < min_scale <= max_scale, got {min_scale} and {max_scale}"
            )
        self.size = size
        self.jitter = v2.Compose(
            [
                v2.ScaleJitter((size, size), scale_range=(min_scale, max_scale), antialias=True),
                v2.RandomHorizontalFlip(0.5 if flip else 0.0),
            ]
        )

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Draws from torch's global random generator.

        Args:
            image: (3, H, W) uint8.
            labels: (H, W) int64, resized without mixing labels.

        Returns:
            The same two, (3, h, w) and (h, w), with h and w at most `size`.
        """
        image, labels = self.jitter(tv_tensors.Image(image), tv_tensors.Mask(labels[None]))
        height, width = labels.shape[-2:]
        crop_height, crop_width = min(height, self.size), min(width, self.size)
        top = int(torch.randint(height - crop_height + 1, ()))
        left = int(torch.randint(width - crop_width + 1, ()))
        box = (top, left, crop_height, crop_width)
        return F.crop(image, *box).as_subclass(Tensor), F.crop(labels, *box).as_subclass(Tensor)[0]
