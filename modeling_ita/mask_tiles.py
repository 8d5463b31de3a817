"""Query masks at the output's size, a tile of rows at a time.

Both bilinear resizes (mask to network input, valid part of the network input to the requested size) are separable, so
a tile of output rows needs few mask rows, and no tensor of size (queries, height, width) is ever held. Within a tile,
memory is laid out with queries last, so a resizing step is one long loop and scoring is a matrix product.

Symbols: Q queries, (h, w) a mask's size, (H, W) the output's size.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

MASK_STRIDE = 4  # a mask logit covers 4 x 4 pixels of the network input
IMAGE_STRIDE = 32  # an image is segmented as if padded to multiples of this; a batch may pad it further
TILE_BYTES = 8 * 2**20  # memory of one tile of output rows; fits most caches


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
        identity = torch.eye(height)[:, :, None]
        self._row_weights = _resize_columns(identity, self._row_steps)[:, :, 0].T  # (H, h), at most 4 per row
        self._cells = mask_logits.permute(1, 2, 0)  # (h, w, Q)
        if not self._is_identity:
            self._cells = self._cells.float().contiguous()

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
        weights = self._row_weights[rows]
        touched = weights.any(0).nonzero()
        source = slice(int(touched[0]), int(touched[-1]) + 1)
        cells = self._cells[source]
        logits = (weights[:, source].to(cells.device) @ cells.flatten(1)).unflatten(1, cells.shape[1:])
        return _resize_columns(logits, self._column_steps)


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
