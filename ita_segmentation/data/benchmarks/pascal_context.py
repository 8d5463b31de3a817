"""Pascal Context: images of VOC2010 with every pixel labelled, as 59 frequent classes or as all 459.

Both take their split from `trainval_merged.json`, the annotations of PASCAL in Detail ("phase": "train" or "val"),
as the published evaluations do: 4,996 and 5,104 images. The 59 classes come from the masks in that file, the 459
from `trainval/*.mat`.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ita_segmentation.data.benchmarks.files import (
    ImageFiles,
    check_same_size,
    image_size,
    read_bytes,
    read_image_bytes,
    relabel,
    require_folder,
)
from ita_segmentation.data.benchmarks.release import Category, LabelledImage, ReleaseError
from ita_segmentation.data.categories import category_ids, load_categories
from ita_segmentation.errors import one_line

PHASES = {"train": "train", "validation": "val"}
DETAIL_FILE = "trainval_merged.json"


# ------------------------------------------------------------------------------------------------------------
# The annotations of PASCAL in Detail


class _Image(NamedTuple):
    """An entry of "images"."""

    image_id: int
    file_name: str
    phase: str


class _Mask(NamedTuple):
    """An entry of "annos_segmentation": a run-length encoded mask of (height, width)."""

    image_id: int
    category_id: int
    height: int
    width: int
    counts: str


def _keep_what_is_needed(entry: dict[str, Any]) -> Any:
    """What stays of an object of the file, innermost objects first: most of it is parts, boundaries, occlusions."""
    if "annos_segmentation" in entry:
        return {key: entry.get(key) for key in ("images", "annos_segmentation")}
    if "counts" in entry:
        return entry
    try:
        if "phase" in entry:
            return _Image(int(entry["image_id"]), str(entry["file_name"]), entry["phase"])
        if "segmentation" in entry and "image_id" in entry:
            mask = entry["segmentation"]
            height, width = map(int, mask["size"])
            return _Mask(
                int(entry["image_id"]), int(entry["category_id"]), height, width, str(mask["counts"])
            )
    except (KeyError, TypeError, ValueError):
        return entry
    return None


def _read_detail(path: Path) -> tuple[list[_Image], list[_Mask]]:
    """Images and masks of the file, in its order.

    Raises:
        ReleaseError: it is no JSON, or an entry of it is malformed.
    """
    try:
        content = json.loads(read_bytes(path), object_hook=_keep_what_is_needed)
    except (ValueError, RecursionError) as error:
        raise ReleaseError(f"{path} is not JSON: {one_line(error, 120)}") from error
    if not isinstance(content, dict) or set(content) != {"images", "annos_segmentation"}:
        raise ReleaseError(
            f"{path} is not PASCAL in Detail's: 'images' and 'annos_segmentation' were expected"
        )
    for key, kind in (("images", _Image), ("annos_segmentation", _Mask)):
        if not isinstance(content[key], list):
            raise ReleaseError(f"{path}: {key!r} is no list")
        wrong = next((n for n, entry in enumerate(content[key]) if not isinstance(entry, kind)), None)
        if wrong is not None:
            raise ReleaseError(f"{path}: entry {wrong} of {key!r} is malformed")
    return content["images"], content["annos_segmentation"]


def _images_of(split: str, images: Sequence[_Image], path: Path) -> list[_Image]:
    """The images of a split, whose names are looked at."""
    chosen = [image for image in images if image.phase == PHASES[split]]
    if not chosen:
        raise ReleaseError(f"{path} has no images of the phase {PHASES[split]!r}")
    for image in chosen:
        if Path(image.file_name).name != image.file_name or not image.file_name.endswith(".jpg"):
            raise ReleaseError(f"{path} lists an image that is no name of a JPEG: {image.file_name!r}")
    if len({image.image_id for image in chosen}) < len(chosen):
        raise ReleaseError(f"{path} lists an image twice")
    return chosen


# ------------------------------------------------------------------------------------------------------------
# 59 classes


@dataclass(frozen=True)
class DetailItem:
    """An image and its masks: (category id, height, width, counts), in the order they are painted in."""

    image: str
    masks: tuple[tuple[int, int, int, str], ...]


class PascalContext59:
    """VOC2010 with the merged annotations of PASCAL in Detail: 59 classes, everything else ignored.

    An image's masks are painted in the order of the file, a later one over an earlier. What is visible in the end
    must be of one of the 59 categories, whose classes are in ascending order of category ids.
    """

    categories: Sequence[Category] = load_categories("pascal-context-59")
    ignore_index = 255
    splits: tuple[str, ...] = ("train", "validation")
    has_segments = False
    layout = f"VOC2010: JPEGImages/*.jpg and {DETAIL_FILE} (the annotations of PASCAL in Detail)"

    def index(self, source: Path, split: str) -> list[DetailItem]:
        require_folder(source, ["JPEGImages", DETAIL_FILE], self.layout)
        path = source / DETAIL_FILE
        images, masks = _read_detail(path)
        of_image: dict[int, list[tuple[int, int, int, str]]] = {image.image_id: [] for image in images}
        for mask in masks:
            if mask.image_id not in of_image:
                raise ReleaseError(f"{path} has a mask of the image {mask.image_id}, which it does not list")
            of_image[mask.image_id].append(mask[1:])
        return [
            DetailItem(f"JPEGImages/{image.file_name}", tuple(of_image[image.image_id]))
            for image in _images_of(split, images, path)
        ]

    def read(self, source: Path, item: DetailItem) -> LabelledImage:
        image_path = source / item.image
        image = read_image_bytes(image_path)
        width, height = image_size(image)
        where = (
            source / f"{DETAIL_FILE}, {image_path.name}"
        )  # for messages: the file, and whose entries in it
        category_map = np.zeros((height, width), np.uint16)
        for number, (category_id, mask_height, mask_width, counts) in enumerate(item.masks):
            if (mask_height, mask_width) != (height, width):
                raise ReleaseError(
                    f"{where}: mask {number} is {mask_width} x {mask_height} pixels but the image is "
                    f"{width} x {height}"
                )
            if not 0 < category_id < 65536:
                raise ReleaseError(f"{where}: mask {number} has the category {category_id}")
            category_map[_decode_mask(height, width, counts, f"{where}: mask {number}")] = category_id
        values = {0: self.ignore_index}
        values |= {value: index for index, value in enumerate(category_ids("pascal-context-59"))}
        label = relabel(category_map, values, self.ignore_index, where)
        return LabelledImage(image_path.stem, image, label)


def _decode_mask(height: int, width: int, counts: str, where: str) -> np.ndarray:
    """(height, width) bool of COCO's compressed run-length encoding: columns from the left, off and on in turns.

    pycocotools does not notice an encoding that ends too early: what it gives for the rest is left to chance.
    """
    lengths = _run_lengths(counts.encode())
    if lengths is None or min(lengths, default=-1) < 0 or sum(lengths) != height * width:
        raise ReleaseError(f"{where} is damaged: no run-length encoding of {width} x {height} pixels")
    on = np.arange(len(lengths)) % 2 == 1
    return np.repeat(on, lengths).reshape(width, height).T


def _run_lengths(code: bytes) -> list[int] | None:
    """Run lengths of the encoding; None if it is none.

    A number is made of groups of five bits, the lowest first, each a character from "0" on with a sixth bit that says
    that more follow; the last group's highest bit is the sign. From the fourth number on it is the difference to the
    length two before.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in code:
        bits = character - 48
        if not 0 <= bits < 64:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= bits >> 4 << shift
            lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
            value = shift = 0
    return None if shift else lengths


# ------------------------------------------------------------------------------------------------------------
# 459 classes


class PascalContext459:
    """VOC2010 with Pascal Context's own annotations: `LabelMap` of `trainval/*.mat`, 0 ignored, 1..459 the classes.

    Which images are of which split stands in `trainval_merged.json`.
    """

    categories: Sequence[Category] = load_categories("pascal-context-459")
    ignore_index = 65535
    splits: tuple[str, ...] = ("train", "validation")
    has_segments = False
    layout = (
        f"VOC2010: JPEGImages/*.jpg, trainval/*.mat and {DETAIL_FILE} (which tells training from validation)"
    )

    def index(self, source: Path, split: str) -> list[ImageFiles]:
        require_folder(source, ["JPEGImages", "trainval", DETAIL_FILE], self.layout)
        path = source / DETAIL_FILE
        names = [image.file_name for image in _images_of(split, _read_detail(path)[0], path)]
        return [
            ImageFiles(Path(name).stem, f"JPEGImages/{name}", f"trainval/{Path(name).stem}.mat")
            for name in names
        ]

    def read(self, source: Path, item: ImageFiles) -> LabelledImage:
        image_path, label_path = source / item.image, source / item.label
        image = read_image_bytes(image_path)
        label_map = _read_label_map(label_path)
        check_same_size(image_size(image), label_map, image_path, label_path)
        values = {0: self.ignore_index} | {index + 1: index for index in range(len(self.categories))}
        label = relabel(label_map, values, self.ignore_index, label_path)
        return LabelledImage(item.image_id, image, label)


def _read_label_map(path: Path) -> np.ndarray:
    """(H, W) uint8 or uint16 `LabelMap` of a MATLAB file.

    Raises:
        ReleaseError: the file is missing, cut off, of another format, or has no such map.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    errors = (MatReadError, ValueError, TypeError, KeyError, IndexError, EOFError, OSError, OverflowError)
    try:
        content = loadmat(io.BytesIO(read_bytes(path)), variable_names=["LabelMap"])
    except (*errors, NotImplementedError, MemoryError, struct.error, zlib.error) as error:
        raise ReleaseError(f"{path} cannot be read as a MATLAB file: {one_line(error, 120)}") from error
    label_map = content.get("LabelMap")
    if label_map is None:
        raise ReleaseError(f"{path} has no 'LabelMap'")
    if label_map.ndim != 2 or label_map.dtype not in (np.uint8, np.uint16):
        raise ReleaseError(
            f"{path}: 'LabelMap' is {label_map.dtype} of {label_map.ndim} dimensions, not a map of 16 bits"
        )
    return label_map
