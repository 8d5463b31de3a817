"""Segment a large image tile by tile: each tile goes through the network by itself, and the results are merged.

What a tile's border cuts is either whole in a neighbor, or larger than the overlap. In the first case the part is
dropped, because the neighbor sees all of it. In the second the parts are joined: two segments of different tiles are
one where their masks agree in the pixels that both tiles see. Stuff is one segment of its class. Semantic maps:
`tiling.SemanticMerger`.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .postprocessing import (
    IGNORE_INDEX,
    ImageOutputs,
    class_probabilities,
    instance_segments,
    panoptic_segments,
    split_outputs,
)
from .tiling import Crop, SemanticMerger, Tiling

SAME_SEGMENT = 0.5
"""From this IoU on in the pixels that two tiles share, their segments are one."""
SHARED_PART = 0.5
"""Segments are one only if their common pixels are at least this times as large a part of the smaller one as what the
tiles share is of a tile: a few stray pixels join nothing."""
BORDER = 64
"""What comes nearer to a tile's border than its side divided by this is cut by it: masks end a few pixels early."""

Box = tuple[int, int, int, int]
"""(top, left, bottom, right) in the image's pixels."""


@dataclass
class TiledResult:
    """What was found in an image, as `post_process_*` gives it, and what the network said of the tiles.

    Attributes:
        segmentation: (H, W) on the CPU: classes (int16 or int32), or int32 ids from 1, 0 for none.
        segments_info: "id", "label_id", "was_fused", "score" and "label" of each segment; empty for semantic maps.
        masks: of each instance the box (top, left, bottom, right) and the mask within it, (height, width) bool.
        scores: of each class of a semantic map the mean probability over its pixels, where there is a threshold.
        dominant_categories: of the tiles, the most frequent first.
        class_probabilities: (K,), the highest of each class in any query of any tile.
        stuff_ids: classes that are stuff.
    """

    segmentation: Tensor
    segments_info: list[dict[str, Any]] = field(default_factory=list)
    masks: list[tuple[Box, np.ndarray]] | None = None
    scores: dict[int, float] = field(default_factory=dict)
    dominant_categories: list[str] = field(default_factory=list)
    class_probabilities: Tensor = field(default_factory=lambda: torch.zeros(0))
    stuff_ids: frozenset[int] = frozenset()


def segment_tiles(
    run: Callable[[list[Image.Image]], Any],
    image: Image.Image,
    tiling: Tiling,
    task: str,
    threshold: float | None = None,
    at_once: int = 1,
    num_classes: int | None = None,
    label_ids_to_fuse: Collection[int] | None = None,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    ignore_index: int = IGNORE_INDEX,
) -> TiledResult:
    """Segment a large image.

    Memory beyond image and result grows with a row of tiles at most, whatever their number: scores of classes are
    added up where tiles overlap (`SemanticMerger`), segments are joined across borders (`SegmentMerger`).

    Args:
        run: gives the model's outputs for a batch of tiles.
        image: RGB.
        tiling: how it is cut.
        task: "semantic", "panoptic" or "instance".
        threshold: as for the `post_process_*` method of the task, and the same for what follows; but None gives every
            pixel a class in semantic maps, and the method's own threshold else.
        at_once: tiles in one batch.
        num_classes: classes from this index on are distractors.
        label_ids_to_fuse: classes that are stuff; None for those of the outputs.
        mask_threshold: see above.
        overlap_mask_area_threshold: see above.
        ignore_index: label of pixels without a class.
    """
    size = (image.height, image.width)
    crops = tiling.crops(size)
    merger: SemanticMerger | SegmentMerger
    if task == "semantic":
        merger = SemanticMerger(crops, size, threshold, num_classes, ignore_index)
    else:
        merger = SegmentMerger(crops, size, is_panoptic=task == "panoptic")
    options: dict[str, Any] = {"mask_threshold": mask_threshold, "num_classes": num_classes}
    options |= {} if threshold is None else {"threshold": threshold}
    names: Counter[str] = Counter()
    result = TiledResult(torch.zeros(0))
    labels: list[str] | None = None
    for start in range(0, len(crops), at_once):
        tiles = [crop.cut(image) for crop in crops[start : start + at_once]]
        outputs = run(tiles)
        for dominant in outputs.dominant_categories or ():
            names.update(dominant)
        for one in split_outputs(outputs, [(tile.height, tile.width) for tile in tiles]):
            labels, result.stuff_ids = one.labels, one.stuff_ids
            highest = class_probabilities(one.class_logits)[:, :-1].amax(0).cpu()
            so_far = result.class_probabilities
            result.class_probabilities = torch.maximum(highest, so_far) if len(so_far) else highest
            if isinstance(merger, SemanticMerger):
                merger.add(one.class_logits, one.mask_logits, one.image_size)
            else:
                stuff_ids = one.stuff_ids if label_ids_to_fuse is None else label_ids_to_fuse
                merger.add(_segments_of_tile(one, task, stuff_ids, overlap_mask_area_threshold, options))
    result.dominant_categories = [name for name, _ in names.most_common()]
    if isinstance(merger, SemanticMerger):
        result.segmentation, result.scores = merger.labels.cpu(), merger.scores()
        return result
    merged = merger.result()
    result.segmentation = torch.from_numpy(merged["segmentation"])
    result.segments_info, result.masks = merged["segments_info"], merged.get("masks")
    if labels is not None:
        for segment in result.segments_info:
            segment["label"] = labels[segment["label_id"]]
    return result


def _segments_of_tile(
    outputs: ImageOutputs,
    task: str,
    stuff_ids: Collection[int],
    overlap_mask_area_threshold: float,
    options: dict[str, Any],
) -> dict[str, Any]:
    options = {**outputs.logits_and_sizes, **options, "stuff_ids": stuff_ids}
    if task == "panoptic":
        found = panoptic_segments(**options, overlap_mask_area_threshold=overlap_mask_area_threshold)
    else:
        found = instance_segments(**options, binary_maps=True)
    return {"segmentation": found[0].cpu(), "segments_info": found[1]}


@dataclass
class Piece:
    """A segment of one tile.

    Attributes:
        number: counted from 1 over all tiles.
        tile: index of the tile.
        label: index of the class.
        score: 0 to 1.
        box: around the mask.
        mask: (height, width) bool, of the box.
        is_cut: whether it ends at a border of the tile that is none of the image.
    """

    number: int
    tile: int
    label: int
    score: float
    box: Box
    mask: np.ndarray
    is_cut: bool

    def part(self, box: Box) -> np.ndarray:
        """Return the mask within a box that lies in this piece's own."""
        top, left, bottom, right = self.box
        return self.mask[box[0] - top : box[2] - top, box[1] - left : box[3] - left]


class SegmentMerger:
    """Panoptic segments or instances of an image from those of its tiles.

    Args:
        crops: the tiles, in the order in which their results will come.
        size: (height, width) of the image.
        is_panoptic: segments do not overlap: the map is painted as tiles come, and in the pixels that tiles share the
            tile goes first whose middle is nearer.
    """

    def __init__(self, crops: Sequence[Crop], size: tuple[int, int], is_panoptic: bool):
        self._regions = [crop.region for crop in crops]
        self._corners = np.array(self._regions)
        # The middles of tiles from top to bottom, and from left to right.
        self._middles = [
            np.unique(self._corners[:, axis] + self._corners[:, axis + 2]) / 2 for axis in (0, 1)
        ]
        self._size, self._is_panoptic = size, is_panoptic
        self._pieces: list[list[Piece]] = []
        self._parents: list[int] = [
            0
        ]  # union-find: of each piece's number, towards the first piece of its segment
        self._stuff: dict[int, tuple[int, float]] = {}  # of each class the number and the highest score
        self._map = np.zeros(size, dtype=np.int32)

    def add(self, result: Mapping[str, Any]) -> None:
        """Add the result of the next tile.

        Args:
            result: of `panoptic_segments`, or of `instance_segments` with `binary_maps`, as "segmentation", a tensor
                on the CPU, and "segments_info".
        """
        index = len(self._pieces)
        top, left, bottom, right = self._regions[index]
        maps = result["segmentation"].numpy()
        own: list[Piece] = []
        neighbors = self._overlapping(index)
        painted = np.zeros((bottom - top, right - left), dtype=np.int32)
        for place, segment in enumerate(result["segments_info"]):
            mask = maps == segment["id"] if self._is_panoptic else maps[place]
            if segment["was_fused"]:
                painted[mask] = self._number_of_stuff(segment)
                continue
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            if not len(rows):
                continue
            within = (int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)
            box = (within[0] + top, within[1] + left, within[2] + top, within[3] + left)
            is_cut = not self._is_whole(box, index)
            if is_cut and any(self._is_whole(box, other) for other in neighbors):
                continue
            cut = mask[within[0] : within[2], within[1] : within[3]].copy()
            piece = Piece(len(self._parents), index, segment["label_id"], segment["score"], box, cut, is_cut)
            self._parents.append(piece.number)
            own.append(piece)
            painted[within[0] : within[2], within[1] : within[3]][cut] = piece.number
        for other in neighbors:
            if other < index:
                self._join(own, self._pieces[other], self._regions[index], self._regions[other])
        self._pieces.append(own)
        if self._is_panoptic:
            self._paint(painted, index)

    def result(self) -> dict[str, Any]:
        """Return the image's segments.

        Returns:
            "segmentation": (H, W) int32 ids from 1, 0 for none; of instances that overlap the better hides the other.
            "segments_info": "id", "label_id", "was_fused" and "score" of each. "masks", for instances: of each its
            box (top, left, bottom, right) and the mask within it, (height, width) bool.
        """
        groups: dict[int, list[Piece]] = {}
        for piece in chain.from_iterable(self._pieces):
            groups.setdefault(self._first(piece.number), []).append(piece)
        if not self._is_panoptic:
            return self._instances(list(groups.values()))
        ids = np.zeros(len(self._parents), dtype=np.int32)
        segments: list[dict[str, Any]] = []
        for members in groups.values():
            best = _best(members)
            segments.append(_segment(len(segments) + 1, best.label, best.score))
            ids[[piece.number for piece in members]] = len(segments)
        for label, (number, score) in self._stuff.items():
            segments.append(_segment(len(segments) + 1, label, score, was_fused=True))
            ids[number] = len(segments)
        for rows in np.array_split(self._map, max(1, len(self._map) // 64)):
            rows[:] = ids[rows]
        return {"segmentation": self._map, "segments_info": segments}

    def _instances(self, groups: list[list[Piece]]) -> dict[str, Any]:
        groups.sort(key=lambda members: -_best(members).score)
        segments: list[dict[str, Any]] = []
        masks = []
        for number, members in enumerate(groups, start=1):
            best = _best(members)
            segments.append(_segment(number, best.label, best.score))
            masks.append(_union(members))
        for segment, ((top, left, bottom, right), mask) in zip(segments[::-1], masks[::-1], strict=True):
            self._map[top:bottom, left:right][mask] = segment["id"]
        return {"segmentation": self._map, "segments_info": segments, "masks": masks}

    def _number_of_stuff(self, segment: Mapping[str, Any]) -> int:
        number, score = self._stuff.get(segment["label_id"], (len(self._parents), 0.0))
        if number == len(self._parents):
            self._parents.append(number)
        self._stuff[segment["label_id"]] = (number, max(score, segment["score"]))
        return number

    def _overlapping(self, index: int) -> list[int]:
        own = self._corners[index]
        starts, stops = np.maximum(self._corners[:, :2], own[:2]), np.minimum(self._corners[:, 2:], own[2:])
        overlapping = np.flatnonzero((starts < stops).all(axis=1)).tolist()
        return [other for other in overlapping if other != index]

    def _is_whole(self, box: Box, index: int) -> bool:
        """Tell whether a box lies in a tile and ends at none of its borders within the image."""
        region = self._regions[index]
        for axis in (0, 1):
            start, stop, side = region[axis], region[axis + 2], self._size[axis]
            margin = max(2, (stop - start) // BORDER)
            if box[axis] < start + (margin if start > 0 else 0):
                return False
            if box[axis + 2] > stop - (margin if stop < side else 0):
                return False
        return True

    def _first(self, number: int) -> int:
        while self._parents[number] != number:
            self._parents[number] = number = self._parents[self._parents[number]]
        return number

    def _join(self, own: list[Piece], others: list[Piece], region: Box, other_region: Box) -> None:
        """Join the segments of two tiles that agree in the pixels that both see: best agreement first.

        A network may find a thing twice in one tile, so several may be joined with the same one. Those of different
        classes are joined where a border cuts one of them and neither is joined with one of its own class.
        """
        shared = _intersection(region, other_region)
        if shared is None:
            return
        pairs = []
        least = SHARED_PART * _area(shared) / _area(region)
        for piece in own:
            for other in others:
                if self._is_panoptic or piece.label == other.label or piece.is_cut or other.is_cut:
                    agreement = _agreement(piece, other, shared, least)
                    if agreement >= SAME_SEGMENT:
                        pairs.append((piece.label == other.label, agreement, piece.number, other.number))
        taken: set[int] = set()
        for is_alike, _, number, other_number in sorted(pairs, reverse=True):
            if is_alike or taken.isdisjoint((number, other_number)):
                taken |= {number, other_number}
                self._parents[self._first(number)] = self._first(other_number)

    def _paint(self, painted: np.ndarray, index: int) -> None:
        top, left, bottom, right = self._regions[index]
        place = self._map[top:bottom, left:right]
        nearest = np.ones(painted.shape, dtype=bool)
        for axis, middle in ((0, (top + bottom) / 2), (1, (left + right) / 2)):
            pixels = np.arange(self._regions[index][axis], self._regions[index][axis + 2]) + 0.5
            others = np.abs(pixels[:, None] - self._middles[axis]).min(axis=1)
            is_nearest = np.abs(pixels - middle) <= others
            nearest &= is_nearest[:, None] if axis == 0 else is_nearest
        is_new = (painted > 0) & (nearest | (place == 0))
        place[is_new] = painted[is_new]


def _intersection(first: Box, second: Box) -> Box | None:
    top, left = max(first[0], second[0]), max(first[1], second[1])
    bottom, right = min(first[2], second[2]), min(first[3], second[3])
    return (top, left, bottom, right) if top < bottom and left < right else None


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _agreement(piece: Piece, other: Piece, shared: Box, least: float) -> float:
    """Return the IoU of two masks within a box; 0 if they have less than `least` of the smaller mask in common."""
    first, second = _intersection(piece.box, shared), _intersection(other.box, shared)
    both = None if first is None or second is None else _intersection(first, second)
    if first is None or second is None or both is None:
        return 0.0
    common = int(np.count_nonzero(piece.part(both) & other.part(both)))
    if common < least * min(np.count_nonzero(piece.mask), np.count_nonzero(other.mask)):
        return 0.0
    union = np.count_nonzero(piece.part(first)) + np.count_nonzero(other.part(second)) - common
    return common / union if union else 0.0


def _best(members: Sequence[Piece]) -> Piece:
    """Return the piece whose class and score count: one that no border cuts, then the larger, then the better."""

    def merit(piece: Piece) -> tuple[bool, int, float]:
        return not piece.is_cut, np.count_nonzero(piece.mask) if piece.is_cut else 0, piece.score

    return max(members, key=merit)


def _union(members: Sequence[Piece]) -> tuple[Box, np.ndarray]:
    """Return the box around the best mask of each tile, and their union in it."""
    by_tile: dict[int, Piece] = {}
    for piece in sorted(members, key=lambda piece: piece.score):
        by_tile[piece.tile] = piece
    members = list(by_tile.values())
    if len(members) == 1:
        return members[0].box, members[0].mask
    tops, lefts, bottoms, rights = zip(*(piece.box for piece in members), strict=True)
    box = (min(tops), min(lefts), max(bottoms), max(rights))
    mask = np.zeros((box[2] - box[0], box[3] - box[1]), dtype=bool)
    for piece in members:
        top, left = piece.box[0] - box[0], piece.box[1] - box[1]
        mask[top : top + piece.mask.shape[0], left : left + piece.mask.shape[1]] |= piece.mask
    return box, mask


def _segment(number: int, label: int, score: float, was_fused: bool = False) -> dict[str, Any]:
    return {"id": number, "label_id": label, "was_fused": was_fused, "score": score}
