"""Read any image as the RGB that a person sees: files, bytes, base64 text, URLs, PIL images, arrays and tensors."""

import base64
import binascii
import http.client
import io
import ipaddress
import os
import socket
import ssl
import struct
import time
import urllib.error
import urllib.request
import warnings
import zlib
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .ops import MAX_IMAGE_PIXELS

IMAGE_FORMATS = (
    ("PNG", "JPEG", "JPEG2000", "GIF", "TIFF", "WEBP", "AVIF", "HEIF")
    + ("BMP", "DIB", "PPM")
    + ("TGA",)  # last: it has no signature
)
"""Pillow's names of the formats that are read. Others, such as EPS, would start programs or are no images."""
VECTOR_FORMATS = ("EPS", "WMF")
"""What Pillow opens and has another program draw, when the pixels are needed."""
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
MAX_DOWNLOAD_BYTES = 256 * 2**20
DOWNLOAD_SECONDS = 30.0
NAT64 = ipaddress.ip_network("64:ff9b::/96")


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
    if os.path.isfile(name):
        return _decode(name, shown)
    if isinstance(source, str) and (encoded := _base64_bytes(source)) is not None:
        return _decode(io.BytesIO(encoded), "the image")
    raise ValueError(f"no such image: '{shown}' (a path, a URL of http or https, or base64 text)")


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


# --- to RGB ---


def image_to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB as a viewer shows it: upright, transparency over white, 16 bits and floats scaled to 8.

    Raises:
        ValueError: for a mode that is not displayed without a color profile ("LAB"), and for non-finite floats.
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


# --- label maps ---


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
    found = segmentation_maps
    if not isinstance(found, (list, tuple)):
        is_array = isinstance(found, (np.ndarray, Tensor))
        is_batch = is_array and found.ndim > 2 and not (found.ndim == 3 and len(images) == 1)
        found = list(found) if is_batch else [found]
    if len(found) != len(images):
        raise ValueError(f"{len(images)} images, but {len(found)} segmentation maps")
    maps = [read_label_map(one) for one in found]
    for labels, image in zip(maps, images, strict=True):
        if labels.shape != image.shape[-2:]:
            sizes = tuple(labels.shape), tuple(image.shape[-2:])
            raise ValueError(f"a segmentation map of {sizes[0]} does not fit an image of {sizes[1]}")
    return maps


# --- URLs of http and https, within a time and a size, and on request from the public internet only ---


def printable(name: str | bytes) -> str:
    """Return at most 200 characters of a file's name or a URL, on one line, without unpaired surrogates."""
    name = os.fsdecode(name)
    name = name if len(name) <= 200 else f"{name[:199]}…"
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in name)


def _escaped(letter: str) -> str:
    """Escape a character; a byte that is not UTF-8, which Python holds as a surrogate, as that byte."""
    return f"\\x{ord(letter) - 0xDC00:02x}" if "\udc80" <= letter <= "\udcff" else ascii(letter)[1:-1]


def is_url(text: str) -> bool:
    """Tell whether a text is a URL of http or https."""
    return text[:8].lower().startswith(("http://", "https://"))


def fetch_url(url: str, timeout: float | None = None, allow_private_addresses: bool = True) -> bytes:
    """Fetch a URL of http or https, following redirects.

    Args:
        url: URL.
        timeout: seconds that all of it may take, whatever the server sends in between (default 30).
        allow_private_addresses: False refuses hosts, also those of redirects, that are not on the public internet
            (loopback, link-local, private addresses), and uses no proxy. The address that is checked is the one that
            is connected to.

    Returns:
        At most `MAX_DOWNLOAD_BYTES` bytes.

    Raises:
        ValueError: in one line that names the URL, if it cannot be fetched, is refused, too slow or too large.
    """
    shown = printable(url)
    if not is_url(url):
        raise ValueError(f"{shown} is not a URL of http or https")
    seconds = DOWNLOAD_SECONDS if timeout is None else timeout
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(None if allow_private_addresses else {}),
        _DeadlineHandler(time.monotonic() + seconds, allow_private_addresses),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "ita-segmentation"})
        with opener.open(request, timeout=seconds) as response:
            data = response.read(MAX_DOWNLOAD_BYTES + 1)
    except urllib.error.HTTPError as error:
        raise ValueError(
            f"{shown} cannot be fetched: HTTP {error.code} {printable(str(error.reason))}"
        ) from error
    except (OSError, ValueError, ArithmeticError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, TimeoutError):
            reason = f"it takes more than {seconds:g} seconds"
        raise ValueError(
            f"{shown} cannot be fetched: {printable(str(reason) or type(error).__name__)}"
        ) from error
    if len(data) > MAX_DOWNLOAD_BYTES:
        raise ValueError(f"{shown} has more than the {MAX_DOWNLOAD_BYTES // 2**20} MiB allowed")
    return data


class _DeadlineHandler(urllib.request.AbstractHTTPHandler):
    """Opens URLs of http and https through sockets that are checked and keep one deadline.

    Args:
        deadline: of everything that is fetched, on the clock of `time.monotonic`.
        allow_private_addresses: as for `fetch_url`.
    """

    def __init__(self, deadline: float, allow_private_addresses: bool):
        super().__init__()
        self._deadline = deadline
        self._allow_private_addresses = allow_private_addresses
        self._context = ssl.create_default_context()
        self._context.sslsocket_class = type(
            "_DeadlineSSLSocket", (_DeadlineSocketMixin, ssl.SSLSocket), {"deadline": deadline}
        )

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection(http.client.HTTPConnection), request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection(http.client.HTTPSConnection), request, context=self._context)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def _connection(self, kind: Any) -> Any:
        def connection(*arguments: Any, **options: Any) -> http.client.HTTPConnection:
            made = kind(*arguments, **options)
            made._create_connection = self._connect
            return made

        return connection

    def _connect(self, address: tuple[str, int], *_: Any) -> socket.socket:
        """Connect to the first address of (host, port) that answers; as `socket.create_connection`."""
        found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
        if not self._allow_private_addresses and not all(
            is_public_address(str(where[0])) for *_, where in found
        ):
            raise OSError("its host is not on the public internet")
        failure: OSError | None = None
        for family, kind, protocol, _name, where in found:
            opened = _DeadlineSocket(family, kind, protocol)
            opened.deadline = self._deadline
            try:
                opened.settimeout(remaining_seconds(self._deadline))
                opened.connect(where)
            except OSError as error:
                opened.close()
                failure = error
            else:
                return opened
        raise failure or OSError("its host has no address")


class _DeadlineSocketMixin:
    """A socket whose reads all end at one deadline."""

    deadline = float("inf")

    def recv_into(self, *arguments: Any, **options: Any) -> int:
        self.settimeout(remaining_seconds(self.deadline))  # type: ignore[attr-defined]
        return super().recv_into(*arguments, **options)  # type: ignore[misc]


class _DeadlineSocket(_DeadlineSocketMixin, socket.socket):
    pass


def remaining_seconds(deadline: float) -> float:
    """Return the seconds until a deadline.

    Raises:
        TimeoutError: if it has passed.
    """
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("timed out")
    return seconds


def is_public_address(address: str) -> bool:
    """Tell whether an IP address is on the public internet: unicast, and in no range that embeds an IPv4 address."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address) and (ip.sixtofour or ip.teredo or ip in NAT64):
        return False  # carries an IPv4 address, which may be private
    return ip.is_global and not ip.is_multicast
