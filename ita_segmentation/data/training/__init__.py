"""What a training run reads: images with one mask per segment, from Scenes or from a dataset on disk.

A training example is `{"image": (3, H, W) uint8, "mask_labels": (n, H, W) bool, "class_labels": (n,) int64}` with
class indices of the training vocabulary; an evaluation example is `{"image", "label": (H, W) integers}` with class
indices of the full vocabulary. Both have `image_id` (str), and `skipped` (ids of corrupt images) if read from disk.
Targets are Mask2Former's (arXiv 2112.01527): one mask per thing instance and one per stuff class.
"""

from ita_segmentation.data.training.arguments import ITADataArguments, build_augmentation, load_data
from ita_segmentation.data.training.augmentation import LargeScaleJitter, ShortestEdgeCrop
from ita_segmentation.data.training.classes import TrainingClasses, dataset_classes, scenes_classes
from ita_segmentation.data.training.collators import EvaluationCollator, TrainingCollator
from ita_segmentation.data.training.examples import (
    INFINITE_LENGTH,
    DiskEvaluation,
    DiskTraining,
    ScenesEvaluation,
    ScenesTraining,
    load_disk,
    show_augmented,
)
from ita_segmentation.data.training.rows import CorruptImageError

__all__ = [
    "INFINITE_LENGTH",
    "CorruptImageError",
    "DiskEvaluation",
    "DiskTraining",
    "EvaluationCollator",
    "ITADataArguments",
    "LargeScaleJitter",
    "ScenesEvaluation",
    "ScenesTraining",
    "ShortestEdgeCrop",
    "TrainingClasses",
    "TrainingCollator",
    "build_augmentation",
    "dataset_classes",
    "load_data",
    "load_disk",
    "scenes_classes",
    "show_augmented",
]
