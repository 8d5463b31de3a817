"""Batches of Scenes pictures for its small CLIP: single things, textures, captioned scenes, regions of scenes.

The split is kept here. Regions, the only batches with masks, are cut from scenes of seen classes alone; pictures
that may show any class carry nothing but the list of what their caption names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modeling_ita.clip_backbone import CLIP_MEAN, CLIP_STD

from .scenes import object_picture, scene, scenes_vocabulary, stuff_picture

REGION_STRIDE = 8
"""Side of the cells, in pixels, over which region masks are averaged: the dense stride 32, upsampled four times."""
MIN_REGION_AREA = 40


@dataclass
class CaptionedPictures:
    """Pictures with what their captions name.

    Attributes:
        pixel_values: (B, 3, S, S) float32, normalised.
        named: class ids that each caption names; the first one is what the picture shows above all.
        single: (B,) bool, whether the picture shows one thing or one texture.
    """

    pixel_values: Tensor
    named: list[list[int]]
    single: Tensor


@dataclass
class Regions:
    """Scenes with the masks of their segments.

    Attributes:
        pixel_values: (B, 3, S, S) float32, normalised.
        weights: (R, S / 8, S / 8) float32, the share of each cell that the region covers.
        pictures: (R,) int64, the picture that each region lies in.
        class_ids: (R,) int64.
    """

    pixel_values: Tensor
    weights: Tensor
    pictures: Tensor
    class_ids: Tensor


def to_pixel_values(images: Sequence[np.ndarray]) -> Tensor:
    """(H, W, 3) uint8 pictures of one size -> (B, 3, H, W) float32, normalised as CLIP's are, channels last."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (CLIP_MEAN, CLIP_STD))
    return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)


class PictureSource:
    """Draws batches in a fixed order: the n-th picture of a source is the same in every run with its seed."""

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

    def singles(self, batch_size: int, size: int) -> CaptionedPictures:
        """Three quarters single things of any class, captioned with the thing; a quarter textures alone."""
        images, named = [], []
        for _ in range(batch_size):
            picture = (object_picture if self.rng.random() < 0.75 else stuff_picture)(
                self.seed, self._next(), size, "all"
            )
            images.append(picture.image)
            named.append([picture.class_id])
        return CaptionedPictures(to_pixel_values(images), named, torch.ones(batch_size, dtype=torch.bool))

    def captioned(self, batch_size: int, size: int) -> CaptionedPictures:
        """Pictures of any class whose caption names everything that they show.

        A third single things, 15% textures alone, a quarter one smaller thing (every second one unseen) on some
        textures, the rest crowded scenes.
        """
        images, named, single = [], [], []
        for kind in self.rng.choice(4, size=batch_size, p=(0.33, 0.15, 0.25, 0.27)):
            index = self._next()
            if kind == 0:
                thing = object_picture(self.seed, index, size, "all")
                images.append(thing.image)
                named.append([thing.class_id, thing.background_id])
            elif kind == 1:
                texture = stuff_picture(self.seed, index, size, "all")
                images.append(texture.image)
                named.append([texture.class_id])
            else:
                classes: str | list[int] = "all"
                if kind == 2:
                    ids = (
                        self.unseen_things
                        if self.rng.random() < 0.5 and self.unseen_things
                        else self.thing_ids
                    )
                    classes = [int(self.rng.choice(ids)), *self.stuff_ids]
                picture = scene(self.seed, index, size, classes)
                images.append(np.asarray(picture.image))
                shown = sorted(picture.segments, key=lambda segment: not segment["isthing"])
                named.append(list(dict.fromkeys(segment["class_id"] for segment in shown)))
            single.append(kind < 2)
        return CaptionedPictures(to_pixel_values(images), named, torch.tensor(single))

    def regions(self, batch_size: int, size: int, classes: str = "seen") -> Regions:
        """Scenes of seen classes (or, to evaluate, of all) with every segment's mask, averaged over 8 px cells."""
        images, weights, pictures, class_ids = [], [], [], []
        cells = size // REGION_STRIDE
        for number in range(batch_size):
            picture = scene(self.seed, self._next(), size, classes)
            images.append(np.asarray(picture.image))
            for segment in picture.segments:
                mask = picture.panoptic == segment["id"]
                if mask.sum() < MIN_REGION_AREA:
                    continue
                weights.append(mask.reshape(cells, REGION_STRIDE, cells, REGION_STRIDE).mean((1, 3)))
                pictures.append(number)
                class_ids.append(segment["class_id"])
        return Regions(
            to_pixel_values(images),
            torch.from_numpy(np.stack(weights)).float(),
            torch.tensor(pictures),
            torch.tensor(class_ids),
        )
