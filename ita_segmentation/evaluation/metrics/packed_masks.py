"""Binary masks as bits, 64 pixels a word: areas and intersections are then counts of ones.

Packing 100 masks of 512 x 512 pixels takes as long as one pass over them; run-length encoding them takes twenty
times as long, and multiplying them as floating-point matrices likewise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class PackedMasks:
    """Masks of one image.

    Attributes:
        words: (n, w) uint64, the pixels of each mask in reading order, eight to a byte, filled up with zeros.
        size: (height, width) in pixels; None if there is no mask.
    """

    words: np.ndarray
    size: tuple[int, int] | None

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, chosen: np.ndarray) -> PackedMasks:
        """The masks of an index array or a (n,) bool array."""
        return PackedMasks(self.words[chosen], self.size)

    def areas(self) -> np.ndarray:
        """(n,) int64 pixels of each mask."""
        return np.bitwise_count(self.words).sum(axis=1, dtype=np.int64)

    def intersections(self, other: PackedMasks) -> np.ndarray:
        """(n, m) int64 pixels that each mask has in common with each of `other`, which has the same size."""
        pixels = np.zeros((len(self), len(other)), dtype=np.int64)
        for column, words in enumerate(other.words):
            used = np.flatnonzero(words)
            if len(self) and len(used):
                span = slice(used[0], used[-1] + 1)
                common = self.words[:, span] & words[span]
                pixels[:, column] = np.bitwise_count(common).sum(axis=1, dtype=np.int64)
        return pixels


def pack_masks(masks: Any, role: str) -> PackedMasks:
    """Packs the masks of one image.

    Args:
        masks: (n, H, W) bool or integer array or tensor (anything but 0 is inside), or a sequence of (H, W) ones, or
            of COCO run-length encodings {"size": [H, W], "counts": str, bytes or list}, which need pycocotools.
        role: what the masks are, for the messages.

    Raises:
        ValueError: if masks are not (H, W), of different sizes, or of floats.
        ImportError: if masks are run-length encoded and pycocotools is not there.
    """
    if len(masks) == 0:
        return PackedMasks(np.zeros((0, 0), np.uint64), None)
    if hasattr(masks, "detach"):
        masks = masks.detach().cpu().numpy()
    if isinstance(masks, np.ndarray):
        return _pack(masks, role)
    parts = [_pack(_single(mask)[None], role) for mask in masks]
    sizes = {part.size for part in parts}
    if len(sizes) > 1:
        raise ValueError(f"{role} masks have different sizes: {', '.join(sorted(map(str, sizes)))}")
    return PackedMasks(np.concatenate([part.words for part in parts]), parts[0].size)


def _pack(masks: np.ndarray, role: str) -> PackedMasks:
    if masks.ndim != 3:
        raise ValueError(f"each of the {role} masks must be (height, width), got shape {masks.shape[1:]}")
    if masks.dtype != np.bool_ and not np.issubdtype(masks.dtype, np.integer):
        raise ValueError(f"{role} masks must be bool or integer, got {masks.dtype}")
    number, height, width = masks.shape
    packed = np.packbits(masks.reshape(number, height * width), axis=1)
    if packed.shape[1] % 8:
        packed = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8)))
    return PackedMasks(packed.view(np.uint64), (height, width))


def _single(mask: Any) -> np.ndarray:
    """One mask as an array of any dtype."""
    if isinstance(mask, Mapping):
        return _decode(mask)
    return mask.detach().cpu().numpy() if hasattr(mask, "detach") else np.asarray(mask)


def _decode(encoded: Mapping[str, Any]) -> np.ndarray:
    from pycocotools import mask as coco_mask

    if isinstance(encoded["counts"], Sequence) and not isinstance(encoded["counts"], (str, bytes)):
        encoded = coco_mask.frPyObjects(encoded, *encoded["size"])
    return coco_mask.decode(encoded)
