"""Test-time augmentation: one class map from sliding windows, scales and flips of an image.

A crop is a region of the image, resized, mirrored or not. The network sees each crop by itself; the scores of all crops
that cover a pixel are added up (`modeling_ita.tiling`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from transformers.image_utils import SizeDict

from modeling_ita.ops import output_size
from modeling_ita.tiling import Crop, SemanticMerger, spans


@dataclass(frozen=True)
class TestTimeAugmentation:
    """Which crops of an image are taken; ValueError if a number is out of range.

    Attributes:
        scales: multiples of the usual size of the network's input.
        flip: take every crop mirrored as well.
        window: side of the square sliding windows in pixels of the network's input; None for the whole image at once.
        stride: distance of neighboring windows in the same pixels, at most `window`; None for `window`.
    """

    __test__ = False  # not a test case, whatever pytest makes of its name

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
    def is_identity(self) -> bool:
        """Whether the only crop is the whole image at its usual size."""
        return self == TestTimeAugmentation()

    def crops(self, image_size: tuple[int, int], processor_size: Any | None) -> list[Crop]:
        """Return the crops of an image (height, width); `processor_size` is None if the processor does not resize."""
        found = []
        for scale in self.scales:
            height, width = _scaled_size(image_size, processor_size, scale)
            for top, bottom in spans(height, self.window, self.stride):
                for left, right in spans(width, self.window, self.stride):
                    rows = _in_image(top, bottom, height, image_size[0])
                    columns = _in_image(left, right, width, image_size[1])
                    region = (rows[0], columns[0], rows[1], columns[1])
                    for flipped in (False, True) if self.flip else (False,):
                        found.append(Crop(region, (bottom - top, right - left), flipped))
        return found


def _scaled_size(image_size: tuple[int, int], size: Any | None, scale: float) -> tuple[int, int]:
    if size is None:
        height, width = (side * scale for side in image_size)
    else:
        scaled = {name: max(1, round(side * scale)) for name, side in dict(size).items() if side}
        height, width = output_size(image_size, SizeDict(**scaled))
    return max(1, round(height)), max(1, round(width))


def _in_image(start: int, stop: int, side: int, image_side: int) -> tuple[int, int]:
    """Convert a span of the network's input to the image's own pixels, at least one of them."""
    first = min(image_side - 1, round(start * image_side / side))
    return first, max(first + 1, round(stop * image_side / side))


class CropOutput(NamedTuple):
    """The network's output for a crop: class logits (Q, K + 1), void last, and mask logits (Q, h, w)."""

    crop: Crop
    class_logits: Tensor
    mask_logits: Tensor


def merge_crops(outputs: Sequence[CropOutput], size: tuple[int, int]) -> Tensor:
    """Return the class with the highest sum of scores over the crops, which cover the image, (H, W) integers."""
    merger = SemanticMerger([output.crop for output in outputs], size)
    for _, class_logits, mask_logits in outputs:
        merger.add(class_logits, mask_logits)
    return merger.labels
