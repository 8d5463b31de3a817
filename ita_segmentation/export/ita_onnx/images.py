"""Images -> inputs of the network, as `ITAImageProcessor` makes them, with Pillow and numpy alone."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

STRIDE = 32
"""The network takes heights and widths that are multiples of it."""
REDUCED_PIXELS = 2**25
"""Larger images are first reduced by a whole factor."""
BILINEAR = 2


class NetworkInput(NamedTuple):
    """One image as the network takes it.

    Attributes:
        pixel_values: (3, H, W) float32, normalized, zero in the padding.
        valid: (H, W) bool, pixels that are not padding.
        size: height and width without the padding.
    """

    pixel_values: np.ndarray
    valid: np.ndarray
    size: tuple[int, int]


def read_image(source: Any) -> Image.Image:
    """Read an image as a person sees it: RGB, upright, transparency over white, 16 bits scaled to 8.

    Args:
        source: a path, a file object, a PIL image, or an array (H, W, 3) or (H, W) of uint8.

    Raises:
        ValueError: it cannot be read as an image.
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(source).convert("RGB")
    if isinstance(source, Image.Image):
        return _to_rgb(source)
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else "the image"
    try:
        with Image.open(source) as image:
            return _to_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read as an image: {' '.join(str(error).split())}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        top = float(values.max(initial=0))
        usual = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        white = next((value for value in usual if top <= value), top)
        scaled = values.clip(0).astype(np.float64) * (255.0 / white)
        return Image.fromarray(np.rint(scaled).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check that an image processor's settings are among those that this module can follow."""
    if settings.get("do_resize", True) and settings.get("resample", BILINEAR) != BILINEAR:
        raise ValueError(f"images are resized bilinearly (resample 2) only, got {settings['resample']}")
    if settings.get("size_divisor", STRIDE) % STRIDE or settings.get("pad_size"):
        raise ValueError(
            f"images are padded to multiples of {STRIDE} only: no pad_size, size_divisor {STRIDE}"
        )


def preprocess(image: Image.Image, settings: Mapping[str, Any]) -> NetworkInput:
    """Resize, normalize and pad an RGB image.

    Args:
        image: RGB.
        settings: those of `preprocessor_config.json`.
    """
    size = (image.height, image.width)
    if settings.get("do_resize", True):
        size = output_size(size, settings["size"])
        factor = min(image.height // (2 * size[0]), image.width // (2 * size[1]))
        if image.width * image.height > REDUCED_PIXELS and factor >= 2:
            image = image.reduce(factor)
    pixels = resize(np.asarray(image), size)
    rescale = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
    normalizes = settings.get("do_normalize", True)
    mean = np.asarray(settings["image_mean"] if normalizes else 0, np.float32)
    std = np.asarray(settings["image_std"] if normalizes else 1, np.float32)
    scale = np.float32(1.0 / rescale)
    values = (pixels.astype(np.float32) - mean * scale) / (std * scale)
    divisor = settings.get("size_divisor", STRIDE)
    height, width = (math.ceil(side / divisor) * divisor for side in size)
    padded = np.zeros((3, height, width), np.float32)
    padded[:, : size[0], : size[1]] = values.transpose(2, 0, 1)
    valid = np.zeros((height, width), bool)
    valid[: size[0], : size[1]] = True
    return NetworkInput(padded, valid, size)


def output_size(image_size: tuple[int, int], size: Mapping[str, int]) -> tuple[int, int]:
    """Give the height and width to which an image of `image_size` is resized."""
    height, width = image_size
    sides = {key: value for key, value in size.items() if value is not None}
    if set(sides) == {"height", "width"}:
        found: tuple[float, float] = (sides["height"], sides["width"])
    elif set(sides) == {"max_height", "max_width"}:
        scale = min(sides["max_height"] / height, sides["max_width"] / width)
        found = (int(height * scale), int(width * scale))
    elif set(sides) == {"longest_edge"} or set(sides) == {"shortest_edge"}:
        [(key, side)] = sides.items()
        scale = side / (min if key == "shortest_edge" else max)(height, width)
        found = (round(height * scale), round(width * scale))
    elif set(sides) == {"shortest_edge", "longest_edge"}:
        found = _by_both_edges(height, width, sides["shortest_edge"], sides["longest_edge"])
    else:
        raise ValueError(f"the image processor's size has unknown keys: {dict(size)}")
    return max(1, int(found[0])), max(1, int(found[1]))


def _by_both_edges(height: int, width: int, shortest: float, longest: float) -> tuple[float, float]:
    short, long = min(height, width), max(height, width)
    exact = shortest
    if long / short * shortest > longest:
        exact = longest * short / long
        shortest = round(exact)
    if short == shortest:
        return height, width
    other = int(exact * long / short)
    return (other, shortest) if width < height else (shortest, other)


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image bilinearly with antialiasing: columns first, each step rounded to 8 bits.

    Weights are integers of 16 bits, as torchvision's are, so that every pixel is the same. Pillow's have more bits,
    and differ by 1 here and there.

    Args:
        pixels: (h, w, 3) uint8.
        size: height and width of the result.
    """
    columns = _resize_rows(pixels.transpose(1, 0, 2), size[1]).transpose(1, 0, 2)
    return np.ascontiguousarray(_resize_rows(columns, size[0]))


def _resize_rows(pixels: np.ndarray, new: int) -> np.ndarray:
    old = pixels.shape[0]
    if old == new:
        return pixels
    first, weights, bits = _weights(old, new)
    total = np.full((new, *pixels.shape[1:]), 1 << (bits - 1), np.int32)
    for step in range(weights.shape[1]):
        rows = pixels[np.minimum(first + step, old - 1)].astype(np.int32)
        total += weights[:, step, None, None] * rows
    return (total >> bits).clip(0, 255).astype(np.uint8)


def _weights(old: int, new: int) -> tuple[np.ndarray, np.ndarray, int]:
    """First source pixels (new,), weights (new, n) of the n pixels from there on, and the weights' binary digits."""
    scale = old / new
    support = max(scale, 1.0)
    centers = scale * (np.arange(new) + 0.5)
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    count = np.minimum((centers + support + 0.5).astype(np.int64), old) - first
    steps = np.arange(int(count.max()))
    distance = (steps + first[:, None] - centers[:, None] + 0.5) * (1 / support)
    weights = np.maximum(0, 1 - np.abs(distance))
    weights[steps >= count[:, None]] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    bits = 0
    while bits < 22 and int(0.5 + weights.max() * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    return first, np.floor(0.5 + weights * (1 << bits)).astype(np.int32), bits


def stack(inputs: Sequence[NetworkInput]) -> dict[str, np.ndarray]:
    """Make a batch of images of one padded size.

    Raises:
        ValueError: their padded sizes differ; the network would see the padding.
    """
    sizes = sorted({one.valid.shape for one in inputs})
    if len(sizes) > 1:
        raise ValueError(
            f"images of a batch must have one padded size, got {', '.join(f'{h} x {w}' for h, w in sizes)}: "
            "give them one by one"
        )
    return {
        "pixel_values": np.stack([one.pixel_values for one in inputs]),
        "valid": np.stack([one.valid for one in inputs]),
    }
