"""Read any image as the RGB that a person sees: files, bytes, base64 text, URLs, PIL images, arrays and tensors."""

import base64
import binascii
import io
import os
import struct
import warnings
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .fetch import fetch_url, is_url, printable

IMAGE_FORMATS = (
    ("PNG", "JPEG", "JPEG2000", "GIF", "TIFF", "WEBP", "AVIF", "HEIF")
    + ("BMP", "DIB", "PPM")
    + ("TGA",)  # last: it has no signature
)
"""Pillow's names of the formats that are read. Others, such as EPS, would start programs or are no images."""
VECTOR_FORMATS = ("EPS", "WMF")
"""What Pillow opens and has another program draw, when the pixels are needed."""
MAX_IMAGE_PIXELS = 178_956_970
"""Pillow's own limit for what it calls a decompression bomb."""
# What Pillow's decoders raise on damaged files.
DECODING_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")


def open_image(file: Any) -> Image.Image:
    """Open an image file as `PIL.Image.open` does, in one of `IMAGE_FORMATS` whatever its name.

    Args:
        file: path or binary file object.

    Raises:
        PIL.UnidentifiedImageError: if it is in none of these formats.
    """
    Image.init()
    return Image.open(file, formats=[name for name in IMAGE_FORMATS if name in Image.OPEN])


def read_image(
    source: Any, timeout: float | None = None, allow_private_addresses: bool = True
) -> Image.Image:
    """Read an image as a person sees it: RGB, upright, 8 bits, the first frame of an animation.

    Args:
        source: PIL image, path, URL (http, https), data URL, base64 text, or the bytes of a file.
        timeout: seconds that fetching a URL may take in all (default 30).
        allow_private_addresses: whether a URL may lead to this machine or its network; see `fetch_url`.

    Raises:
        ValueError: in one line that names the image, if it is missing, empty, truncated, no image, in a format that is
            not read, or has more than `MAX_IMAGE_PIXELS` pixels.
        TypeError: if `source` is none of the above.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "the image")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(source), "the image")
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"an image is a PIL image, a path, a URL, base64 text or bytes, got {type(source).__name__}"
        )
    name = os.fspath(source)
    shown = printable(name)
    if isinstance(source, str) and is_url(source):
        return _decode(io.BytesIO(fetch_url(source, timeout, allow_private_addresses)), shown)
    if _is_file(name):
        return _decode(name, shown)
    if isinstance(source, str) and (encoded := _base64_bytes(source)) is not None:
        return _decode(io.BytesIO(encoded), "the image")
    raise ValueError(f"no such image: '{shown}' (a path, a URL of http or https, or base64 text)")


def _is_file(name: str | bytes) -> bool:
    try:
        return os.path.isfile(name)
    except (OSError, ValueError):  # too long, or with a null character
        return False


def _base64_bytes(text: str) -> bytes | None:
    """Decode base64 text or a data URL; None if it is neither, or far too short for an image."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return None
    return data if len(data) >= 24 else None


def _decode(file: Any, name: str) -> Image.Image:
    """Decode a path, a file in memory or a PIL image to RGB; `name` is what messages call it."""
    too_large = f"{name} has more than the {MAX_IMAGE_PIXELS:,} pixels allowed (a decompression bomb?)"
    head = b""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)  # about broken EXIF data, which is no reason to stop
            if isinstance(file, Image.Image):
                if file.format in VECTOR_FORMATS:
                    raise UnidentifiedImageError
                return image_to_rgb(file)
            head = _first_bytes(file)
            if not head:
                raise ValueError(f"{name} is empty (zero bytes)")
            with open_image(file) as image:
                if image.width * image.height > MAX_IMAGE_PIXELS:
                    raise ValueError(too_large)
                image.load()
                return image_to_rgb(image)
    except Image.DecompressionBombError as error:
        raise ValueError(too_large) from error
    except UnidentifiedImageError as error:
        if head[4:8] == b"ftyp" and head[8:12] in HEIC_BRANDS:
            message = f"{name} is a HEIC image, which Pillow reads with the package pillow-heif only: save it as JPEG"
        else:
            message = f"{name} is not an image, or not in a format that is read: {', '.join(IMAGE_FORMATS)}"
        raise ValueError(message) from error
    except DECODING_ERRORS as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        if isinstance(error, ValueError) and reason.startswith(name[:160]):
            raise
        raise ValueError(f"{name} cannot be read as an image: {reason}") from error


def _first_bytes(file: Any) -> bytes:
    if isinstance(file, io.BytesIO):
        return file.getvalue()[:16]
    with open(file, "rb") as stream:
        return stream.read(16)


# --- to RGB -------------------------------------------------------------------------------------------------------


def image_to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB as a viewer shows it: upright, transparency over white, 16 bits and floats scaled to 8.

    Raises:
        ValueError: for a mode that has no agreed look (such as "LAB"), and for non-finite floats.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray(_sixteen_to_eight_bits(np.asarray(image).astype(np.uint16))).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(_wide_to_eight_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode == "LAB":
        raise ValueError("a LAB image cannot be shown without its color profile: convert it to RGB first")
    return image.convert("RGB")


def _sixteen_to_eight_bits(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _wide_to_eight_bits(values: np.ndarray) -> np.ndarray:
    """Scale 32-bit integers or floats to 8 bits; the range is the smallest usual one that holds all values."""
    if not np.isfinite(values).all():
        raise ValueError("the image has non-finite values (NaN or infinity)")
    top = float(values.max(initial=0))
    usual = (1.0, 255.0, 65535.0) if values.dtype.kind == "f" else (255.0, 65535.0)
    white = next((value for value in usual if top <= value), top)
    return np.rint(values.clip(0).astype(np.float64) * (255.0 / white)).astype(np.uint8)


def array_to_rgb(image: np.ndarray | Tensor, input_data_format: str | None = None) -> Tensor:
    """Convert an array or tensor to (3, H, W), uint8 or float32.

    Args:
        image: (H, W), (C, H, W) or (H, W, C) with 1, 3 or 4 channels; the fourth is alpha, laid over white. Integers
            are 0..255 (uint16: 0..65535); floats keep their range, which `rescale_factor` and `do_rescale` define.
        input_data_format: "channels_first" or "channels_last". By default, where both are possible, arrays have
            channels last and tensors channels first.

    Raises:
        ValueError: for any other shape or range, and for non-finite floats.
    """
    array = _as_tensor(image)
    if array.ndim == 2:
        array, input_data_format = array[None], "channels_first"
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(f"an image is (H, W), (C, H, W) or (H, W, C) with pixels, got {tuple(array.shape)}")
    if input_data_format is not None:
        axes = [0] if input_data_format == "channels_first" else [-1]
    else:
        axes = [0, -1] if isinstance(image, Tensor) else [-1, 0]
    axis = next((axis for axis in axes if array.shape[axis] in (1, 3, 4)), None)
    if axis is None:
        raise ValueError(f"an image has 1, 3 or 4 channels, got shape {tuple(image.shape)}")
    array = _to_uint8_or_float(array.movedim(axis, 0))
    if array.shape[0] == 4:
        white = 255.0 if not array.is_floating_point() or array.max() > 1 else 1.0
        color, alpha = array[:3].float(), array[3:].float() / white
        laid_over = color * alpha + white * (1 - alpha)
        array = laid_over if array.is_floating_point() else laid_over.round().to(torch.uint8)
    return array.expand(3, -1, -1).contiguous()


def _to_uint8_or_float(array: Tensor) -> Tensor:
    if array.is_complex():
        raise ValueError("an image cannot hold complex numbers")
    if array.is_floating_point():
        array = array.float()
        if not array.isfinite().all():
            raise ValueError("the image has non-finite values (NaN or infinity)")
        return array
    if array.dtype == torch.bool:
        return array.to(torch.uint8) * 255
    if array.dtype == torch.uint16:
        return torch.from_numpy(_sixteen_to_eight_bits(array.cpu().numpy())).to(array.device)
    if array.dtype != torch.uint8:
        array = array.long()
        if array.min() < 0 or array.max() > 255:
            raise ValueError("an image of integers holds 0..255 (uint16: 0..65535)")
    return array.to(torch.uint8)


def _as_tensor(array: np.ndarray | Tensor) -> Tensor:
    if isinstance(array, Tensor):
        return array
    if array.dtype.kind not in "biuf":
        raise ValueError(f"an image holds numbers, got an array of {array.dtype}")
    return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)))


# --- label maps ---------------------------------------------------------------------------------------------------


def read_label_map(source: Any) -> Tensor:
    """Read a map of labels as (H, W) int64.

    Args:
        source: PIL image (a palette image gives its indices), path, array or tensor; (H, W), (1, H, W) or (H, W, 1).

    Raises:
        ValueError: for any other shape, or a file that is no image.
    """
    if isinstance(source, (str, os.PathLike)):
        try:
            with open_image(source) as image:
                source = np.array(image)
        except DECODING_ERRORS as error:
            raise ValueError(
                f"the segmentation map {printable(os.fspath(source))} cannot be read: {error}"
            ) from error
    elif isinstance(source, Image.Image):
        source = np.array(source)
    labels = _as_tensor(source)
    if labels.ndim == 3 and 1 in (labels.shape[0], labels.shape[-1]):
        labels = labels.squeeze(0) if labels.shape[0] == 1 else labels.squeeze(-1)
    if labels.ndim != 2 or 0 in labels.shape:
        raise ValueError(f"a segmentation map is (H, W), got shape {tuple(labels.shape)}")
    return labels.long()


def read_label_maps(segmentation_maps: Any | None, images: list[Tensor]) -> list[Tensor] | None:
    """Read the map of labels of each image; None if there are none.

    Args:
        segmentation_maps: one map (see `read_label_map`), a list of them, or a stacked batch.
        images: (C, H, W), as they are before resizing.

    Raises:
        ValueError: if there are not as many maps as images, or a map has another size than its image.
    """
    if segmentation_maps is None:
        return None
    is_array = isinstance(segmentation_maps, (np.ndarray, Tensor))
    if is_array and segmentation_maps.ndim == 3 and len(images) == 1:
        segmentation_maps = [segmentation_maps]
    flat = segmentation_maps
    if not isinstance(flat, (list, tuple)):
        flat = list(flat) if is_array and flat.ndim > 2 else [flat]
    if len(flat) != len(images):
        raise ValueError(f"{len(images)} images, but {len(flat)} segmentation maps")
    maps = [read_label_map(one) for one in flat]
    for labels, image in zip(maps, images, strict=True):
        if labels.shape != image.shape[-2:]:
            sizes = tuple(labels.shape), tuple(image.shape[-2:])
            raise ValueError(f"a segmentation map of {sizes[0]} does not fit an image of {sizes[1]}")
    return maps


def resize_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize labels (h, w) to (*size); each pixel gets the label nearest to its center, exact for any integer."""
    rows, columns = (
        ((torch.arange(new, device=labels.device) + 0.5) * (old / new)).long().clamp(max=old - 1)
        for old, new in zip(labels.shape, size, strict=True)
    )
    return labels[rows][:, columns]


def binary_masks(
    labels: Tensor,
    instance_id_to_semantic_id: Mapping[int, int] | None = None,
    ignore_index: int | None = None,
    do_reduce_labels: bool = False,
) -> tuple[Tensor, Tensor]:
    """Split a label map into binary masks.

    Args:
        labels: (H, W) int64.
        instance_id_to_semantic_id: class of each label, before any reduction; by default labels are classes.
        ignore_index: label without a mask.
        do_reduce_labels: label 0 is background, and all classes are decremented by 1.

    Returns:
        Masks (n, H, W) float32 of 0 and 1 and their classes (n,) int64, in the order of the labels.

    Raises:
        ValueError: if a label has no class, or labels are to be reduced and there is no `ignore_index`.
    """
    if do_reduce_labels and ignore_index is None:
        raise ValueError("`do_reduce_labels` needs an `ignore_index`")
    found = [label for label in labels.unique().tolist() if label != ignore_index]
    if instance_id_to_semantic_id is None:
        classes = found
    else:
        missing = [label for label in found if label not in instance_id_to_semantic_id]
        if do_reduce_labels:
            missing = [label for label in missing if label != 0]
        if missing:
            raise ValueError(f"`instance_id_to_semantic_id` lacks the labels {missing}")
        classes = [instance_id_to_semantic_id.get(label, 0) for label in found]
    if do_reduce_labels:
        pairs = [
            (label, class_id - 1)
            for label, class_id in zip(found, classes, strict=True)
            if class_id and label
        ]
    else:
        pairs = list(zip(found, classes, strict=True))
    wanted = torch.tensor([label for label, _ in pairs], dtype=torch.int64, device=labels.device)
    masks = (labels[None] == wanted[:, None, None]).float()
    return masks, torch.tensor([class_id for _, class_id in pairs], dtype=torch.int64, device=labels.device)
