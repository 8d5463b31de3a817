"""Large images as overlapping tiles, each through the network by itself: the tiles, and one class map of all of them.

Class scores of all crops of an image that cover a pixel are added up. Where crops begin and end cuts the image into
cells whose pixels are all in the same crops; a cell is scored as soon as the last of its crops is there, and of a crop
only what cells to come need is kept. So neither dense scores nor the masks of many crops are ever held.

Symbols: Q queries, K classes, (h, w) a mask's size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise, product

import torch
from PIL import Image
from torch import Tensor

from .mask_tiles import MaskTiles, row_tiles
from .pixel_classifier import PixelClassifier
from .postprocessing import IGNORE_INDEX, class_probabilities

MIN_TILE = 32
"""Least side of a tile in pixels: the image tower's largest stride."""


@dataclass(frozen=True)
class Crop:
    """A region of an image as the network sees it.

    Attributes:
        region: (top, left, bottom, right) in the image's pixels.
        size: (height, width) of the network's input, before padding.
        flipped: mirrored horizontally.
    """

    region: tuple[int, int, int, int]
    size: tuple[int, int]
    flipped: bool = False

    @property
    def region_size(self) -> tuple[int, int]:
        """Height and width in the image's pixels."""
        top, left, bottom, right = self.region
        return bottom - top, right - left

    def cut(self, image: Image.Image) -> Image.Image:
        """Cut the region out of the image, at its own size, and mirror it if `flipped`."""
        top, left, bottom, right = self.region
        cut = image.crop((left, top, right, bottom))
        return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flipped else cut


@dataclass(frozen=True)
class Tiling:
    """How large images are cut into tiles.

    Attributes:
        size: side of the square tiles, in the image's pixels, at least 32. An image of no larger sides is one tile.
        overlap: pixels that neighbors share at least, below `size`; None for a quarter of it. Objects up to this size
            are whole in some tile.

    Raises:
        ValueError: in one line, if a number is out of range.
    """

    size: int
    overlap: int | None = None

    def __post_init__(self) -> None:
        if not _is_whole(self.size) or self.size < MIN_TILE:
            raise ValueError(f"tiles are at least {MIN_TILE} pixels wide, got {self.size!r}")
        if self.overlap is not None and not (_is_whole(self.overlap) and 0 <= self.overlap < self.size):
            raise ValueError(
                f"the overlap of tiles of {self.size} pixels is from 0 to {self.size - 1}, got {self.overlap!r}"
            )

    @property
    def stride(self) -> int:
        """Pixels from one tile to the next."""
        return self.size - (self.size // 4 if self.overlap is None else self.overlap)

    def crops(self, image_size: tuple[int, int]) -> list[Crop]:
        """Return the tiles of an image of (height, width) pixels at their own size, row by row."""
        rows, columns = (spans(side, self.size, self.stride) for side in image_size)
        return [
            Crop((top, left, bottom, right), (bottom - top, right - left))
            for (top, bottom), (left, right) in product(rows, columns)
        ]


def tiling_of(tiles: int | None, overlap: int | None = None) -> Tiling | None:
    """Give the tiling of two numbers as users type them; None where there is none.

    Raises:
        ValueError: an overlap without tiles, or numbers that `Tiling` refuses.
    """
    if tiles is None and overlap is not None:
        raise ValueError("tile_overlap is for tiles")
    return None if tiles is None else Tiling(tiles, overlap)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def spans(length: int, window: int | None, stride: int | None = None) -> list[tuple[int, int]]:
    """Return where windows begin and end along a side, `stride` apart (by default `window`); the last ends with it.

    A window that is None or at least as long as the side covers all of it.
    """
    if window is None or window >= length:
        return [(0, length)]
    starts = [*range(0, length - window, stride or window), length - window]
    return [(start, start + window) for start in starts]


@dataclass(eq=False)
class _Cell:
    """A part of the image whose pixels are in the same crops: (start, stop) of its rows and columns, and the crops."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    crops: list[int]


class _HeldCrop:
    """The class probabilities (Q, K) of a crop, and its masks for any part of the image."""

    def __init__(self, crop: Crop, class_logits: Tensor, mask_logits: Tensor) -> None:
        self.top, self.left, _, self.right = crop.region
        self.flipped = crop.flipped
        self.probabilities = class_probabilities(class_logits)[:, :-1]
        self._masks = MaskTiles(mask_logits, crop.size, crop.region_size)

    def _own(self, start: int, stop: int) -> slice:
        """Convert columns of the image to the crop's own."""
        if self.flipped:
            return slice(self.right - stop, self.right - start)
        return slice(start - self.left, stop - self.left)

    def mask_probabilities(self, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        """Return (rows, columns, Q) for a part of the image that the crop covers."""
        own_rows = slice(rows[0] - self.top, rows[1] - self.top)
        found = self._masks.block(own_rows, self._own(*columns)).sigmoid_()
        return found.flip(1) if self.flipped else found

    def keep(self, rows: tuple[int, int], columns: tuple[int, int]) -> None:
        """Forget what is needed for none of these pixels."""
        self._masks.keep(slice(rows[0] - self.top, rows[1] - self.top), self._own(*columns))


class SemanticMerger:
    """The class with the highest sum of scores over the crops of an image, and how probable it is.

    A class's probability at a pixel is that of `postprocessing.semantic_map`, its complement the geometric mean over
    the crops that cover the pixel.

    Args:
        crops: cover every pixel of the image, in the order in which their outputs will come.
        size: (height, width) of the image.
        threshold: as for `semantic_map`.
        num_classes: as for `semantic_map`.
        ignore_index: as for `semantic_map`.

    Attributes:
        labels: (height, width), integer; complete when all crops are added.
    """

    def __init__(
        self,
        crops: Sequence[Crop],
        size: tuple[int, int],
        threshold: float | None = None,
        num_classes: int | None = None,
        ignore_index: int = IGNORE_INDEX,
    ):
        self._crops, self._size = crops, size
        self._threshold, self._ignore_index = threshold, ignore_index
        self._num_classes, self._rejects = num_classes or 0, False
        self._held: dict[int, _HeldCrop] = {}
        self._waiting = _cells(crops)
        self._needed: dict[int, set[_Cell]] = {}
        for cell in chain.from_iterable(self._waiting.values()):
            for index in cell.crops:
                self._needed.setdefault(index, set()).add(cell)
        self._count = 0
        self.labels = torch.zeros(0, dtype=torch.int32)
        self._sums = self._pixels = torch.zeros(0)

    def add(
        self, class_logits: Tensor, mask_logits: Tensor, network_size: tuple[int, int] | None = None
    ) -> None:
        """Add the output of the next crop.

        Args:
            class_logits: (Q, K + 1), void last.
            mask_logits: (Q, h, w).
            network_size: height and width at which the network saw the crop; None for the crop's `size`.
        """
        crop = self._crops[self._count]
        if network_size is not None:
            crop = replace(crop, size=network_size)
        if not self._count:
            self._start(class_logits)
        self._held[self._count] = _HeldCrop(crop, class_logits, mask_logits)
        touched = {self._count}
        for cell in self._waiting.pop(self._count, ()):
            self._score(cell)
            touched.update(cell.crops)
            for index in cell.crops:
                self._needed[index].discard(cell)
        self._count += 1
        for index in touched:
            self._forget(index)

    def _start(self, class_logits: Tensor) -> None:
        total, device = class_logits.shape[1] - 1, class_logits.device
        self._num_classes = self._num_classes or total
        self._rejects = self._threshold is not None or self._num_classes < total
        if self._rejects and 0 <= self._ignore_index < self._num_classes:
            raise ValueError(f"ignore_index {self._ignore_index} is one of {self._num_classes} classes")
        kind = torch.int16 if total < 2**15 else torch.int32
        self.labels = torch.zeros(self._size, dtype=kind, device=device)
        self._sums = torch.zeros(total, dtype=torch.float64, device=device)
        self._pixels = torch.zeros(total, dtype=torch.int64, device=device)

    def _score(self, cell: _Cell) -> None:
        held = [self._held[index] for index in cell.crops]
        (top, bottom), (left, right) = cell.rows, cell.columns
        place = self.labels[top:bottom, left:right]
        classifier = PixelClassifier(torch.cat([one.probabilities for one in held]))
        if not classifier.is_possible:
            if self._rejects:
                place.fill_(self._ignore_index)
            return
        for rows in row_tiles((bottom - top, right - left), 3 * len(classifier.queries)):
            part = (top + rows.start, top + rows.stop)
            masks = torch.cat([one.mask_probabilities(part, cell.columns) for one in held], dim=-1)
            masks = masks.flatten(0, 1)[:, classifier.queries]
            best = classifier.best(masks)
            if self._threshold is not None:
                shown = 1 - classifier.misses(masks, best) ** (1 / len(held))
                is_shown = shown >= self._threshold
                self._pixels += best[is_shown].bincount(minlength=len(self._pixels))
                self._sums += best[is_shown].bincount(shown[is_shown].double(), minlength=len(self._sums))
                best[~is_shown] = self._ignore_index
            if self._rejects:
                best[best >= self._num_classes] = self._ignore_index
            place[rows] = best.unflatten(0, (-1, right - left)).to(place.dtype)

    def _forget(self, index: int) -> None:
        """Of a crop that is held, keep what the cells to come need."""
        cells = self._needed.get(index)
        if not cells:
            del self._held[index]
            return
        tops, bottoms = zip(*(cell.rows for cell in cells), strict=True)
        lefts, rights = zip(*(cell.columns for cell in cells), strict=True)
        self._held[index].keep((min(tops), max(bottoms)), (min(lefts), max(rights)))

    def scores(self) -> dict[int, float]:
        """Return the mean probability of each class over its pixels; only with a threshold."""
        found = self._pixels[: self._num_classes].nonzero().flatten().tolist()
        return {one: round(float(self._sums[one] / self._pixels[one]), 6) for one in found}


def _cells(crops: Sequence[Crop]) -> dict[int, list[_Cell]]:
    """Cut an image into cells: for each crop those whose last crop it is."""
    tops, lefts, bottoms, rights = zip(*(crop.region for crop in crops), strict=True)
    cells: dict[int, list[_Cell]] = {}
    column_spans = list(pairwise(sorted({*lefts, *rights})))
    for rows in pairwise(sorted({*tops, *bottoms})):
        in_rows = [one for one in range(len(crops)) if tops[one] <= rows[0] and rows[1] <= bottoms[one]]
        for columns in column_spans:
            covering = [one for one in in_rows if lefts[one] <= columns[0] and columns[1] <= rights[one]]
            if covering:
                cells.setdefault(covering[-1], []).append(_Cell(rows, columns, covering))
    return cells
