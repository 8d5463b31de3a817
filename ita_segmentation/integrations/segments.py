"""What the read-outs of `ITAImageProcessor` return, as a list of masks: the common ground of all exchange formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Names = Sequence[Any] | Mapping[int, str]
"""Class names: a vocabulary (names, or lists of synonyms) or a configuration's `id2label`."""


@dataclass(frozen=True)
class Segment:
    """One region of an image.

    Attributes:
        id: the segment's number in its map; for a semantic map the class's index.
        label_id: index of the class in the vocabulary.
        mask: (H, W) bool, with at least one pixel.
        score: 0 to 1; None where the read-out gives none (semantic).
    """

    id: int
    label_id: int
    mask: np.ndarray
    score: float | None

    @property
    def area(self) -> int:
        """Pixels."""
        return int(self.mask.sum())

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(x, y, width, height) in pixels of the smallest box around the mask."""
        rows, columns = np.flatnonzero(self.mask.any(axis=1)), np.flatnonzero(self.mask.any(axis=0))
        x, y = int(columns[0]), int(rows[0])
        return x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1


def segments_of(result: Any) -> list[Segment]:
    """The segments of one image that have pixels.

    Args:
        result: an item of `post_process_semantic_segmentation` ((H, W) class indices, array or tensor; negative
            ones are no class), of `post_process_panoptic_segmentation`, or of `post_process_instance_segmentation`,
            with a map or with `return_binary_maps`.

    Returns:
        in the order of `segments_info`; by class for a semantic map.

    Raises:
        ValueError: for anything else, run lengths included.
    """
    if not isinstance(result, Mapping) or "segments_info" not in result:
        classes = _array(result["segmentation"] if isinstance(result, Mapping) else result)
        if classes.ndim != 2 or classes.dtype.kind not in "iu":
            raise ValueError(
                f"a semantic result is a map (H, W) of class indices, got {classes.dtype} {classes.shape}"
            )
        found = np.unique(classes)
        return [Segment(int(one), int(one), classes == one, None) for one in found if one >= 0]
    if isinstance(result["segmentation"], list):
        raise ValueError("run lengths do not tell the image's size: use return_binary_maps=True")
    maps, entries = _array(result["segmentation"]), result["segments_info"]
    if maps.ndim == 3 and len(maps) != len(entries):
        raise ValueError(f"{len(maps)} masks, but {len(entries)} segments")
    segments = []
    for index, entry in enumerate(entries):
        mask = maps[index].astype(bool) if maps.ndim == 3 else maps == entry["id"]
        if mask.any():
            segments.append(Segment(int(entry["id"]), int(entry["label_id"]), mask, entry.get("score")))
    return segments


def size_of(result: Any) -> tuple[int, int]:
    """(height, width) of a result's maps."""
    maps = _array(result["segmentation"] if isinstance(result, Mapping) else result)
    return int(maps.shape[-2]), int(maps.shape[-1])


def name_of(names: Names, label_id: int) -> str:
    """The first name of a class.

    Raises:
        ValueError: if there is no such class.
    """
    try:
        name = names[label_id]
    except (IndexError, KeyError) as error:
        raise ValueError(f"class {label_id} is not among the {len(names)} names given") from error
    return name if isinstance(name, str) else str(name[0])


def _array(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
