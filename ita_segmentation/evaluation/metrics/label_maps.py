"""Label maps as integers, and what the counting states share: groups of classes, arrays of a saved state.

Maps of segments are flat almost everywhere, so what is counted is not pixels but runs: stretches of neighbouring
pixels, in reading order, that agree in both maps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def as_integers(labels: Any, role: str) -> np.ndarray:
    """An integer array of whatever holds labels: array, tensor on any device, image, nested lists.

    Args:
        role: what the labels are, for the message.

    Raises:
        ValueError: if the dtype is not integer.
    """
    array = np.asarray(labels.detach().cpu() if hasattr(labels, "detach") else labels)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{role} must hold integer labels, got {array.dtype}")
    native = array.dtype.newbyteorder("=")  # images with 16 bits may have the other byte order
    return array.astype(native, copy=False)


def run_ends(changed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where runs end and how long they are.

    Args:
        changed: (n - 1,) bool, whether element i + 1 differs from element i.

    Returns:
        (r,) indices of each run's last element among the n, and (r,) int64 lengths, which sum to n.
    """
    whole = len(changed) // 8 * 8
    words = changed[:whole].view(np.uint64)  # eight flags at a time: most words are 0
    found = np.flatnonzero(words != 0)
    inside = np.flatnonzero(words[found].view(np.bool_))
    rest = whole + np.flatnonzero(changed[whole:])
    ends = np.concatenate([found[inside >> 3] * 8 + (inside & 7), rest, [len(changed)]])
    return ends, np.diff(ends, prepend=-1)


def class_flags(flags: Sequence[bool], num_classes: int, role: str) -> np.ndarray:
    """(K,) bool of one flag for each class.

    Raises:
        ValueError: if there is not one flag for each class.
    """
    array = np.asarray(flags, dtype=bool)
    if array.shape != (num_classes,):
        raise ValueError(f"{role} has {array.size} entries for {num_classes} classes")
    return array


def checked_state(
    state: Mapping[str, Any], expected: Mapping[str, tuple[int | None, ...]]
) -> dict[str, np.ndarray]:
    """The arrays of a saved state, if their names and shapes are those expected (None: any length).

    Raises:
        ValueError: if a name is missing or unknown, or a shape differs.
    """
    if set(state) != set(expected):
        raise ValueError(f"the state has entries {sorted(state)}, expected {sorted(expected)}")
    arrays = {name: np.array(state[name]) for name in expected}
    for name, shape in expected.items():
        found = arrays[name].shape
        if len(found) != len(shape) or any(
            want not in (None, have) for want, have in zip(shape, found, strict=True)
        ):
            raise ValueError(f"{name} of the state has shape {found}, expected {shape}")
    return arrays
