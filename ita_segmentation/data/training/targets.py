"""Label maps -> what Mask2Former (arXiv 2112.01527) learns from: one mask per thing instance, one per stuff class.

An image's annotation first becomes a *target map*: every pixel holds the number of its target, from 1, or 0 where it
has none. This small map goes through the augmentation; masks are made last, of what the crop holds. Pixels of no
target (void, crowds, classes that are not seen, padding) belong to no mask: as in Mask2Former they are background of
every mask.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ita_segmentation.data.scenes import IGNORE_INDEX


@dataclass(frozen=True)
class TargetMap:
    """Targets of an image.

    Attributes:
        numbers: (H, W) uint8, or int16 for more than 255 targets: 1..n, and 0 where there is none.
        classes: (n,) int64, class of each target in the training vocabulary.
    """

    numbers: Tensor
    classes: Tensor

    def masks(self) -> tuple[Tensor, Tensor]:
        """`mask_labels` (m, H, W) bool and `class_labels` (m,) int64 of the m targets that have a pixel."""
        counts = torch.bincount(self.numbers.flatten(), minlength=1)
        present = counts[1:].nonzero()[:, 0]
        numbers = (present + 1).to(self.numbers.dtype)
        return self.numbers[None] == numbers[:, None, None], self.classes[present]


def segment_map_targets(
    segment_map: np.ndarray, segments: Iterable[dict[str, Any]], training_label: np.ndarray
) -> TargetMap:
    """Targets of a panoptic map, things one by one and stuff merged by class.

    Args:
        segment_map: (H, W) integer ids.
        segments: {"id", "class_id", "isthing"} of each and perhaps "iscrowd"; crowds are no targets.
        training_label: (K,) as in `TrainingClasses.training_label`; classes at -1 are no targets.

    Raises:
        ValueError: a segment is of none of the K classes.
    """
    targets: dict[tuple[bool, int], int] = {}
    classes: list[int] = []
    number_of: dict[int, int] = {}
    for segment in segments:
        class_id = segment["class_id"]
        if not 0 <= class_id < len(training_label):
            raise ValueError(f"its segment {segment['id']} is of class {class_id}, which is none")
        if segment.get("iscrowd") or training_label[class_id] < 0:
            continue
        key = (True, segment["id"]) if segment["isthing"] else (False, class_id)
        if key not in targets:
            classes.append(int(training_label[class_id]))
            targets[key] = len(classes)
        number_of[segment["id"]] = targets[key]
    numbers = torch.from_numpy(_renumber(segment_map, number_of, len(classes)))
    return TargetMap(numbers, torch.tensor(classes, dtype=torch.int64))


def label_map_targets(
    label_map: np.ndarray, training_label: np.ndarray, ignore_index: int = IGNORE_INDEX
) -> TargetMap:
    """Targets of a semantic map (H, W) of class ids and `ignore_index`: one per class.

    Raises:
        ValueError: the map holds what is no class.
    """
    seen = np.flatnonzero(training_label >= 0)
    table = np.full(max(len(training_label), ignore_index + 1), -1, np.int16)
    table[: len(training_label)] = 0
    table[seen] = np.arange(1, len(seen) + 1)
    table[ignore_index] = 0
    lowest, highest = int(label_map.min()), int(label_map.max())
    if lowest < 0 or highest >= len(table):
        raise ValueError(f"its label map holds {lowest if lowest < 0 else highest}, which is no class")
    numbers = table[label_map]
    if numbers.min() < 0:
        raise ValueError(f"its label map holds {int(label_map[numbers < 0][0])}, which is no class")
    classes = torch.from_numpy(training_label[seen].astype(np.int64))
    return TargetMap(torch.from_numpy(numbers.astype(_small_type(len(seen)))), classes)


def segment_targets(
    segment_map: np.ndarray, segments: Iterable[dict[str, Any]], training_label: np.ndarray
) -> tuple[Tensor, Tensor]:
    """`mask_labels` (n, H, W) bool and `class_labels` (n,) int64; arguments as of `segment_map_targets`."""
    return segment_map_targets(segment_map, segments, training_label).masks()


def semantic_targets(
    label_map: np.ndarray, training_label: np.ndarray, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor]:
    """`mask_labels` (n, H, W) bool and `class_labels` (n,) int64; arguments as of `label_map_targets`."""
    return label_map_targets(label_map, training_label, ignore_index).masks()


def _small_type(num_targets: int) -> type:
    return np.uint8 if num_targets < 256 else np.int16


def _renumber(ids: np.ndarray, number_of: dict[int, int], num_targets: int) -> np.ndarray:
    """(H, W) ids -> (H, W) numbers, 0 for ids that have none; looks up once per run of equal ids."""
    if not number_of:
        return np.zeros(ids.shape, np.uint8)
    flat = ids.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    known = np.array(sorted(number_of), flat.dtype)
    numbers: np.ndarray = np.array([number_of[key] for key in sorted(number_of)], _small_type(num_targets))
    places = np.searchsorted(known, flat[starts]).clip(max=len(known) - 1)
    found = np.where(known[places] == flat[starts], numbers[places], 0).astype(numbers.dtype)
    return np.repeat(found, np.diff(starts, append=len(flat))).reshape(ids.shape)
