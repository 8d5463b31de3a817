"""Batches of Scenes for its small CLIP: single things, textures, captioned scenes, regions of scenes.

This is where unseen classes stay unseen: regions, the only batches with masks, come from scenes of seen classes; images
that may show any class come with nothing but the classes that their caption names.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ita_segmentation.data.scenes import object_image, scene, scenes_vocabulary, stuff_image
from modeling_ita.clip_backbone import CLIP_MEAN, CLIP_STD

REGION_STRIDE = 8
"""Side of the cells, in pixels, over which region masks are averaged: the dense stride 32, upsampled four times."""
MIN_REGION_AREA = 40


@dataclass
class CaptionedImages:
    """Images (B, 3, S, S) with the classes their captions name, the main one first; (B,) whether they show one."""

    pixel_values: Tensor
    named: list[list[int]]
    single: Tensor


@dataclass
class Regions:
    """Scenes (B, 3, S, S), normalized, with the masks of their R segments.

    `weights` (R, S / 8, S / 8) float32 is the share of each cell that the region covers, `images` (R,) where it lies.
    """

    pixel_values: Tensor
    weights: Tensor
    images: Tensor
    class_ids: Tensor


def to_pixel_values(images: Sequence[np.ndarray]) -> Tensor:
    """Convert (H, W, 3) uint8 images of one size to (B, 3, H, W) float32, normalized for CLIP, channels last."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (CLIP_MEAN, CLIP_STD))
    return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)


class ImageSource:
    """Draws batches in a fixed order: the n-th image is the same in every run with the same seed."""

    def __init__(self, seed: int):
        vocabulary = scenes_vocabulary()
        self.seed = seed
        self.drawn = 0
        self.rng = np.random.default_rng([seed, 31])
        self.thing_ids = vocabulary.thing_ids
        self.stuff_ids = vocabulary.stuff_ids
        self.unseen_things = [c for c in self.thing_ids if not vocabulary.seen[c]]

    def _next(self) -> int:
        self.drawn += 1
        return self.drawn

    def singles(self, batch_size: int, size: int) -> CaptionedImages:
        """Draw single things of any class (three quarters), captioned with the thing, and textures (a quarter)."""
        images, named = [], []
        for _ in range(batch_size):
            draw = object_image if self.rng.random() < 0.75 else stuff_image
            image = draw(self.seed, self._next(), size, "all")
            images.append(image.image)
            named.append([image.class_id])
        return CaptionedImages(to_pixel_values(images), named, torch.ones(batch_size, dtype=torch.bool))

    def captioned(self, batch_size: int, size: int) -> CaptionedImages:
        """Draw images of any class whose caption names everything that they show.

        A third are single things, 15% textures, a quarter have one smaller thing (every second one unseen) on some
        textures, and the others are crowded scenes.
        """
        images, named, single = [], [], []
        for kind in self.rng.choice(4, size=batch_size, p=(0.33, 0.15, 0.25, 0.27)):
            index = self._next()
            if kind == 0:
                thing = object_image(self.seed, index, size, "all")
                images.append(thing.image)
                named.append([thing.class_id, thing.background_id])
            elif kind == 1:
                texture = stuff_image(self.seed, index, size, "all")
                images.append(texture.image)
                named.append([texture.class_id])
            else:
                classes: str | list[int] = "all"
                if kind == 2:
                    unseen = self.rng.random() < 0.5 and self.unseen_things
                    classes = [int(self.rng.choice(unseen or self.thing_ids)), *self.stuff_ids]
                image = scene(self.seed, index, size, classes)
                images.append(np.asarray(image.image))
                shown = sorted(image.segments, key=lambda segment: not segment["isthing"])
                named.append(list(dict.fromkeys(segment["class_id"] for segment in shown)))
            single.append(kind < 2)
        return CaptionedImages(to_pixel_values(images), named, torch.tensor(single))

    def regions(self, batch_size: int, size: int, classes: str = "seen") -> Regions:
        """Draw scenes of seen classes (or, to evaluate, of all) with every segment's mask, averaged over 8 px cells."""
        images, weights, image_indices, class_ids = [], [], [], []
        cells = size // REGION_STRIDE
        for number in range(batch_size):
            image = scene(self.seed, self._next(), size, classes)
            images.append(np.asarray(image.image))
            for segment in image.segments:
                mask = image.panoptic == segment["id"]
                if mask.sum() < MIN_REGION_AREA:
                    continue
                weights.append(mask.reshape(cells, REGION_STRIDE, cells, REGION_STRIDE).mean((1, 3)))
                image_indices.append(number)
                class_ids.append(segment["class_id"])
        return Regions(
            to_pixel_values(images),
            torch.from_numpy(np.stack(weights)).float(),
            torch.tensor(image_indices),
            torch.tensor(class_ids),
        )
