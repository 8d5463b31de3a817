"""Augmentation of photographs for training, with torchvision's v2 transforms.

- `LargeScaleJitter` (Ghiasi et al., arXiv 2012.07177), with which Mask2Former trains panoptic and instance models
  (arXiv 2112.01527, section 4): an image is scaled to fit the crop, times a random factor, and cropped where it is
  larger.
- `ShortestEdgeCrop`, with which Mask2Former trains semantic models: the shortest edge gets one of several lengths, and
  a crop that one class fills is drawn again.

Both flip half of the images, and distort colors on request. Images smaller than the crop keep their size (the collator
pads a batch), or are padded with gray as in Mask2Former. All draw from torch's global CPU generator; `seeded` seeds it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ita_segmentation.data.training.rows import seed_of

GRAY = 128  # the value that images are padded with
CROP_TRIES = 10


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Make torch's random numbers on the CPU depend on `key` alone; afterwards they continue as if not used."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(*key))
        yield


def color_distortion() -> v2.Transform:
    """SSD's color distortion (arXiv 1512.02325): brightness, contrast, saturation and hue, each half of the time.

    The ranges are Mask2Former's, but brightness is multiplied, not added; channels are never permuted.
    """
    parts = [
        v2.ColorJitter(brightness=32 / 255),
        v2.ColorJitter(contrast=0.5),
        v2.ColorJitter(saturation=0.5),
        v2.ColorJitter(hue=0.1),
    ]
    return v2.Compose([v2.RandomApply([part], p=0.5) for part in parts])


class Augmentation:
    """Random scale, crop, flip and colors of an image with its label map; subclasses define the scale.

    Args:
        size: side of the square crop, in pixels.
        min_scale: smallest random scale.
        max_scale: largest random scale.
        flip: flip half of the images horizontally.
        color_jitter: distort colors.
        fill: pad images smaller than the crop with gray, and their labels with 0.
        max_class_share: draw a crop again, up to ten times, if all its labeled pixels, or more than this share, have
            the same label; 1 accepts any crop. Label 0 is no label.
    """

    def __init__(
        self,
        size: int,
        min_scale: float,
        max_scale: float = 2.0,
        flip: bool = True,
        color_jitter: bool = False,
        fill: bool = False,
        max_class_share: float = 1.0,
    ) -> None:
        if not 0 < min_scale <= max_scale:
            raise ValueError(
                f"scales must satisfy 0 < min_scale <= max_scale, got {min_scale} and {max_scale}"
            )
        if not 0 < max_class_share <= 1:
            raise ValueError(f"max_class_share must be above 0 and at most 1, got {max_class_share}")
        self.size, self.fill, self.max_class_share = size, fill, max_class_share
        self.min_scale, self.max_scale = min_scale, max_scale
        self.flip = v2.RandomHorizontalFlip(0.5 if flip else 0.0)
        self.color_jitter = color_distortion() if color_jitter else None

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Augment an image (3, H, W) uint8 and its labels (H, W), resized to the nearest.

        Returns (3, h, w) and (h, w), with h and w at most `size`, or equal to it if images are filled.
        """
        pixels, maps = self.flip(tv_tensors.Image(image), tv_tensors.Mask(labels[None]))
        factor = self.scale(*labels.shape)
        size = [max(1, int(side * factor + 1e-6)) for side in labels.shape]
        pixels, maps = F.resize(pixels, size, antialias=True), F.resize(maps, size)
        box = self._crop_box(maps[0])
        image = F.crop(pixels, *box).as_subclass(Tensor)
        labels = F.crop(maps, *box).as_subclass(Tensor)
        if self.color_jitter is not None:
            image = self.color_jitter(image)
        if self.fill:
            margin = [0, 0, self.size - image.shape[2], self.size - image.shape[1]]
            image, labels = F.pad(image, margin, fill=GRAY), F.pad(labels, margin, fill=0)
        return image.contiguous(), labels[0].contiguous()

    def scale(self, height: int, width: int) -> float:
        """Draw the factor by which an image of this size is scaled."""
        raise NotImplementedError

    def _crop_box(self, labels: Tensor) -> tuple[int, int, int, int]:
        """Draw top, left, height, width."""
        height, width = labels.shape
        crop_height, crop_width = min(height, self.size), min(width, self.size)
        for _ in range(CROP_TRIES):
            top = int(torch.randint(height - crop_height + 1, ()))
            left = int(torch.randint(width - crop_width + 1, ()))
            box = (top, left, crop_height, crop_width)
            if self.max_class_share == 1.0 or self._is_mixed(F.crop(labels[None], *box)):
                break
        return box

    def _is_mixed(self, labels: Tensor) -> bool:
        labels = labels.as_subclass(Tensor)
        counts = torch.bincount(labels[labels != 0].long())
        return len(counts) > 0 and int(counts.max()) < self.max_class_share * int(counts.sum())


class LargeScaleJitter(Augmentation):
    """Large-scale jitter for panoptic and instance training, as `Augmentation`; at scale 1 the image fits the crop."""

    def __init__(self, size: int, min_scale: float = 0.1, max_scale: float = 2.0, **kwargs: bool) -> None:
        super().__init__(size, min_scale, max_scale, **kwargs)

    def scale(self, height: int, width: int) -> float:
        """Draw a factor between the two scales, relative to the one that fits the crop."""
        factor = float(torch.empty(()).uniform_(self.min_scale, self.max_scale))
        return factor * self.size / max(height, width)


class ShortestEdgeCrop(Augmentation):
    """Random shortest edge for semantic training; arguments as of `Augmentation`.

    The shortest edge becomes `size` times one of the tenths between the two scales; the longest at most four times
    `size`.
    """

    def __init__(
        self,
        size: int,
        min_scale: float = 0.5,
        max_scale: float = 2.0,
        max_class_share: float = 0.75,
        **kwargs: bool,
    ) -> None:
        super().__init__(size, min_scale, max_scale, max_class_share=max_class_share, **kwargs)
        tenths = range(round(10 * min_scale), round(10 * max_scale) + 1)
        self.edges = [tenth * size / 10 for tenth in tenths]

    def scale(self, height: int, width: int) -> float:
        """Draw one of the lengths of the shortest edge."""
        edge = self.edges[int(torch.randint(len(self.edges), ()))]
        return min(edge / min(height, width), 4 * self.size / max(height, width))
