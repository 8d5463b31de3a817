"""Images to tensors, and the model's outputs to segments.

The way in follows `Mask2FormerImageProcessor`: resize the short side, rescale, normalise with CLIP's colour
statistics, pad at the bottom and on the right to a common multiple of 32. Before that, every kind of image
(EXIF orientation, grey, palette, alpha, CMYK, 16 bits) becomes the RGB that a person sees.

The way out is the read-out of Mask2Former (arXiv 2112.01527, section 3) and FC-CLIP (arXiv 2308.02487): each
query's mask logits are brought to the size asked for, and scored there. Both bilinear resizes (mask to
network input, image part of the input to the size asked for) are separable, so a band of output rows needs a
few mask rows only: nothing of size (queries, height, width) or (classes, height, width) is ever held. Bands
lie in memory with queries last, so that a step of resizing is one long loop, and scoring a matrix product.

Symbols: Q queries, K classes, (h, w) a mask's size, (H, W) the output's size.
"""

import base64
import binascii
import io
import math
import os
import struct
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate, pad
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.image_processing_utils import BatchFeature, get_size_dict
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    PILImageResampling,
    SizeDict,
    get_image_size_for_max_height_width,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import logging

logger = logging.get_logger(__name__)

MASK_STRIDE = 4  # a mask logit covers 4 x 4 pixels of the network input
IMAGE_STRIDE = 32  # an image is segmented as if it were padded to multiples of this; a batch pads it further
MAX_INSTANCES = 100  # (query, class) pairs that the instance read-out looks at
BAND_BYTES = 8 * 2**20  # what one band of output rows may take, in bytes; caches hold it, mostly
GROUP_SIZE = 8  # queries, and classes, that share one bound on what they say for each other
ROUNDING = 1e-4  # what sums of a few hundred float32 may be off, relative, and more
MAX_IMAGE_PIXELS = 178_956_970  # Pillow's own limit for what it calls a decompression bomb
MAX_DOWNLOAD_BYTES = 256 * 2**20  # of an image that an address names
DOWNLOAD_SECONDS = 30.0
REDUCED_PIXELS = 2**25  # larger images are brought near the network's size before they become floats
# What Pillow's decoders raise on files that are cut off or made of something else.
DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
)
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")


class ITAImageProcessorKwargs(ImagesKwargs, total=False):
    """Arguments beyond those of every image processor.

    ignore_index: label of pixels that belong to no mask; None (default): every label is one.
    do_reduce_labels: 0 is background: it becomes `ignore_index`, and every other label is decremented by 1.
    size_divisor: height and width are padded to multiples of this many pixels (32).
    """

    ignore_index: int | None
    do_reduce_labels: bool
    size_divisor: int


# ------------------------------------------------------------------------------------------------------------
# Images -> RGB tensors


def read_image(source: Any, timeout: float | None = None) -> Image.Image:
    """Any image as a person sees it: RGB, upright, 8 bits, the first frame of an animation.

    source: a PIL image, a path, an address (http, https), a data URL, base64 text, or the bytes of a file.
    timeout: seconds to wait for an address (30).

    Raises ValueError, in one line that names the image, for what is missing, empty, cut off, no image, of a kind
    that Pillow cannot decode (as HEIC without its plug-in) or larger than `MAX_IMAGE_PIXELS`; TypeError for what is
    none of the above.
    """
    if isinstance(source, Image.Image):
        return image_to_rgb(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(source), "the image")
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"an image is a PIL image, a path, a URL, base64 text or bytes, got {type(source).__name__}"
        )
    name = os.fspath(source)
    if isinstance(source, str) and name.startswith(("http://", "https://")):
        return _decode(io.BytesIO(_download(name, DOWNLOAD_SECONDS if timeout is None else timeout)), name)
    if isinstance(source, str) and not _is_file(name) and (encoded := _base64_bytes(name)) is not None:
        return _decode(io.BytesIO(encoded), "the image")
    if not _is_file(name):
        shown = name if len(name) <= 200 else f"{name[:199]}…"
        raise ValueError(f"no such image: {shown!r} (a path, a URL of http or https, or base64 text)")
    return _decode(name, name)


def _is_file(name: str) -> bool:
    try:
        return os.path.isfile(name)
    except (OSError, ValueError):  # longer than a name may be, or with a null character
        return False


def _base64_bytes(text: str) -> bytes | None:
    """The bytes of base64 text or of a data URL; None where it is neither, or far too short for an image."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return None
    return data if len(data) >= 24 else None


def _download(address: str, timeout: float) -> bytes:
    request = urllib.request.Request(address, headers={"User-Agent": "ita-segmentation"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            data = response.read(MAX_DOWNLOAD_BYTES + 1)
    except urllib.error.HTTPError as error:
        raise ValueError(f"{address} cannot be fetched: HTTP {error.code} {error.reason}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{address} cannot be fetched: {getattr(error, 'reason', None) or error}") from error
    if len(data) > MAX_DOWNLOAD_BYTES:
        raise ValueError(f"{address} has more than the {MAX_DOWNLOAD_BYTES // 2**20} MiB allowed")
    return data


def _decode(file: Any, name: str) -> Image.Image:
    """An encoded image (a path or a file in memory) -> RGB; `name` is what messages call it."""
    too_large = f"{name} has more than the {MAX_IMAGE_PIXELS:,} pixels allowed (a decompression bomb?)"
    try:
        head = _first_bytes(file)
        if not head:
            raise ValueError(f"{name} is empty (zero bytes)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)  # of broken EXIF data, which is no reason to stop
            with Image.open(file) as image:
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
            message = f"{name} is not an image (or of a kind that Pillow does not know)"
        raise ValueError(message) from error
    except DECODING_ERRORS as error:
        said = " ".join(str(error).split())[:160] or type(error).__name__
        if isinstance(error, ValueError) and said.startswith(name):
            raise
        raise ValueError(f"{name} cannot be read as an image: {said}") from error


def _first_bytes(file: Any) -> bytes:
    if isinstance(file, io.BytesIO):
        head = file.read(16)
        file.seek(0)
        return head
    with open(file, "rb") as stream:
        return stream.read(16)


def image_to_rgb(image: Image.Image) -> Image.Image:
    """An RGB image as a viewer shows it: upright, transparency over white, 16 bits and floats scaled to 8.

    Raises ValueError for a mode that has no agreed look (as "LAB") and for floats that are not finite.
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
        raise ValueError("a LAB image cannot be shown without its colour profile: convert it to RGB first")
    return image.convert("RGB")


def _sixteen_to_eight_bits(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _wide_to_eight_bits(values: np.ndarray) -> np.ndarray:
    """32-bit integers or floats -> 8 bits; the range is the smallest usual one that holds all values."""
    if not np.isfinite(values).all():
        raise ValueError("the image has values that are not finite (NaN or infinity)")
    top = float(values.max(initial=0))
    usual = (1.0, 255.0, 65535.0) if values.dtype.kind == "f" else (255.0, 65535.0)
    white = next((value for value in usual if top <= value), top)
    return np.rint(values.clip(0).astype(np.float64) * (255.0 / white)).astype(np.uint8)


def array_to_rgb(image: np.ndarray | Tensor, input_data_format: str | None = None) -> Tensor:
    """(H, W), (C, H, W) or (H, W, C) with 1, 3 or 4 channels -> (3, H, W), uint8 or float32.

    Integers are 0..255 (uint16: 0..65535); floats keep their range, as `rescale_factor` and `do_rescale` say
    what it is. A fourth channel is alpha, and the image is laid over white. Raises ValueError for any other
    shape or range, and for floats that are not finite.
    """
    array = _as_tensor(image)
    if array.ndim == 2:
        array, input_data_format = array[None], "channels_first"
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(f"an image is (H, W), (C, H, W) or (H, W, C) with pixels, got {tuple(array.shape)}")
    if input_data_format is not None:
        axes = [0] if input_data_format == "channels_first" else [-1]
    else:  # where either could be, arrays have their channels last and tensors first
        axes = [0, -1] if isinstance(image, Tensor) else [-1, 0]
    axis = next((axis for axis in axes if array.shape[axis] in (1, 3, 4)), None)
    if axis is None:
        raise ValueError(f"an image has 1, 3 or 4 channels, got shape {tuple(image.shape)}")
    array = array.movedim(axis, 0)
    array = _to_uint8_or_float(array)
    if array.shape[0] == 4:
        white = 255.0 if not array.is_floating_point() or array.max() > 1 else 1.0
        colour, alpha = array[:3].float(), array[3:].float() / white
        laid_over = colour * alpha + white * (1 - alpha)
        array = laid_over if array.is_floating_point() else laid_over.round().to(torch.uint8)
    return array.expand(3, -1, -1).contiguous()


def _to_uint8_or_float(array: Tensor) -> Tensor:
    if array.is_complex():
        raise ValueError("an image cannot hold complex numbers")
    if array.is_floating_point():
        array = array.float()
        if not array.isfinite().all():
            raise ValueError("the image has values that are not finite (NaN or infinity)")
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


def _flat_list(images: Any) -> list[Any]:
    """One image, a (nested) sequence of them or a stacked batch -> a list. Raises ValueError for what is
    neither.
    """
    if isinstance(images, (list, tuple)):
        return [one for image in images for one in _flat_list(image)]
    if isinstance(images, (str, os.PathLike, Image.Image)):
        return [images]
    if isinstance(images, (np.ndarray, Tensor)):
        if images.ndim == 4:
            return list(images)
        return [images]
    raise ValueError(f"an image is a PIL image, an array, a tensor or a path, got {type(images).__name__}")


def _as_tensor(array: np.ndarray | Tensor) -> Tensor:
    if isinstance(array, Tensor):
        return array
    if array.dtype.kind not in "biuf":
        raise ValueError(f"an image holds numbers, got an array of {array.dtype}")
    return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)))


def label_map(segmentation_map: Any) -> Tensor:
    """A map of labels (PIL image, array or tensor; (H, W), (1, H, W) or (H, W, 1)) -> (H, W) int64.

    A palette image gives its indices. Raises ValueError for any other shape.
    """
    if isinstance(segmentation_map, (str, os.PathLike)):
        with Image.open(segmentation_map) as image:
            segmentation_map = np.array(image)
    elif isinstance(segmentation_map, Image.Image):
        segmentation_map = np.array(segmentation_map)
    labels = _as_tensor(segmentation_map)
    if labels.ndim == 3 and 1 in (labels.shape[0], labels.shape[-1]):
        labels = labels.squeeze(0) if labels.shape[0] == 1 else labels.squeeze(-1)
    if labels.ndim != 2 or 0 in labels.shape:
        raise ValueError(f"a segmentation map is (H, W), got shape {tuple(labels.shape)}")
    return labels.long()


def binary_masks(
    labels: Tensor,
    instance_id_to_semantic_id: Mapping[int, int] | None = None,
    ignore_index: int | None = None,
    do_reduce_labels: bool = False,
) -> tuple[Tensor, Tensor]:
    """(H, W) labels -> masks (n, H, W) float32 of 0 and 1 and their class labels (n,) int64, in order of
    label.

    `instance_id_to_semantic_id` maps the labels in the map to classes (both before any reduction).
    Raises ValueError for a label it lacks, or when labels are to be reduced and there is no `ignore_index`.
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


# ------------------------------------------------------------------------------------------------------------
# Masks at the output's size, a band of rows at a time


class MaskBands:
    """The mask logits of one image at the output's size, computed a band of rows at a time.

    mask_logits: (Q, h, w). Without `target_size` the output is the network input (4h, 4w). With it, the mask
    is brought to the network input, cropped to `image_size` (height, width: the image before padding) and
    brought to `target_size` (height, width); both resizes are bilinear, `align_corners=False`. Without
    `image_size`, nothing is cropped, and masks which have the target's size already are taken as they are.
    """

    def __init__(
        self,
        mask_logits: Tensor,
        image_size: Sequence[int] | None = None,
        target_size: Sequence[int] | None = None,
    ):
        if image_size is not None and target_size is not None:
            rows, columns = (
                math.ceil(side / IMAGE_STRIDE) * IMAGE_STRIDE // MASK_STRIDE for side in image_size
            )
            mask_logits = mask_logits[:, :rows, :columns]  # without what the batch added
        height, width = mask_logits.shape[-2:]
        self.mask_logits = mask_logits
        if target_size is not None and (len(target_size) != 2 or min(target_size) < 1):
            raise ValueError(f"a target size is (height, width) in pixels, got {tuple(target_size)}")
        self._as_they_are = (
            image_size is None and target_size is not None and tuple(target_size) == (height, width)
        )
        if self._as_they_are:
            self._row_steps, self._column_steps = (height, height, height), (width, width, width)
        else:
            network = (height * MASK_STRIDE, width * MASK_STRIDE)
            cropped = network if image_size is None or target_size is None else tuple(image_size)
            target = network if target_size is None else target_size
            self._row_steps = (network[0], int(cropped[0]), int(target[0]))
            self._column_steps = (network[1], int(cropped[1]), int(target[1]))
        self.size = (self._row_steps[-1], self._column_steps[-1])
        identity = torch.eye(height)[:, :, None]
        self._row_weights = _resize(identity, self._row_steps)[:, :, 0].T  # (H, h), at most four in a row
        self._cells = mask_logits.permute(1, 2, 0)  # (h, w, Q)
        if not self._as_they_are:
            self._cells = self._cells.float().contiguous()

    def bands(self, values_per_pixel: int) -> Iterator[tuple[slice, Tensor]]:
        """Yields (rows, logits (Q, rows, W) float32, the caller's to change), so many rows at once that
        `values_per_pixel` float32 numbers for each of their pixels take `BAND_BYTES` or less (one row at
        least). In memory, logits have their queries last.
        """
        height, width = self.size
        step = max(1, BAND_BYTES // (4 * width * max(1, values_per_pixel)))
        for start in range(0, height, step):
            rows = slice(start, min(start + step, height))
            yield rows, self.rows(rows)

    def rows(self, rows: slice) -> Tensor:
        """Logits (Q, rows, W) float32 of some rows of the output, at least one; the caller's to change."""
        if self._as_they_are:
            return self._cells[rows].to(torch.float32, copy=True).permute(2, 0, 1)
        weights = self._row_weights[rows]
        touched = weights.any(0).nonzero()
        source = slice(int(touched[0]), int(touched[-1]) + 1)
        cells = self._cells[source]
        logits = (weights[:, source].to(cells.device) @ cells.flatten(1)).unflatten(1, cells.shape[1:])
        return _resize(logits, self._column_steps).permute(2, 0, 1)


def _resize(values: Tensor, steps: tuple[int, int, int]) -> Tensor:
    """(rows, w, Q) -> (rows, W, Q): to the network input's width, cropped, to the output's width."""
    network, cropped, target = steps
    for width, keep in ((network, cropped), (target, target)):
        if values.numel() == 0:
            values = values.new_zeros(len(values), width, values.shape[2])
        elif values.shape[1] != width:
            # Channels last, which is how it lies in memory already.
            image = values[None].permute(0, 3, 1, 2)
            size = (len(values), width)
            image = interpolate(image, size=size, mode="bilinear", align_corners=False)
            values = image.permute(0, 2, 3, 1)[0]
        values = values[:, :keep]
    return values


# ------------------------------------------------------------------------------------------------------------
# Read-out of one image


def class_probabilities(class_logits: Tensor) -> Tensor:
    """(Q, K + 1) logits or log-probabilities, void last -> (Q, K + 1) float32 probabilities."""
    return class_logits.float().softmax(-1)


def _presence(
    class_logits: Tensor,
    mask_logits: Tensor,
    image_size: Sequence[int] | None,
    target_size: Sequence[int] | None,
    more_per_pixel: int,
) -> tuple[Tensor, tuple[int, int], Iterator[tuple[slice, Tensor]]]:
    """Class probabilities (Q', K) of the queries that have a share in any class; the output's size; and for each
    band its rows and mask probabilities (pixels, Q'). `more_per_pixel`: numbers that the caller adds to Q'.

    Queries are ordered by their best class and cut into G groups of `GROUP_SIZE` (the last is filled up with queries
    of probability zero); the groups' first members come first, then their second ones, and so on: Q' = 8 G.
    """
    probabilities = class_probabilities(class_logits)[:, :-1]
    best = probabilities.max(-1)
    chosen = (best.values > 0).nonzero().flatten()  # rows of padding have no share in any class
    chosen = chosen[best.indices[chosen].argsort(stable=True)]
    missing = -len(chosen) % GROUP_SIZE
    weights = pad(probabilities[chosen], (0, 0, 0, missing))
    weights = weights.unflatten(0, (-1, GROUP_SIZE)).transpose(0, 1).flatten(0, 1)
    members = torch.cat([chosen, chosen[-1:].expand(missing)]).view(-1, GROUP_SIZE)
    masks = MaskBands(mask_logits[members.T.flatten()], image_size, target_size)

    def bands() -> Iterator[tuple[slice, Tensor]]:
        for rows, logits in masks.bands(len(weights) + more_per_pixel):
            yield rows, logits.permute(1, 2, 0).sigmoid_().flatten(0, 1)

    return weights, masks.size, bands()


def semantic_scores(
    class_logits: Tensor,
    mask_logits: Tensor,
    image_size: Sequence[int] | None = None,
    target_size: Sequence[int] | None = None,
) -> Tensor:
    """Score of each class in each pixel, (K, H, W) float32: the sum over queries of class probability times
    mask probability. class_logits (Q, K + 1), void last; mask_logits (Q, h, w); sizes as for `MaskBands`.
    """
    num_classes = class_logits.shape[1] - 1
    weights, size, bands = _presence(class_logits, mask_logits, image_size, target_size, num_classes)
    scores = weights.new_zeros(weights.shape[1], *size)
    for rows, presence in bands:
        scores[:, rows] = (weights.T @ presence.T).unflatten(1, (-1, size[1]))
    return scores


def semantic_map(
    class_logits: Tensor,
    mask_logits: Tensor,
    image_size: Sequence[int] | None = None,
    target_size: Sequence[int] | None = None,
) -> Tensor:
    """Class of the highest score in each pixel, (H, W) int64. Arguments as for `semantic_scores`."""
    weights, size, bands = _presence(class_logits, mask_logits, image_size, target_size, more_per_pixel=0)
    labels = torch.zeros(size, dtype=torch.int64, device=mask_logits.device)
    possible = weights.amax(0).nonzero().flatten() if len(weights) else labels.new_zeros(0)
    if not len(possible):
        return labels
    contest = _Contest(weights[:, possible])
    for rows, presence in bands:
        labels[rows] = possible[contest.winners(presence)].unflatten(0, (-1, size[1]))
    return labels


class _Contest:
    """Finds the class of the highest score for the pixels of one band after the other.

    Most classes win nowhere, and that can be known without their scores: from a group of queries, a class gets no
    more than its highest probability among them times the queries' summed presence. A class for which these bounds,
    summed over the groups, stay below the score of some other class in every pixel of a band is left out there;
    groups of classes first, single ones where many groups remain. The classes to beat are those that won in the band
    before. The result is the same as without.

    weights: (Q, K), class probabilities in the order of `_presence`.
    """

    def __init__(self, weights: Tensor):
        num_classes = weights.shape[1]
        self.weights = weights
        # Waiting for the outcome of a band would cost another device more than the scores of all classes.
        self.bounded = weights.device.type == "cpu" and num_classes >= 4 * GROUP_SIZE and len(weights) > 0
        if not self.bounded:
            return
        self.leaders = torch.arange(num_classes)
        # (groups of queries, K)
        self.bounds = weights.unflatten(0, (GROUP_SIZE, -1)).amax(0) * (1 + ROUNDING)
        frequent_first = weights.sum(0).argsort(descending=True)
        self.groups = pad(frequent_first, (0, -num_classes % GROUP_SIZE), value=num_classes).view(
            -1, GROUP_SIZE
        )
        self.group_bounds = pad(self.bounds, (0, 1))[:, self.groups].amax(2)

    def winners(self, presence: Tensor) -> Tensor:
        """presence: (pixels, Q), mask probabilities. Returns (pixels,) int64."""
        if not self.bounded:
            parts = _parts(presence, self.weights.shape[1])
            return torch.cat([(part @ self.weights).argmax(1) for part in parts])
        classes = self._contenders(presence)
        weights = self.weights[:, classes]
        winners = classes[torch.cat([(part @ weights).argmax(1) for part in _parts(presence, len(classes))])]
        self.leaders = winners.bincount().nonzero().flatten()
        return winners

    def _contenders(self, presence: Tensor) -> Tensor:
        """Classes, in order, that may win a pixel of the band, and a few more."""
        num_classes = self.weights.shape[1]
        if 2 * len(self.leaders) > num_classes:
            return torch.arange(num_classes)
        to_beat = (presence @ self.weights[:, self.leaders]).amax(1, keepdim=True)
        together = presence.unflatten(1, (GROUP_SIZE, -1)).sum(1)
        groups = self.groups[_reaches(together, self.group_bounds, to_beat)]
        classes = torch.cat([groups.flatten(), self.leaders]).unique()
        classes = classes[classes < num_classes]
        if 4 * len(classes) > num_classes:
            single = classes[_reaches(together, self.bounds[:, classes], to_beat)]
            classes = torch.cat([single, self.leaders]).unique()
        return classes


def _reaches(together: Tensor, bounds: Tensor, to_beat: Tensor) -> Tensor:
    """Whether `together` (pixels, groups) @ `bounds` (groups, n) reaches `to_beat` (pixels, 1) anywhere, (n,)."""
    parts = zip(_parts(together, bounds.shape[1]), _parts(to_beat, bounds.shape[1]), strict=True)
    return (
        torch.stack([torch.addmm(beat, part, bounds, beta=-1).amax(0) for part, beat in parts]).amax(0) >= 0
    )


def _parts(pixels: Tensor, values_per_pixel: int) -> tuple[Tensor, ...]:
    """(pixels, n) cut so that `values_per_pixel` float32 numbers for each of a part's take `BAND_BYTES` at most."""
    return pixels.split(max(1, BAND_BYTES // (4 * values_per_pixel)))


def panoptic_segments(
    class_logits: Tensor,
    mask_logits: Tensor,
    image_size: Sequence[int] | None = None,
    target_size: Sequence[int] | None = None,
    threshold: float = 0.8,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    label_ids_to_fuse: set[int] | frozenset[int] = frozenset(),
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Segments that do not overlap: a map (H, W) int32 of their ids (from 1; 0: no segment) and their
    information.

    Queries whose best class is not void and scores above `threshold` compete for each pixel with score times
    mask probability. A query's segment is what it won of its own pixels (mask probability of `mask_threshold`
    or more); it is dropped if own, won or both are empty or won / own is below `overlap_mask_area_threshold`.
    Queries of one class among `label_ids_to_fuse` make one segment, whose score is the best of theirs.
    """
    scores, labels = class_probabilities(class_logits).max(-1)
    kept = (labels != class_logits.shape[-1] - 1) & (scores > threshold)
    scores, label_list = scores[kept], labels[kept].tolist()
    masks = MaskBands(mask_logits[kept], image_size, target_size)
    device, count = mask_logits.device, len(label_list)
    if count == 0:
        return torch.zeros(masks.size, dtype=torch.int32, device=device), []

    winner = torch.empty(masks.size, dtype=torch.int64, device=device)
    own_by_winner = torch.empty(masks.size, dtype=torch.bool, device=device)
    own_areas = torch.zeros(count, dtype=torch.int64, device=device)
    for rows, logits in masks.bands(2 * count):
        presence = logits.sigmoid_().permute(1, 2, 0)
        own_areas += (presence >= mask_threshold).flatten(0, 1).float().sum(0).long()
        winner[rows] = (presence * scores).argmax(-1)
        own_by_winner[rows] = presence.gather(-1, winner[rows][..., None])[..., 0] >= mask_threshold
    won_areas = winner.flatten().bincount(minlength=count).tolist()
    segment_areas = winner[own_by_winner].bincount(minlength=count).tolist()

    segments: list[dict[str, Any]] = []
    fused: dict[int, dict[str, Any]] = {}
    query_ids = [0] * count
    for query, (label, own, score) in enumerate(
        zip(label_list, own_areas.tolist(), scores.tolist(), strict=True)
    ):
        won = won_areas[query]
        if 0 in (own, won, segment_areas[query]) or won / own < overlap_mask_area_threshold:
            continue
        score = round(score, 6)
        if label in fused:
            fused[label]["score"] = max(fused[label]["score"], score)
            query_ids[query] = fused[label]["id"]
            continue
        segment = {
            "id": len(segments) + 1,
            "label_id": label,
            "was_fused": label in label_ids_to_fuse,
            "score": score,
        }
        if segment["was_fused"]:
            fused[label] = segment
        segments.append(segment)
        query_ids[query] = segment["id"]
    id_of_query = torch.tensor(query_ids, dtype=torch.int32, device=device)
    return id_of_query[winner] * own_by_winner, segments


def instance_segments(
    class_logits: Tensor,
    mask_logits: Tensor,
    image_size: Sequence[int] | None = None,
    target_size: Sequence[int] | None = None,
    threshold: float = 0.0,
    mask_threshold: float = 0.5,
    stuff_ids: set[int] | frozenset[int] = frozenset(),
    binary_maps: bool = False,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Things, which may overlap, best score first; ids from 1.

    Of the 100 most probable (query, class) pairs those of thing classes are kept. The mask is where the mask
    probability is above `mask_threshold`, the score class probability times mean mask probability in the
    mask. Pairs with an empty mask or a score below `threshold` are left out. Gives a map (H, W) int32 where
    the better of two instances hides the other (0: none), or, with `binary_maps`, one mask for each, (n, H,
    W) bool; and their information.
    """
    probabilities = class_probabilities(class_logits)[:, :-1]
    num_classes = probabilities.shape[1]
    class_scores, pairs = probabilities.flatten().topk(min(MAX_INSTANCES, probabilities.numel()))
    things = torch.tensor(
        [pair % num_classes not in stuff_ids for pair in pairs.tolist()], device=pairs.device
    )
    things = things & (class_scores > 0)  # classes and queries that are padding have probability 0
    class_scores, pairs = class_scores[things], pairs[things]
    queries, query_of_pair = (pairs // num_classes).unique(return_inverse=True)

    masks = MaskBands(mask_logits[queries], image_size, target_size)
    cut = math.log(mask_threshold / (1 - mask_threshold)) if 0 < mask_threshold < 1 else math.inf
    cut = -math.inf if mask_threshold <= 0 else cut
    areas = torch.zeros(len(queries), dtype=torch.int64, device=pairs.device)
    totals = torch.zeros(len(queries), dtype=torch.float32, device=pairs.device)
    for _, logits in masks.bands(2 * len(queries)):
        logits = logits.permute(1, 2, 0).flatten(0, 1)
        inside = (logits > cut).float()
        areas += inside.sum(0).long()
        totals += (logits.sigmoid_() * inside).sum(0)
    scores = class_scores * (totals / areas.clamp(min=1))[query_of_pair]

    order = scores.argsort(descending=True, stable=True)
    order = order[(areas[query_of_pair] > 0)[order] & (scores >= threshold)[order]]
    labels = (pairs[order] % num_classes).tolist()
    segments = [
        {"id": number, "label_id": label, "was_fused": False, "score": round(score, 6)}
        for number, (label, score) in enumerate(zip(labels, scores[order].tolist(), strict=True), start=1)
    ]
    count, shown = len(segments), query_of_pair[order]
    shape = (count, *masks.size) if binary_maps else masks.size
    segmentation = torch.zeros(shape, dtype=torch.bool if binary_maps else torch.int32, device=pairs.device)
    if count == 0:
        return segmentation, segments
    # The best instance has the highest rank.
    ranks = torch.arange(count, 0, -1, dtype=torch.int32, device=pairs.device)
    for rows, logits in masks.bands(len(queries) + 2 * count):
        inside = (logits > cut)[shown]
        if binary_maps:
            segmentation[:, rows] = inside
        else:
            best = (inside * ranks[:, None, None]).amax(0)
            segmentation[rows] = torch.where(best > 0, count + 1 - best, 0)
    return segmentation, segments


def run_lengths(mask: Tensor) -> list[int]:
    """(H, W) bool -> run-length encoding in reading order: start (from 1) and length of each run."""
    flat = pad(mask.flatten().to(torch.int8), (1, 1))
    edges = (flat[1:] != flat[:-1]).nonzero().flatten() + 1
    edges[1::2] -= edges[::2]
    return edges.tolist()


# ------------------------------------------------------------------------------------------------------------


class ITAImageProcessor(TorchvisionBackend):
    """Makes the model's inputs from images, and segments from its outputs.

    The arguments are those of `Mask2FormerImageProcessor`; the defaults fit CLIP. Call it with `images` (PIL
    images, arrays, tensors or paths, of any sizes) to get

    - `pixel_values` (B, 3, H, W) float32 and `pixel_mask` (B, H, W) int64 (1: image, 0: padding), H and W
      being the smallest multiples of `size_divisor` that hold every image; and, with `segmentation_maps`,
    - `mask_labels`, a list of (n, H, W) float32 (0 in the padding), and `class_labels`, a list of (n,) int64.
    """

    valid_kwargs = ITAImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_mask"]

    resample = PILImageResampling.BILINEAR
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"shortest_edge": 800, "longest_edge": 1333}
    default_to_square = False
    do_resize = True
    do_rescale = True
    do_normalize = True
    rescale_factor = 1 / 255
    size_divisor = 32
    do_reduce_labels = False
    ignore_index = None

    def __init__(self, **kwargs: Any):
        max_size = kwargs.pop("max_size", None)
        size = kwargs.pop("size", None)
        if size is None:
            size = dict(self.size) if max_size is None else {**self.size, "longest_edge": max_size}
        kwargs["size"] = get_size_dict(size, max_size=max_size, default_to_square=False)
        super().__init__(**kwargs)

    def preprocess(  # type: ignore[override]
        self,
        images: Any,
        segmentation_maps: Any | None = None,
        instance_id_to_semantic_id: Sequence[Mapping[int, int]] | Mapping[int, int] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """See the class. `segmentation_maps`: one (H, W) map of labels for each image (PIL image, array,
        tensor or path); `instance_id_to_semantic_id`: class of each label, once or for each image (none: the
        labels are the classes). Raises ValueError for anything that is no image, and for maps that do not fit
        their images.
        """
        return super().preprocess(images, segmentation_maps, instance_id_to_semantic_id, **kwargs)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """PIL images, paths, URLs and base64 strings -> RGB PIL images; arrays and tensors stay as they are.

        Errors are those of `read_image`.
        """
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(one) for one in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, os.PathLike, Image.Image)):
            return read_image(image_url_or_urls)
        return image_url_or_urls

    def process_image(  # type: ignore[override]
        self,
        image: Any,
        *,
        input_data_format: str | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """One image -> (3, H, W), RGB, uint8 or float32. Raises ValueError where it is no image."""
        if isinstance(image, Image.Image):
            tensor = torch.from_numpy(np.array(image_to_rgb(image))).permute(2, 0, 1).contiguous()
        else:
            tensor = array_to_rgb(image, input_data_format)
        return tensor if device is None else tensor.to(device)

    def _preprocess_image_like_inputs(  # type: ignore[override]
        self,
        images: Any,
        segmentation_maps: Any | None,
        instance_id_to_semantic_id: Sequence[Mapping[int, int]] | Mapping[int, int] | None,
        *,
        input_data_format: str | None = None,
        device: str | torch.device | None = None,
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        size_divisor: int | None,
        pad_size: SizeDict | None,
        ignore_index: int | None,
        do_reduce_labels: bool,
        return_tensors: str | None,
        **kwargs: Any,
    ) -> BatchFeature:
        sources = _flat_list(self.fetch_images(images))
        if not sources:
            raise ValueError("no images given: the list is empty")
        targets: list[tuple[int, int] | None] = [
            output_size((image.height, image.width), size)
            if do_resize and segmentation_maps is None and isinstance(image, Image.Image)
            else None
            for image in sources
        ]
        image_files = [
            self.process_image(
                image if target is None else _reduced(image, target),
                input_data_format=input_data_format,
                device=device,
            )
            for image, target in zip(sources, targets, strict=True)
        ]
        if do_rescale and any(
            pil_image.is_floating_point() and pil_image.max() <= 1 for pil_image in image_files
        ):
            logger.warning_once(
                "a float image of 0..1 is taken as 0..255: pass `do_rescale=False` to keep it"
            )
        maps = _label_maps(segmentation_maps, image_files)
        if do_resize:
            sizes = [
                target or output_size(pil_image.shape[-2:], size)
                for pil_image, target in zip(image_files, targets, strict=True)
            ]
            image_files = [
                self.resize(pil_image, SizeDict(height=height, width=width), resample=resample)
                for pil_image, (height, width) in zip(image_files, sizes, strict=True)
            ]
            if maps is not None:
                maps = [_resize_labels(labels, one) for labels, one in zip(maps, sizes, strict=True)]

        padded = _padded_size(
            [pil_image.shape[-2:] for pil_image in image_files], pad_size, size_divisor or 1
        )
        pixels, pixel_masks = [], []
        for pil_image in image_files:
            pil_image = self.rescale_and_normalize(
                pil_image, do_rescale, rescale_factor, do_normalize, image_mean, image_std
            )
            pixels.append(_pad_to(pil_image, padded))
            pixel_masks.append(_pad_to(torch.ones_like(pil_image[0], dtype=torch.int64), padded))
        data = {"pixel_values": torch.stack(pixels), "pixel_mask": torch.stack(pixel_masks)}
        features = BatchFeature(data, tensor_type=return_tensors)
        if maps is not None:
            ids = instance_id_to_semantic_id
            per_image = ids if isinstance(ids, Sequence) else [ids] * len(maps)
            if len(per_image) != len(maps):
                raise ValueError(
                    f"{len(maps)} segmentation maps, but {len(per_image)} `instance_id_to_semantic_id`"
                )
            labels = [
                binary_masks(one, ids_of_one, ignore_index, do_reduce_labels)
                for one, ids_of_one in zip(maps, per_image, strict=True)
            ]
            features["mask_labels"] = [_pad_to(masks, padded) for masks, _ in labels]
            features["class_labels"] = [classes for _, classes in labels]
        return features

    @torch.no_grad()
    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Any | None = None,
        return_segmentation_scores: bool = False,
    ) -> list[Tensor] | list[SemanticSegmentationPostProcessorOutput]:
        """A map of classes (H, W) int64 for each image.

        outputs: the model's. target_sizes: (height, width) for each image; without, the network input's.
        With `return_segmentation_scores`, each item has `segmentation` (that map) and `segmentation_scores`
        (K, H, W) float32, which is large.
        Raises ValueError where there are not as many sizes as images.
        """
        images = list(_images_of(outputs, target_sizes))
        if not return_segmentation_scores:
            return [semantic_map(*image) for image, _ in images]
        scores = [semantic_scores(*image) for image, _ in images]
        return [
            SemanticSegmentationPostProcessorOutput(
                {"segmentation": one.argmax(0), "segmentation_scores": one}
            )
            for one in scores
        ]

    @torch.no_grad()
    def post_process_panoptic_segmentation(
        self,
        outputs: Any,
        threshold: float = 0.8,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        label_ids_to_fuse: set[int] | None = None,
        target_sizes: Any | None = None,
    ) -> list[dict[str, Any]]:
        """For each image `segmentation` (H, W) int32 (ids from 1; 0: no segment) and `segments_info`, a list
        of {"id", "label_id", "was_fused", "score"}; see `panoptic_segments`.

        label_ids_to_fuse: classes whose segments are one; by default what the outputs say is stuff.
        target_sizes and errors as for `post_process_semantic_segmentation`.
        """
        results = []
        for image, stuff_ids in _images_of(outputs, target_sizes):
            fuse = stuff_ids if label_ids_to_fuse is None else frozenset(label_ids_to_fuse)
            segmentation, segments = panoptic_segments(
                *image,
                threshold=threshold,
                mask_threshold=mask_threshold,
                overlap_mask_area_threshold=overlap_mask_area_threshold,
                label_ids_to_fuse=fuse,
            )
            results.append({"segmentation": segmentation, "segments_info": segments})
        return results

    @torch.no_grad()
    def post_process_instance_segmentation(
        self,
        outputs: Any,
        threshold: float = 0.0,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        target_sizes: Any | None = None,
        return_coco_annotation: bool = False,
        return_binary_maps: bool = False,
        label_ids_to_fuse: set[int] | None = None,
    ) -> list[dict[str, Any]]:
        """For each image `segmentation` (H, W) int32 (ids from 1; 0: none) and `segments_info`, a list of
        {"id", "label_id", "was_fused", "score"}, best first; see `instance_segments`.

        Instances may overlap, and the better one hides the other in the map. `return_binary_maps` gives one
        mask for each, (n, H, W) bool, instead, and `return_coco_annotation` a run-length encoding for each,
        in the order of `segments_info`. label_ids_to_fuse: classes that are stuff and have no instances; by
        default what the outputs say. overlap_mask_area_threshold has no effect, as in
        `Mask2FormerImageProcessor`: instances may overlap. target_sizes and errors as for
        `post_process_semantic_segmentation`; ValueError where both forms are asked.
        """
        if return_coco_annotation and return_binary_maps:
            raise ValueError("return_coco_annotation and return_binary_maps can not be both set to True.")
        results = []
        for image, stuff_ids in _images_of(outputs, target_sizes):
            segmentation: Any
            segmentation, segments = instance_segments(
                *image,
                threshold=threshold,
                mask_threshold=mask_threshold,
                stuff_ids=stuff_ids if label_ids_to_fuse is None else frozenset(label_ids_to_fuse),
                binary_maps=return_binary_maps or return_coco_annotation,
            )
            if return_coco_annotation:
                segmentation = [run_lengths(mask) for mask in segmentation]
            results.append({"segmentation": segmentation, "segments_info": segments})
        return results


def _reduced(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    """An image of more than `REDUCED_PIXELS`, at a whole fraction of its size, twice the `target` at least."""
    factor = min(image.height // (2 * target[0]), image.width // (2 * target[1]))
    if image.width * image.height <= REDUCED_PIXELS or factor < 2:
        return image
    return image.reduce(factor)


def output_size(image_size: Sequence[int], size: SizeDict) -> tuple[int, int]:
    """Size (height, width) that `size` asks for an image of `image_size`, at least one pixel each way.

    Raises ValueError where `size` has no known pair of keys.
    """
    height, width = image_size
    if size.shortest_edge and size.longest_edge:
        asked = get_size_with_aspect_ratio((height, width), size.shortest_edge, size.longest_edge)
    elif size.shortest_edge:
        scale = size.shortest_edge / min(height, width)
        asked = (round(height * scale), round(width * scale))
    elif size.longest_edge:
        scale = size.longest_edge / max(height, width)
        asked = (round(height * scale), round(width * scale))
    elif size.max_height and size.max_width:
        asked = get_image_size_for_max_height_width((height, width), size.max_height, size.max_width)
    elif size.height and size.width:
        asked = (size.height, size.width)
    else:
        pairs = "'height' and 'width', 'max_height' and 'max_width', 'shortest_edge' or 'longest_edge'"
        raise ValueError(f"`size` has {pairs}, got {dict(size)}")
    return max(1, asked[0]), max(1, asked[1])


def _label_maps(segmentation_maps: Any | None, images: list[Tensor]) -> list[Tensor] | None:
    if segmentation_maps is None:
        return None
    if (
        isinstance(segmentation_maps, (np.ndarray, Tensor))
        and segmentation_maps.ndim == 3
        and len(images) == 1
    ):
        segmentation_maps = [segmentation_maps]
    flat = segmentation_maps
    if not isinstance(flat, (list, tuple)):
        flat = list(flat) if isinstance(flat, (np.ndarray, Tensor)) and flat.ndim > 2 else [flat]
    if len(flat) != len(images):
        raise ValueError(f"{len(images)} images, but {len(flat)} segmentation maps")
    maps = [label_map(one) for one in flat]
    for labels, image in zip(maps, images, strict=True):
        if labels.shape != image.shape[-2:]:
            sizes = tuple(labels.shape), tuple(image.shape[-2:])
            raise ValueError(f"a segmentation map of {sizes[0]} does not fit an image of {sizes[1]}")
    return maps


def _padded_size(sizes: list[Sequence[int]], pad_size: SizeDict | None, divisor: int) -> tuple[int, int]:
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    if pad_size is not None:
        padded = pad_size.height or 0, pad_size.width or 0
        if padded[0] < height or padded[1] < width:
            raise ValueError(f"`pad_size` {dict(pad_size)} is smaller than an image of ({height}, {width})")
        height, width = padded
    return math.ceil(height / divisor) * divisor, math.ceil(width / divisor) * divisor


def _resize_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """(h, w) -> (*size), each pixel the label nearest to its centre; exact for any integer."""
    rows, columns = (
        ((torch.arange(new, device=labels.device) + 0.5) * (old / new)).long().clamp(max=old - 1)
        for old, new in zip(labels.shape, size, strict=True)
    )
    return labels[rows][:, columns]


def _pad_to(values: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., h, w) -> (..., *size), zeros at the bottom and on the right."""
    return pad(values, (0, size[1] - values.shape[-1], 0, size[0] - values.shape[-2]))


_Image = tuple[Tensor, Tensor, Sequence[int] | None, Sequence[int] | None]


def _images_of(outputs: Any, target_sizes: Any | None) -> Iterator[tuple[_Image, frozenset[int]]]:
    """For each image of the batch, the first four arguments of the read-out functions and its stuff
    classes.
    """

    def field(name: str) -> Any:
        return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)

    class_logits, mask_logits = field("class_queries_logits"), field("masks_queries_logits")
    image_sizes, stuff_ids = field("image_sizes"), field("stuff_ids")
    count = len(class_logits)
    if target_sizes is not None and len(target_sizes) != count:
        raise ValueError(f"{count} images, but {len(target_sizes)} target sizes")
    for index in range(count):
        image_size = None if image_sizes is None else [int(side) for side in image_sizes[index]]
        target_size = None if target_sizes is None else [int(side) for side in target_sizes[index]]
        stuff: Any = stuff_ids or ()
        if len(stuff) and not isinstance(stuff[0], int):  # a pipeline unbatches a list of lists into a list
            stuff = stuff[index]
        logits = class_logits[index]
        # The class axis is padded in a batch of vocabularies.
        real = (logits[:, :-1] > -math.inf).any(0).nonzero()
        num_classes = int(real[-1]) + 1 if len(real) else 1
        logits = torch.cat([logits[:, :num_classes], logits[:, -1:]], dim=1)
        yield (logits, mask_logits[index], image_size, target_size), frozenset(int(one) for one in stuff)


ITAImageProcessor.register_for_auto_class()
