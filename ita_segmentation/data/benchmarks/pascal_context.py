"""Pascal Context: images of VOC2010 with every pixel labeled, as 59 frequent classes or as all 459.

Both take their split from `trainval_merged.json`, the annotations of PASCAL in Detail ("phase": "train" or "val"),
as the published evaluations do: 4,996 and 5,104 images. The 59 classes come from the masks in that file, the 459
from `trainval/*.mat`.
"""

import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ita_segmentation.data.benchmarks import readers
from ita_segmentation.data.benchmarks.base import ImageEntry, LabeledImage, SourceDataset
from ita_segmentation.data.categories import category_ids, load_categories
from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.images import DECODING_ERRORS

PHASES = {"train": "train", "validation": "val"}
DETAIL_FILE = "trainval_merged.json"


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


def _compact(entry: dict[str, Any]) -> Any:
    """Drop the parts, boundaries and occlusions, which are most of the file; innermost objects come first."""
    if "annos_segmentation" in entry:
        return {key: entry.get(key) for key in ("images", "annos_segmentation")}
    if "counts" in entry:
        return entry
    try:
        if "phase" in entry:
            return _Image(int(entry["image_id"]), str(entry["file_name"]), entry["phase"])
        if "segmentation" in entry and "image_id" in entry:
            height, width = map(int, entry["segmentation"]["size"])
            counts = str(entry["segmentation"]["counts"])
            return _Mask(int(entry["image_id"]), int(entry["category_id"]), height, width, counts)
    except (KeyError, TypeError, ValueError):
        return entry
    return None


def _read_detail(path: Path) -> tuple[list[_Image], list[_Mask]]:
    """Read the images and masks of the file, in its order."""
    content = readers.read_json(path, _compact)
    if not isinstance(content, dict) or set(content) != {"images", "annos_segmentation"}:
        raise ITAError(f"{path} is not PASCAL in Detail's: 'images' and 'annos_segmentation' were expected")
    for key, kind in (("images", _Image), ("annos_segmentation", _Mask)):
        if not isinstance(content[key], list):
            raise ITAError(f"{path}: {key!r} is not a list")
        wrong = next((n for n, entry in enumerate(content[key]) if not isinstance(entry, kind)), None)
        if wrong is not None:
            raise ITAError(f"{path}: entry {wrong} of {key!r} is malformed")
    return content["images"], content["annos_segmentation"]


def _images_of_split(split: str, images: Sequence[_Image], path: Path) -> list[_Image]:
    chosen = [image for image in images if image.phase == PHASES[split]]
    if not chosen:
        raise ITAError(f"{path} has no images of the phase {PHASES[split]!r}")
    for image in chosen:
        if Path(image.file_name).name != image.file_name or not image.file_name.endswith(".jpg"):
            raise ITAError(f"{path} lists an image that is not the name of a JPEG: {image.file_name!r}")
    if len({image.image_id for image in chosen}) < len(chosen):
        raise ITAError(f"{path} lists an image twice")
    return chosen


class PascalContext59(SourceDataset):
    """VOC2010 with the merged annotations of PASCAL in Detail: 59 classes, everything else ignored.

    An image's masks are painted in the order of the file, later ones over earlier ones. What is visible in the end
    must belong to one of the 59 categories, whose classes are in ascending order of category ids.
    """

    categories = load_categories("pascal-context-59")
    layout = f"VOC2010: JPEGImages/*.jpg and {DETAIL_FILE} (the annotations of PASCAL in Detail)"

    def index(self, source: Path, split: str) -> list[ImageEntry]:
        """List the images; see `SourceDataset.index`. `annotation` has the masks in the order of painting."""
        readers.require_folder(source, ["JPEGImages", DETAIL_FILE], self.layout)
        path = source / DETAIL_FILE
        images, masks = _read_detail(path)
        masks_of: dict[int, list[_Mask]] = {image.image_id: [] for image in images}
        for mask in masks:
            if mask.image_id not in masks_of:
                raise ITAError(f"{path} has a mask of the image {mask.image_id}, which it does not list")
            masks_of[mask.image_id].append(mask)
        return [
            ImageEntry(
                image_id=Path(image.file_name).stem,
                image=f"JPEGImages/{image.file_name}",
                annotation=tuple(masks_of[image.image_id]),
            )
            for image in _images_of_split(split, images, path)
        ]

    def read(self, source: Path, entry: ImageEntry) -> LabeledImage:
        """Read one image; see `SourceDataset.read`."""
        image = readers.read_image_bytes(source / entry.image)
        width, height = readers.image_size(image)
        where = f"{source / DETAIL_FILE}, {entry.image_id}.jpg"
        category_map = np.zeros((height, width), np.uint16)
        for number, mask in enumerate(entry.annotation):
            if (mask.height, mask.width) != (height, width):
                size = f"{mask.width} x {mask.height} pixels but the image is {width} x {height}"
                raise ITAError(f"{where}: mask {number} is {size}")
            if not 0 < mask.category_id < 65536:
                raise ITAError(f"{where}: mask {number} has the category {mask.category_id}")
            inside = decode_mask(mask.counts, height, width, f"{where}: mask {number}")
            category_map[inside] = mask.category_id
        values = {0: self.ignore_index}
        values |= {value: index for index, value in enumerate(category_ids("pascal-context-59"))}
        return LabeledImage(
            entry.image_id, image, readers.relabel(category_map, values, self.ignore_index, where)
        )


def decode_mask(counts: str, height: int, width: int, where: str) -> np.ndarray:
    """Decode a mask (height, width) bool from COCO's compressed run lengths (down the columns, background first).

    A number consists of groups of five bits, lowest first, each a character from "0" on whose sixth bit says that more
    follow; the highest bit of the last group is the sign. From the fourth number on, it is the difference to the one
    two before. pycocotools reads and writes out of bounds where an encoding is damaged, so it is checked here.
    """
    lengths: list[int] = []
    value = shift = 0
    for bits in (character - 48 for character in counts.encode()):
        if not 0 <= bits < 64:
            lengths = [-1]
            break
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= bits >> 4 << shift
            lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
            value = shift = 0
    if shift or min(lengths, default=-1) < 0 or sum(lengths) != height * width:
        raise ITAError(f"{where} is damaged: not a run-length encoding of {width} x {height} pixels")
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(width, height).T


class PascalContext459(SourceDataset):
    """VOC2010 with Pascal Context's own annotations: `LabelMap` of `trainval/*.mat`, 0 ignored, 1..459 the classes.

    `trainval_merged.json` says which images belong to which split.
    """

    categories = load_categories("pascal-context-459")
    ignore_index = 65535
    layout = (
        f"VOC2010: JPEGImages/*.jpg, trainval/*.mat and {DETAIL_FILE} (which tells training from validation)"
    )

    def index(self, source: Path, split: str) -> list[ImageEntry]:
        """List the images of a split; see `SourceDataset.index`."""
        readers.require_folder(source, ["JPEGImages", "trainval", DETAIL_FILE], self.layout)
        path = source / DETAIL_FILE
        stems = [Path(image.file_name).stem for image in _images_of_split(split, _read_detail(path)[0], path)]
        return [ImageEntry(stem, f"JPEGImages/{stem}.jpg", f"trainval/{stem}.mat") for stem in stems]

    def read(self, source: Path, entry: ImageEntry) -> LabeledImage:
        """Read one image; see `SourceDataset.read`."""
        image_path, label_path = source / entry.image, source / str(entry.label)
        image = readers.read_image_bytes(image_path)
        label_map = _read_label_map(label_path)
        readers.check_same_size(readers.image_size(image), label_map, image_path, label_path)
        values = {0: self.ignore_index} | {index + 1: index for index in range(len(self.categories))}
        return LabeledImage(
            entry.image_id, image, readers.relabel(label_map, values, self.ignore_index, label_path)
        )


def _read_label_map(path: Path) -> np.ndarray:
    """Read the (H, W) uint8 or uint16 `LabelMap` of a MATLAB file."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    errors = (*DECODING_ERRORS, MatReadError, NotImplementedError, MemoryError, zlib.error)
    try:
        content = loadmat(io.BytesIO(readers.read_bytes(path)), variable_names=["LabelMap"])
    except errors as error:
        raise ITAError(f"{path} cannot be read as a MATLAB file: {one_line(error, 120)}") from error
    label_map = content.get("LabelMap")
    if label_map is None:
        raise ITAError(f"{path} has no 'LabelMap'")
    if label_map.ndim != 2 or label_map.dtype not in (np.uint8, np.uint16):
        raise ITAError(
            f"{path}: 'LabelMap' is {label_map.dtype} of {label_map.ndim} dimensions, not a map of 16 bits"
        )
    return label_map
