"""Label maps to the targets of Mask2Former (arXiv 2112.01527): one mask per thing instance, one per stuff class.

An image's annotation first becomes a small map of target numbers, which goes through the augmentation; masks are made
last, of the targets in the crop. Pixels without a target (void, crowds, unseen classes, padding) belong to no mask: as
in Mask2Former they are background of every mask.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ita_segmentation.data.scenes import IGNORE_INDEX
from ita_segmentation.data.segment_maps import lookup_ids


@dataclass(frozen=True)
class TargetMap:
    """The targets of an image: 1..n (0: none) in (H, W) uint8, or int16, and their (n,) training labels."""

    numbers: Tensor
    classes: Tensor

    def masks(self) -> tuple[Tensor, Tensor]:
        """Make `mask_labels` (m, H, W) bool and `class_labels` (m,) int64 of the m targets that have a pixel."""
        counts = torch.bincount(self.numbers.flatten(), minlength=1)
        present = counts[1:].nonzero()[:, 0]
        numbers = (present + 1).to(self.numbers.dtype)
        return self.numbers[None] == numbers[:, None, None], self.classes[present]


def segment_targets(
    segment_map: np.ndarray, segments: Iterable[dict[str, Any]], training_label: np.ndarray
) -> TargetMap:
    """Find the targets of a panoptic map: things one by one, stuff merged by class; crowds are none.

    `segments` have "id", "isthing", "class_id" (or "category_id") and perhaps "iscrowd"; `training_label` (K,) is that
    of `TrainingClasses`, -1 for no target. Raises ValueError if a segment has none of the K classes.
    """
    targets: dict[tuple[bool, int], int] = {}
    classes: list[int] = []
    number_of: dict[int, int] = {}
    for segment in segments:
        class_id = segment["class_id"] if "class_id" in segment else segment["category_id"]
        if not 0 <= class_id < len(training_label):
            raise ValueError(f"its segment {segment['id']} has the class {class_id}, which does not exist")
        if segment.get("iscrowd") or training_label[class_id] < 0:
            continue
        key = (True, segment["id"]) if segment["isthing"] else (False, class_id)
        if key not in targets:
            classes.append(int(training_label[class_id]))
            targets[key] = len(classes)
        number_of[segment["id"]] = targets[key]
    numbers = lookup_ids(segment_map, number_of, default=0)[1]
    return _target_map(numbers, torch.tensor(classes, dtype=torch.int64))


def semantic_targets(
    label_map: np.ndarray, training_label: np.ndarray, ignore_index: int = IGNORE_INDEX
) -> TargetMap:
    """Find the targets of a semantic map, one per class; arguments as above. ValueError if a label is not a class."""
    seen = np.flatnonzero(training_label >= 0)
    table = np.full(max(len(training_label), ignore_index + 1), -1, np.int16)
    table[: len(training_label)] = 0
    table[seen] = np.arange(1, len(seen) + 1)
    table[ignore_index] = 0
    lowest, highest = int(label_map.min()), int(label_map.max())
    if lowest < 0 or highest >= len(table):
        raise ValueError(f"its label map contains {lowest if lowest < 0 else highest}, which is not a class")
    numbers = table[label_map]
    if numbers.min() < 0:
        raise ValueError(f"its label map contains {int(label_map[numbers < 0][0])}, which is not a class")
    return _target_map(numbers, torch.from_numpy(training_label[seen].astype(np.int64)))


def _target_map(numbers: np.ndarray, classes: Tensor) -> TargetMap:
    dtype = np.uint8 if len(classes) < 256 else np.int16
    return TargetMap(torch.from_numpy(numbers.astype(dtype)), classes)
