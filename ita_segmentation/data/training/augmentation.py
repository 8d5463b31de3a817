"""Augmentation of photographs for training, with torchvision's v2 transforms.

- `LargeScaleJitter` (Ghiasi et al., arXiv 2012.07177), as Mask2Former trains panoptic and instance models (arXiv
  2112.01527, section 4): an image is scaled so that it fits the crop, times a random factor, and cropped where it is
  larger.
- `ShortestEdgeCrop`, as Mask2Former trains semantic models: the shortest edge takes one of some lengths, and a crop
  that one class fills is drawn again.

Both flip half of the images, and distort colours if asked. What stays smaller than the crop stays so (the collator
pads a batch, and says where), or is filled up with grey, as Mask2Former does.

All draw from torch's global random generator; `own_randomness` lends it a seed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ita_segmentation.data.training.rows import seed_of

GREY = 128
"""What images are filled up with."""
CROP_TRIES = 10


@contextmanager
def own_randomness(*key: int) -> Iterator[None]:
    """Inside, torch's random numbers on the CPU are a function of `key` alone; afterwards they go on as if not used."""
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed_of(*key))
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


def colour_distortion() -> v2.Transform:
    """SSD's colour distortion (arXiv 1512.02325): each of brightness, contrast, saturation and hue half of the times.

    The ranges are Mask2Former's, but brightness is multiplied, not added. Colours never change places, unlike in
    torchvision's `RandomPhotometricDistort`: a red bus is not a blue bus.
    """
    parts = [
        v2.ColorJitter(brightness=32 / 255),
        v2.ColorJitter(contrast=0.5),
        v2.ColorJitter(saturation=0.5),
        v2.ColorJitter(hue=0.1),
    ]
    return v2.Compose([v2.RandomApply([part], p=0.5) for part in parts])


class Augmentation:
    """Random scale, crop, flip and colours of an image with its label map; the scale is what kinds differ in.

    Args:
        size: side of the square crop, in pixels.
        flip: flip half of the images horizontally.
        colour: distort colours.
        fill: fill images that are smaller than the crop up to it, grey, with label `void`.
        max_class_share: draw a crop again, up to ten times, of whose labelled pixels one label has more than this
            share, or all.
        void: the label of pixels that count as none.
    """

    def __init__(
        self,
        size: int,
        *,
        flip: bool,
        colour: bool,
        fill: bool,
        max_class_share: float = 1.0,
        void: int = 0,
    ) -> None:
        if not 0 < max_class_share <= 1:
            raise ValueError(f"max_class_share must be above 0 and at most 1, got {max_class_share}")
        self.size, self.fill, self.max_class_share, self.void = size, fill, max_class_share, void
        self.flip = v2.RandomHorizontalFlip(0.5 if flip else 0.0)
        self.colour = colour_distortion() if colour else None

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Draws from torch's global random generator.

        Args:
            image: (3, H, W) uint8.
            labels: (H, W) integers, resized without mixing labels.

        Returns:
            The same two, (3, h, w) and (h, w), with h and w at most `size`, or just that where images are filled.
        """
        pil_image, maps = self.flip(tv_tensors.Image(image), tv_tensors.Mask(labels[None]))
        factor = self.scale(*labels.shape)
        size = [max(1, int(side * factor + 1e-6)) for side in labels.shape]
        pil_image, maps = F.resize(pil_image, size, antialias=True), F.resize(maps, size)
        box = self._crop_box(maps[0])
        image = F.crop(pil_image, *box).as_subclass(Tensor)
        labels = F.crop(maps, *box).as_subclass(Tensor)
        if self.colour is not None:
            image = self.colour(image)
        if self.fill:
            margin = [0, 0, self.size - image.shape[2], self.size - image.shape[1]]
            image, labels = F.pad(image, margin, fill=GREY), F.pad(labels, margin, fill=self.void)
        return image.contiguous(), labels[0].contiguous()

    def scale(self, height: int, width: int) -> float:
        """What an image of this size is to be scaled by, drawn at random."""
        raise NotImplementedError

    def _crop_box(self, labels: Tensor) -> tuple[int, int, int, int]:
        """Top, left, height, width."""
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
        counts = torch.bincount(labels[labels != self.void].long())
        return len(counts) > 0 and int(counts.max()) < self.max_class_share * int(counts.sum())


class LargeScaleJitter(Augmentation):
    """Scale, crop and flip of panoptic and instance training.

    Args:
        size: side of the square crop, in pixels.
        min_scale, max_scale: range of the random factor; 1 makes the image fit the crop.
        flip, colour, fill: as of `Augmentation`.
    """

    def __init__(
        self,
        size: int,
        min_scale: float = 0.1,
        max_scale: float = 2.0,
        flip: bool = True,
        colour: bool = False,
        fill: bool = False,
    ) -> None:
        check_scales(min_scale, max_scale)
        self.min_scale, self.max_scale = min_scale, max_scale
        super().__init__(size, flip=flip, colour=colour, fill=fill)

    def scale(self, height: int, width: int) -> float:
        factor = float(torch.empty(()).uniform_(self.min_scale, self.max_scale))
        return factor * self.size / max(height, width)


class ShortestEdgeCrop(Augmentation):
    """Scale, crop, flip and colours of semantic training.

    Args:
        size: side of the square crop, in pixels.
        min_scale, max_scale: the shortest edge becomes `size` times one of the tenths from `min_scale` to
            `max_scale`; the longest at most four times `size`.
        flip, colour, fill, max_class_share: as of `Augmentation`.
    """

    def __init__(
        self,
        size: int,
        min_scale: float = 0.5,
        max_scale: float = 2.0,
        flip: bool = True,
        colour: bool = False,
        fill: bool = False,
        max_class_share: float = 0.75,
    ) -> None:
        check_scales(min_scale, max_scale)
        tenths = range(round(10 * min_scale), round(10 * max_scale) + 1)
        self.edges = [tenth * size / 10 for tenth in tenths]
        super().__init__(size, flip=flip, colour=colour, fill=fill, max_class_share=max_class_share)

    def scale(self, height: int, width: int) -> float:
        edge = self.edges[int(torch.randint(len(self.edges), ()))]
        return min(edge / min(height, width), 4 * self.size / max(height, width))


def check_scales(min_scale: float, max_scale: float) -> None:
    if not 0 < min_scale <= max_scale:
        raise ValueError(f"scales must satisfy 0 < min_scale <= max_scale, got {min_scale} and {max_scale}")
