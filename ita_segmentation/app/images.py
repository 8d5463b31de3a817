"""Images on their way in, within limits, and on their way out, as data that a browser draws."""

from __future__ import annotations

import base64
import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from ita_segmentation.errors import ITAError
from ita_segmentation.images import DECODING_ERRORS, png_bytes, read_image
from ita_segmentation.visualization import resize_labels
from modeling_ita.image_io import open_image

MAX_SHOWN_SIDE = 1600
"""In pixels; larger images are shown smaller."""
MAX_LOSSLESS_PIXELS = 400_000
"""Larger images are shown as JPEG."""


def read_limited_image(path: Path, name: str, max_pixels: int) -> Image.Image:
    """Read an uploaded image within a limit that is checked before anything is decoded."""
    if not path.is_file():
        raise ITAError(f"{name} is no longer on the server, which keeps no images. Please drop it again.")
    size = _size_in_header(path)
    if size is not None and size[0] * size[1] > max_pixels:
        raise ITAError(
            f"{name} has {size[0]:,} x {size[1]:,} pixels, which are {size[0] * size[1] / 1e6:,.1f} megapixels; "
            f"this page takes up to {max_pixels / 1e6:g}. Please make the image smaller."
        )
    try:
        return read_image(path)
    except ITAError as error:
        reason = str(error).replace(str(path), name)
        raise ITAError(f"{reason}. Please try a JPEG or PNG image.") from error


def _size_in_header(path: Path) -> tuple[int, int] | None:
    """Width and height as the file's header says, None where Pillow does not open it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_image(path) as image:
                return image.size
    except (*DECODING_ERRORS, Image.DecompressionBombError):
        return None


def shown_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) at which an image of `size` (width, height) is shown."""
    factor = min(1.0, MAX_SHOWN_SIDE / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def image_data(image: Image.Image) -> str:
    """Return a data URI of an RGB image at its shown size: PNG where it is small, else JPEG."""
    size = shown_size(image.size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    if size[0] * size[1] <= MAX_LOSSLESS_PIXELS:
        return png_data(image)
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=90)
    return _data_uri(stream.getvalue(), "image/jpeg")


def id_map_data(label_map: np.ndarray) -> str:
    """Return ids (H, W) as an RGB PNG (data URI) at the shown size: their low byte in red, the high one in green."""
    width, height = shown_size((label_map.shape[1], label_map.shape[0]))
    ids = resize_labels(label_map, (height, width)).astype(np.uint16)
    channels = np.stack([ids & 255, ids >> 8, np.zeros_like(ids)], axis=-1).astype(np.uint8)
    return png_data(Image.fromarray(channels))


def png_data(image: Image.Image) -> str:
    """Return a data URI of the image as a PNG file."""
    return _data_uri(png_bytes(image), "image/png")


def _data_uri(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"
