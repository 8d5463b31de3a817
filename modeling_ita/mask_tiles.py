"""Masks at the output's size without holding them: tiles of rows, the region of one mask, blocks with bounds.

A mask logit covers 4 x 4 pixels of the network input, and a photograph has many pixels more. Both bilinear resizes
between them are separable and convex: a pixel's logit is a weighted mean of a few mask logits, at most four along each
side, and lies between the lowest and the highest of them. So most of an image is decided by bounds on blocks of pixels,
and only blocks in which something can change are computed pixel by pixel (`fill_map`).

Symbols: Q queries, (h, w) a mask's size, (H, W) the output's size.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .ops import IMAGE_STRIDE, MASK_STRIDE

TILE_BYTES = 8 * 2**20  # memory of one tile of output rows; fits most caches
REGION_SIDE = 512  # pixels of a part of one query's region
MIN_PIXELS_PER_CELL = 4  # along a side, from which on blocks are worth their bounds


def row_tiles(size: tuple[int, int], values_per_pixel: int) -> Iterator[slice]:
    """Yield tiles of rows that cover an image.

    Args:
        size: height and width of the image.
        values_per_pixel: float32 numbers held for each pixel. A tile has as many rows as `TILE_BYTES` allow, at least
            one.
    """
    height, width = size
    step = max(1, TILE_BYTES // (4 * width * max(1, values_per_pixel)))
    for start in range(0, height, step):
        yield slice(start, min(start + step, height))


def split_pixels(values: Tensor, values_per_pixel: int) -> tuple[Tensor, ...]:
    """Split (pixels, n) so that `values_per_pixel` float32 numbers for each pixel of a part fit `TILE_BYTES`."""
    return values.split(max(1, TILE_BYTES // (4 * values_per_pixel)))


class MaskTiles:
    """The mask logits of one image at the output's size, computed in tiles of whole rows.

    Both bilinear resizes (mask to network input, valid part of the network input to the requested size) are separable,
    so a tile of output rows needs few mask rows, and no tensor of size (Q, height, width) is ever held. Within a tile,
    memory is laid out with queries last, so a resizing step is one long loop and scoring is a matrix product.

    Without `target_size` the output is the network input (4h, 4w). With it, masks are resized to the network input,
    cropped to `image_size` and resized to `target_size`, both bilinearly with `align_corners=False`. Without
    `image_size` nothing is cropped, and masks that already have the target's size are not resized.

    Args:
        mask_logits: (Q, h, w).
        image_size: height and width of the image before padding.
        target_size: height and width of the output.
    """

    def __init__(
        self,
        mask_logits: Tensor,
        image_size: Sequence[int] | None = None,
        target_size: Sequence[int] | None = None,
    ):
        if image_size is not None and target_size is not None:
            rows, columns = (
                math.ceil(side / IMAGE_STRIDE) * IMAGE_STRIDE // MASK_STRIDE for side in image_size
            )
            mask_logits = mask_logits[:, :rows, :columns]  # without the padding of the batch
        height, width = mask_logits.shape[-2:]
        self._is_identity = (
            image_size is None and target_size is not None and tuple(target_size) == (height, width)
        )
        if self._is_identity:
            self._row_steps, self._column_steps = (height, height, height), (width, width, width)
        else:
            network = (height * MASK_STRIDE, width * MASK_STRIDE)
            cropped = network if image_size is None or target_size is None else tuple(image_size)
            target = network if target_size is None else target_size
            self._row_steps = (network[0], int(cropped[0]), int(target[0]))
            self._column_steps = (network[1], int(cropped[1]), int(target[1]))
        self.size = (self._row_steps[-1], self._column_steps[-1])
        self._width = width
        self._row_weights = _weights(height, self._row_steps)
        self._cells = mask_logits.permute(1, 2, 0)  # (h, w, Q)
        self._first_cell = (0, 0)  # row and column
        if not self._is_identity:
            self._cells = self._cells.float().contiguous()

    @property
    def device(self) -> torch.device:
        """Where the masks are."""
        return self._cells.device

    def tiles(self, values_per_pixel: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows of each tile and its logits (rows, W, Q) float32, which the caller may overwrite.

        Args:
            values_per_pixel: as for `row_tiles`.
        """
        for rows in row_tiles(self.size, values_per_pixel):
            yield rows, self.rows(rows)

    def rows(self, rows: slice) -> Tensor:
        """Return the logits (rows, W, Q) float32 of some output rows, at least one; the caller may overwrite them."""
        if self._is_identity:
            return self._cells[rows].to(torch.float32, copy=True)
        weights, source = _touched(self._row_weights[rows])
        cells = self._cells[source]
        logits = (weights.to(cells.device) @ cells.flatten(1)).unflatten(1, cells.shape[1:])
        return _resize_columns(logits, self._column_steps)

    def block(self, rows: slice, columns: slice) -> Tensor:
        """Return the logits (rows, columns, Q) float32 of a part of the output; the caller may overwrite them."""
        row_weights, source_rows = _touched(self._row_weights[rows], self._first_cell[0])
        column_weights, source_columns = _touched(self._column_weights[columns], self._first_cell[1])
        cells = self._cells[source_rows, source_columns].float()
        resized = (row_weights.to(cells.device) @ cells.flatten(1)).unflatten(1, cells.shape[1:])
        return column_weights.to(cells.device) @ resized

    def keep(self, rows: slice, columns: slice) -> None:
        """Forget what no part of these output rows and columns needs: from now on only `block` works, within them."""
        _, source_rows = _touched(self._row_weights[rows], self._first_cell[0])
        _, source_columns = _touched(self._column_weights[columns], self._first_cell[1])
        kept = self._cells[source_rows, source_columns]
        if kept.shape != self._cells.shape:
            self._cells = kept.clone()
            self._first_cell = (
                self._first_cell[0] + source_rows.start,
                self._first_cell[1] + source_columns.start,
            )

    def regions(self, cut: float) -> list[tuple[slice, slice] | None]:
        """Return the rows and columns outside of which no logit of a query is above `cut`; None if none is anywhere."""
        above = self._cells > cut
        bounds = []
        for weights, touched in ((self._row_weights, above.any(1)), (self._column_weights, above.any(0))):
            pixels = (weights.to(touched.device) @ touched.float() > 0).to(torch.uint8)  # (pixels, Q)
            first, stop = pixels.argmax(0), len(pixels) - pixels.flip(0).argmax(0)
            bounds.append([slice(*pair) for pair in zip(first.tolist(), stop.tolist(), strict=True)])
        found = above.flatten(0, 1).any(0).tolist()
        return [region if one else None for one, *region in zip(found, *bounds, strict=True)]

    def of_query(
        self, query: int, region: tuple[slice, slice]
    ) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
        """Yield parts of a region, as rows and columns, and one query's logits (rows, columns) float32 there."""
        rows, columns = region
        for own_rows, row_weights, source_rows in _parts(self._row_parts, rows):
            for own_columns, column_weights, source_columns in _parts(self._column_parts, columns):
                cells = self._cells[source_rows, source_columns, query].float()
                yield (own_rows, own_columns), row_weights @ cells @ column_weights.T

    @property
    def block_side(self) -> int:
        """Side of the blocks that pay for themselves, in pixels; 0 if none do.

        An accelerator computes all pixels in less time than it takes to wait for a decision. Blocks that cover many
        cells are never decided.
        """
        pixels_per_cell = min(
            MASK_STRIDE * target / cropped for _, cropped, target in (self._row_steps, self._column_steps)
        )
        if self._cells.device.type != "cpu" or self._is_identity or pixels_per_cell < MIN_PIXELS_PER_CELL:
            return 0
        return 8 if pixels_per_cell < 3 * MIN_PIXELS_PER_CELL else 16

    @functools.cached_property
    def _column_weights(self) -> Tensor:
        return _weights(self._width, self._column_steps)

    @functools.cached_property
    def _row_parts(self) -> list[tuple[Tensor, slice]]:
        return [_touched(part) for part in self._row_weights.to(self.device).split(REGION_SIDE)]

    @functools.cached_property
    def _column_parts(self) -> list[tuple[Tensor, slice]]:
        return [_touched(part) for part in self._column_weights.to(self.device).split(REGION_SIDE)]


class PixelRule(Protocol):
    """How pixels are labeled by the mask probabilities of the queries: for `fill_map`."""

    def decide(self, lower: Tensor, upper: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Label whole blocks of pixels where bounds on the mask probabilities suffice.

        Args:
            lower: (blocks, Q), below all of a block's mask probabilities but for rounding.
            upper: (blocks, Q), above them.
            pixels: (blocks,) int64, how many pixels each block has.

        Returns:
            Labels (blocks,) int64; (blocks,) bool, whether all pixels of the block have it; and (blocks, n) bool, the
            candidates for the block's pixels, for `label`, or None.
        """
        ...

    def label(
        self, mask_probabilities: Tensor, is_pixel: Tensor | None = None, candidates: Tensor | None = None
    ) -> Tensor:
        """Label pixels.

        Args:
            mask_probabilities: (pixels, Q), may be overwritten.
            is_pixel: (pixels,) bool, False beyond the output's border; None if all are pixels of the output.
            candidates: (n,) bool of `decide`; None for all.

        Returns:
            (pixels,) int64.
        """
        ...


def fill_map(
    masks: MaskTiles, rule: PixelRule, values_per_pixel: int, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Label every pixel of the output: by blocks where bounds decide, one by one elsewhere.

    Args:
        masks: of Q queries.
        rule: says how.
        values_per_pixel: float32 numbers that `rule.label` holds for each pixel.
        dtype: of the result.

    Returns:
        (H, W) integers.
    """
    labels = torch.empty(masks.size, dtype=dtype, device=masks.device)
    side = masks.block_side
    if not side:
        for rows, logits in masks.tiles(values_per_pixel):
            found = rule.label(logits.sigmoid_().flatten(0, 1))
            labels[rows] = found.unflatten(0, (-1, masks.size[1])).to(dtype)
        return labels
    blocks = MaskBlocks(masks, side)
    for strip in blocks.strips():
        lower, upper = (bound.sigmoid_() for bound in blocks.bounds(strip))
        decided, is_decided, candidates = rule.decide(lower, upper, blocks.areas(strip))
        found = decided.to(torch.int32)[:, None].repeat(1, side * side)
        open_blocks = (~is_decided).nonzero()[:, 0]
        if candidates is not None:  # those with few candidates together
            open_blocks = open_blocks[candidates[open_blocks].sum(1).argsort()]
        for part in split_pixels(open_blocks, side * side * values_per_pixel) if len(open_blocks) else ():
            named = None if candidates is None else candidates[part].any(0)
            row, column = part // blocks.shape[1] + strip.start, part % blocks.shape[1]
            mask_probabilities = blocks.logits(row, column).sigmoid_().flatten(0, 1)
            within = blocks.is_pixel(row, column)
            found[part] = rule.label(mask_probabilities, within, named).view(-1, side * side).to(found.dtype)
        pixels = found.view(-1, blocks.shape[1], side, side).transpose(1, 2).flatten(2).flatten(0, 1)
        place = labels[strip.start * side : strip.stop * side]
        place.copy_(pixels[: len(place), : masks.size[1]])
    return labels


class MaskBlocks:
    """Square blocks of output pixels, from left to right and top to bottom; the last ones may reach over the border.

    Args:
        masks: what is resized.
        side: of a block, in pixels.
    """

    def __init__(self, masks: MaskTiles, side: int):
        self.side = side
        self._size, self._cells = masks.size, masks._cells
        self._rows, self._row_weights = _block_weights(masks._row_weights, side)
        self._columns, self._column_weights = _block_weights(masks._column_weights, side)
        self.shape = (len(self._rows), len(self._columns))

    def strips(self) -> Iterator[slice]:
        """Yield rows of blocks, as many at once as memory is meant for."""
        return row_tiles(self.shape, 3 * self._cells.shape[-1])

    def bounds(self, strip: slice) -> list[Tensor]:
        """Return the lowest and the highest logits (blocks, Q) of the cells that rows of blocks depend on."""
        found = []
        for extreme in (torch.minimum, torch.maximum):
            of_rows = functools.reduce(extreme, self._cells[self._rows[strip]].unbind(1))
            of_blocks = functools.reduce(extreme, (of_rows[:, column] for column in self._columns.unbind(1)))
            found.append(of_blocks.flatten(0, 1))
        return found

    def areas(self, strip: slice) -> Tensor:
        """Return how many pixels of the output each block of rows of blocks has, (blocks,) int64."""
        rows, columns = (
            (size - self.side * torch.arange(count)).clamp(max=self.side)
            for size, count in zip(self._size, self.shape, strict=True)
        )
        return (rows[strip, None] * columns).flatten()

    def logits(self, row: Tensor, column: Tensor) -> Tensor:
        """Return logits (blocks, side * side, Q) float32 of blocks in rows and columns (blocks,) of `shape`."""
        cells = self._rows[row][:, :, None] * self._cells.shape[1] + self._columns[column][:, None]
        # Pixels last, which makes long loops: (blocks, cells of rows, cells of columns, side, side).
        weights = self._row_weights[row][:, :, None, :, None] * self._column_weights[column][:, None, :, None]
        return weights.flatten(3).flatten(1, 2).mT @ self._cells.flatten(0, 1)[cells.flatten(1)]

    def is_pixel(self, row: Tensor, column: Tensor) -> Tensor | None:
        """Tell which pixels of blocks lie within the output, (blocks side side,) bool; None if all do."""
        steps = torch.arange(self.side)
        rows, columns = (self.side * place[:, None] + steps for place in (row, column))
        if int(rows.max()) < self._size[0] and int(columns.max()) < self._size[1]:
            return None
        return ((rows < self._size[0])[:, :, None] & (columns < self._size[1])[:, None]).flatten()


def _block_weights(weights: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Return which cells along a side each block of pixels depends on, and with which weights.

    Args:
        weights: (pixels, cells).
        side: pixels of a block.

    Returns:
        Cells (blocks, n), n of the block with most, the last one repeated; and weights (blocks, n, side).
    """
    missing = -len(weights) % side
    weights = torch.cat([weights, weights[-1:].expand(missing, -1)]).unflatten(0, (-1, side))
    is_touched = weights.any(1).to(torch.uint8)
    first, last = is_touched.argmax(1), weights.shape[2] - 1 - is_touched.flip(1).argmax(1)
    cells = first[:, None] + torch.arange(int((last - first).max()) + 1)
    is_own = cells <= last[:, None]
    cells = cells.minimum(last[:, None])
    weights = weights.gather(2, cells[:, None].expand(-1, side, -1)) * is_own[:, None]
    return cells, weights.mT.contiguous()


def _weights(cells: int, steps: tuple[int, int, int]) -> Tensor:
    """Return the weight of each of a mask's cells along a side in each output pixel, (pixels, cells), at most 4."""
    return _resize_columns(torch.eye(cells)[:, :, None], steps)[:, :, 0].T


def _touched(weights: Tensor, first: int = 0) -> tuple[Tensor, slice]:
    """Cut weights (pixels, cells) to the cells that have any, and give these cells, counted from `first`."""
    touched = weights.any(0).nonzero()
    start, stop = int(touched[0]), int(touched[-1]) + 1
    return weights[:, start:stop], slice(start - first, stop - first)


def _parts(parts: list[tuple[Tensor, slice]], pixels: slice) -> Iterator[tuple[slice, Tensor, slice]]:
    """Yield the pixels of a span in each part of a side, their weights, and the cells that these belong to."""
    for index in range(pixels.start // REGION_SIDE, (pixels.stop - 1) // REGION_SIDE + 1):
        start = index * REGION_SIDE
        own = slice(max(pixels.start, start), min(pixels.stop, start + REGION_SIDE))
        weights, cells = parts[index]
        yield own, weights[own.start - start : own.stop - start], cells


def _resize_columns(values: Tensor, steps: tuple[int, int, int]) -> Tensor:
    """Resize (rows, w, Q) to the network input's width, crop, and resize to the output's width W: (rows, W, Q)."""
    network, cropped, target = steps
    for width, keep in ((network, cropped), (target, target)):
        if values.numel() == 0:
            values = values.new_zeros(len(values), width, values.shape[2])
        elif values.shape[1] != width:
            image = values[None].permute(0, 3, 1, 2)  # channels last in memory
            image = interpolate(image, size=(len(values), width), mode="bilinear", align_corners=False)
            values = image.permute(0, 2, 3, 1)[0]
        values = values[:, :keep]
    return values
