"""Check the settings of the image processor, which may come from a file that somebody else wrote."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torchvision.transforms import InterpolationMode
from transformers.image_utils import SizeDict

MIN_SIDE, MAX_SIDE = 4, 16_384  # of `size` and `pad_size`
SIZE_KEYS = (
    {"shortest_edge", "longest_edge"},
    {"shortest_edge"},
    {"longest_edge"},
    {"height", "width"},
    {"max_height", "max_width"},
)


def _is_number(value: Any, least: float, most: float) -> bool:
    kinds = (int, float, np.integer, np.floating)
    return isinstance(value, kinds) and not isinstance(value, bool) and bool(least <= value <= most)


def _is_integer(value: Any, least: int = MIN_SIDE, most: int = MAX_SIDE) -> bool:
    return isinstance(value, (int, np.integer)) and _is_number(value, least, most)


def _is_size(value: Any) -> bool:
    if isinstance(value, (SizeDict, Mapping)):
        sides = {key: side for key, side in dict(value).items() if side is not None}
        return set(sides) in SIZE_KEYS and all(map(_is_integer, sides.values()))
    if isinstance(value, (list, tuple)):
        return len(value) == 2 and all(map(_is_integer, value))
    return _is_integer(value)


def _is_color(value: Any, least: float) -> bool:
    values = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
    return len(values) in (1, 3) and all(_is_number(one, least, 1e6) for one in values)


SETTINGS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (
        ("do_resize", "do_rescale", "do_normalize", "do_reduce_labels", "default_to_square"),
        lambda value: isinstance(value, bool),
        "true or false",
    ),
    (
        ("size", "pad_size"),
        _is_size,
        "an integer, {height, width}, {shortest_edge, longest_edge} or {max_height, max_width} "
        f"of {MIN_SIDE}..{MAX_SIDE}",
    ),
    (("max_size",), _is_integer, f"an integer of {MIN_SIDE}..{MAX_SIDE}"),
    (("size_divisor",), lambda value: _is_integer(value, 1, 1024), "an integer of 1..1024"),
    (
        ("resample",),
        lambda value: isinstance(value, InterpolationMode) or _is_integer(value, 0, 5),
        "one of Pillow's resampling filters, 0..5",
    ),
    (("rescale_factor",), lambda value: _is_number(value, 1e-6, 1e6), "a number of 0.000001..1000000"),
    (("image_mean",), lambda value: _is_color(value, -1e6), "1 or 3 numbers"),
    (("image_std",), lambda value: _is_color(value, 1e-6), "1 or 3 positive numbers"),
    (("ignore_index",), lambda value: _is_integer(value, -(2**31), 2**31), "an integer"),
)
"""Names of settings, what tells whether a value is possible, and what to say if it is not."""


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check the arguments of a processor, whether they come from a call or from `preprocessor_config.json`.

    Args:
        settings: values by name; None and unknown names are passed over.

    Raises:
        ValueError: in one line that names the first one with a wrong type or an impossible value.
    """
    for names, fits, expected in SETTINGS:
        for name in names:
            value = settings.get(name)
            if value is not None and not fits(value):
                shown = ascii(value)
                shown = shown if len(shown) <= 100 else f"{shown[:99]}…"
                raise ValueError(f"image processor: {name} is {expected}, got {shown}")
