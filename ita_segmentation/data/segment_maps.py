"""Segment maps: ids as colors (R + 256 G + 65536 B, as COCO stores them), and values looked up by id."""

from collections.abc import Mapping

import numpy as np


def ids_to_rgb(ids: np.ndarray) -> np.ndarray:
    """Encode segment ids (H, W) below 2^24 as colors (H, W, 3) uint8."""
    return np.stack([ids >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)


def rgb_to_ids(colors: np.ndarray) -> np.ndarray:
    """Decode colors (H, W, 3 or more) uint8 to segment ids (H, W) int32."""
    channels = colors.astype(np.int32)
    return channels[..., 0] | channels[..., 1] << 8 | channels[..., 2] << 16


def lookup_ids(ids: np.ndarray, values: Mapping[int, int], default: int) -> tuple[np.ndarray, np.ndarray]:
    """Replace each id (H, W) by its value: the ids that occur, ascending, and the values (H, W) int64.

    Looks up once per run of equal ids, which makes it fast on maps of segments.
    """
    flat = ids.ravel()
    starts = np.flatnonzero(np.concatenate(([True], flat[1:] != flat[:-1])))
    present, positions = np.unique(flat[starts], return_inverse=True)
    found = np.array([values.get(key, default) for key in present.tolist()], np.int64)
    return present, np.repeat(found[positions], np.diff(starts, append=flat.size)).reshape(ids.shape)
