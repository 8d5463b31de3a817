"""Results of `post_process_*` as lists of masks: the common ground of label maps, datasets and exchange formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ClassNames = Sequence[Any] | Mapping[int, str]
"""Class names: a vocabulary (names, or lists of synonyms) or a configuration's `id2label`."""
ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Segment:
    """One region of an image.

    Attributes:
        id: the segment's number in its map; for a semantic map the index of the class.
        label_id: index of the class in the vocabulary.
        mask: (H, W) bool, with at least one pixel; of a result with a mask for each instance, that very memory.
        score: 0 to 1; None where the result has none.
    """

    id: int
    label_id: int
    mask: np.ndarray
    score: float | None

    @property
    def area(self) -> int:
        """Number of pixels."""
        return int(np.count_nonzero(self.mask))

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(x, y, width, height) in pixels of the smallest box around the mask."""
        return box_of(self.mask)


def segments_of(result: Any) -> list[Segment]:
    """List the segments of one image that have pixels.

    Args:
        result: an item of `post_process_semantic_segmentation` ((H, W) class indices, array or tensor; negative ones
            are no class), of `post_process_panoptic_segmentation`, or of `post_process_instance_segmentation`, with a
            map or with `return_binary_maps`. A semantic map may also come as {"segmentation": map, "scores": {class
            index: score}, "ignore_index": value of pixels without a class}, and instances as {"segmentation": map,
            "segments_info": list, "masks": for each its box (top, left, bottom, right) and the mask within it}.

    Returns:
        the segments in the order of `segments_info`; by class for a semantic map.

    Raises:
        ValueError: anything else, run lengths included.
    """
    return list(iterate_segments(result))


def iterate_segments(result: Any) -> Iterator[Segment]:
    """Yield what `segments_of` lists, one mask at a time."""
    if not isinstance(result, Mapping) or "segments_info" not in result:
        yield from _semantic_segments(result)
        return
    if isinstance(result["segmentation"], list):
        raise ValueError("run lengths do not tell the image's size: use return_binary_maps=True")
    maps, entries = as_array(result["segmentation"]), result["segments_info"]
    if result.get("masks") is not None:
        yield from _boxed_segments(maps.shape, entries, result["masks"])
        return
    if maps.ndim == 3 and len(maps) != len(entries):
        raise ValueError(f"{len(maps)} masks, but {len(entries)} segments")
    for index, entry in enumerate(entries):
        mask = maps[index].astype(bool, copy=False) if maps.ndim == 3 else maps == entry["id"]
        if mask.any():
            yield Segment(int(entry["id"]), int(entry["label_id"]), mask, entry.get("score"))


def _boxed_segments(shape: Sequence[int], entries: Sequence[Any], masks: Sequence[Any]) -> Iterator[Segment]:
    for entry, ((top, left, bottom, right), within) in zip(entries, masks, strict=True):
        mask = np.zeros(shape, dtype=bool)
        mask[top:bottom, left:right] = within
        yield Segment(int(entry["id"]), int(entry["label_id"]), mask, entry.get("score"))


def _semantic_segments(result: Any) -> Iterator[Segment]:
    options = result if isinstance(result, Mapping) else {}
    classes = as_array(options["segmentation"] if options else result)
    if classes.ndim != 2 or classes.dtype.kind not in "iu":
        raise ValueError(
            f"a semantic result is a map (H, W) of class indices, got {classes.dtype} {classes.shape}"
        )
    scores = options.get("scores") or {}
    for one in values_of(classes):
        if one >= 0 and one != options.get("ignore_index"):
            yield Segment(one, one, classes == one, scores.get(one))


def size_of(result: Any) -> tuple[int, int]:
    """Return (height, width) of a result's maps."""
    maps = as_array(result["segmentation"] if isinstance(result, Mapping) else result)
    return int(maps.shape[-2]), int(maps.shape[-1])


def name_of(names: ClassNames, label_id: int) -> str:
    """Return the first name of a class."""
    try:
        name = names[label_id]
    except (IndexError, KeyError) as error:
        raise ValueError(f"class {label_id} is not among the {len(names)} names given") from error
    return name if isinstance(name, str) else str(name[0])


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return (x, y, width, height) of the smallest box around a mask that has a pixel."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1


def values_of(label_map: np.ndarray) -> list[int]:
    """List in order the values in a map, (H, W); sorting only one pixel of each run."""
    flat = label_map.ravel()
    is_start = np.ones(len(flat), dtype=bool)
    np.not_equal(flat[1:], flat[:-1], out=is_start[1:])
    return np.unique(flat[is_start]).tolist()


def areas_and_boxes(label_map: np.ndarray) -> dict[int, tuple[int, tuple[int, int, int, int]]]:
    """Measure all segments of a map in one pass: area, and the smallest box (x, y, width, height).

    Args:
        label_map: (H, W) ids of at least 0.
    """
    count, width = int(label_map.max(initial=0)) + 1, label_map.shape[1]
    areas = np.zeros(count, dtype=np.int64)
    first = np.full((2, count), np.iinfo(np.int64).max)
    last = np.full((2, count), -1)
    for top in range(0, len(label_map), ROWS_AT_ONCE):
        rows = label_map[top : top + ROWS_AT_ONCE]
        is_start = np.ones(rows.shape, dtype=bool)
        np.not_equal(rows[:, 1:], rows[:, :-1], out=is_start[:, 1:])
        starts = np.flatnonzero(is_start)
        ids = rows.ravel()[starts]
        stops = np.append(starts[1:], rows.size)
        np.add.at(areas, ids, stops - starts)
        y, x = starts // width, starts % width
        for axis, low, high in ((0, x, x + stops - starts - 1), (1, y + top, y + top)):
            np.minimum.at(first[axis], ids, low)
            np.maximum.at(last[axis], ids, high)
    sides = last - first + 1
    return {
        number: (
            int(areas[number]),
            (int(first[0, number]), int(first[1, number]), int(sides[0, number]), int(sides[1, number])),
        )
        for number in np.flatnonzero(areas).tolist()
    }


def as_array(values: Any) -> np.ndarray:
    """Return an array, or a tensor of any device, as an array."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
