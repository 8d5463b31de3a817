"""Several looks at one image, and one class map from them: sliding windows, scales and flips.

A view is a region of the image, brought to some size, mirrored or not. The network sees each view by itself; the
scores of all views that cover a pixel are added up. That is done for a band of rows at a time from the masks at the
network's stride, so neither a view's scores nor their sum are ever held for the whole image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.image_utils import SizeDict

from modeling_ita.image_processing_ita import output_size
from modeling_ita.mask_tiles import MaskTiles, row_tiles
from modeling_ita.postprocessing import class_probabilities


@dataclass(frozen=True)
class View:
    """One look at an image.

    Attributes:
        region: (top, left, bottom, right) in the image's pixels.
        size: (height, width) that the region is brought to for the network.
        mirrored: left and right are exchanged.
    """

    region: tuple[int, int, int, int]
    size: tuple[int, int]
    mirrored: bool = False

    def cut(self, image: Image.Image) -> Image.Image:
        """The region of the image at its own size, mirrored if so."""
        top, left, bottom, right = self.region
        cut = image.crop((left, top, right, bottom))
        return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.mirrored else cut


@dataclass(frozen=True)
class ViewPlan:
    """Which views of an image are taken.

    Attributes:
        scales: multiples of the usual size of the network's input.
        flip: every view also mirrored.
        window: side of the square windows in pixels of the network's input; None for the whole image at once.
        stride: distance of neighbouring windows, in the same pixels, at most `window`.

    Raises:
        ValueError: a number is out of range.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    window: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        if not self.scales or any(not (math.isfinite(scale) and scale > 0) for scale in self.scales):
            raise ValueError(f"scales must be numbers above 0, got {list(self.scales)}")
        if self.window is not None and self.window < 32:
            raise ValueError(f"a window must be at least 32 pixels wide, got {self.window}")
        if self.stride is not None and (self.window is None or not 1 <= self.stride <= self.window):
            raise ValueError(f"the stride must be between 1 and the window's side, got {self.stride}")

    @property
    def is_plain(self) -> bool:
        """One view, the whole image at its usual size."""
        return self == ViewPlan()

    def views(self, image_size: tuple[int, int], processor_size: Any, resizes: bool) -> list[View]:
        """The views of an image.

        Args:
            image_size: (height, width) of the image.
            processor_size: the image processor's `size`; resizes: whether it resizes at all.
        """
        found = []
        for scale in self.scales:
            height, width = _scaled_size(image_size, processor_size if resizes else None, scale)
            for top, bottom in self._spans(height):
                for left, right in self._spans(width):
                    rows = _rescaled(top, bottom, height, image_size[0])
                    columns = _rescaled(left, right, width, image_size[1])
                    region = (rows[0], columns[0], rows[1], columns[1])
                    for mirrored in (False, True) if self.flip else (False,):
                        found.append(View(region, (bottom - top, right - left), mirrored))
        return found

    def _spans(self, length: int) -> list[tuple[int, int]]:
        """Where windows begin and end along a side; the last ends with the side."""
        window = self.window
        if window is None or window >= length:
            return [(0, length)]
        stride = self.stride or window
        starts = [*range(0, length - window, stride), length - window]
        return [(start, start + window) for start in starts]


def _scaled_size(image_size: tuple[int, int], size: Any | None, scale: float) -> tuple[int, int]:
    if size is None:
        height, width = image_size
    else:
        scaled = {name: max(1, round(side * scale)) for name, side in dict(size).items() if side}
        height, width = output_size(image_size, SizeDict(**scaled))
        scale = 1.0
    return max(1, round(height * scale)), max(1, round(width * scale))


def _rescaled(start: int, stop: int, side: int, image_side: int) -> tuple[int, int]:
    """A span of the network's input in the image's own pixels, at least one of them."""
    first = min(image_side - 1, round(start * image_side / side))
    return first, max(first + 1, round(stop * image_side / side))


@dataclass(frozen=True)
class ViewOutput:
    """What the network says of a view: class logits (Q, K + 1), void last; mask logits (Q, h, w); and the size
    (height, width) of its input before padding.
    """

    view: View
    class_logits: Tensor
    mask_logits: Tensor
    image_size: tuple[int, int]


class _ViewScores:
    """Class scores of one view, for any rows of the image that it covers."""

    def __init__(self, output: ViewOutput) -> None:
        self.top, self.left, self.bottom, self.right = output.view.region
        self.mirrored = output.view.mirrored
        probabilities = class_probabilities(output.class_logits)[:, :-1]
        self.weights = probabilities  # (Q, K)
        size = (self.bottom - self.top, self.right - self.left)
        self.masks = MaskTiles(output.mask_logits, output.image_size, size)

    def add_to(self, scores: Tensor, rows: slice) -> None:
        """Adds this view's share to `scores` (rows, W, K) float32 of those rows of the image."""
        start, stop = max(rows.start, self.top), min(rows.stop, self.bottom)
        if start >= stop:
            return
        shares = self.masks.rows(slice(start - self.top, stop - self.top)).sigmoid_()
        shares = shares.flip(1) if self.mirrored else shares
        target = scores[start - rows.start : stop - rows.start, self.left : self.right]
        target += shares @ self.weights


def semantic_map_of_views(outputs: Sequence[ViewOutput], size: tuple[int, int]) -> Tensor:
    """Class of the highest sum of scores over the views of an image, (H, W) int64.

    Every pixel of the image must lie in at least one view. Views count equally.

    Args:
        outputs: of one image and one vocabulary.
        size: (height, width) of the image.
    """
    device = outputs[0].mask_logits.device
    labels = torch.zeros(size, dtype=torch.int64, device=device)
    parts = [_ViewScores(output) for output in outputs]
    num_queries, num_classes = parts[0].weights.shape
    for rows in row_tiles(size, 2 * num_classes + num_queries):
        scores = torch.zeros((rows.stop - rows.start, size[1], num_classes), device=device)
        for part in parts:
            part.add_to(scores, rows)
        labels[rows] = scores.argmax(2)
    return labels
