"""Encode labeled images as rows of a prepared dataset (the columns are described in `prepared.py`)."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ita_segmentation.data.benchmarks.base import LabeledImage, SourceDataset
from ita_segmentation.data.benchmarks.readers import image_size
from ita_segmentation.data.segment_maps import ids_to_rgb
from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.images import DECODING_ERRORS, open_image

if TYPE_CHECKING:
    from datasets import Features

ORIENTATION = 0x0112
"""The EXIF tag for the orientation: 2..8 are rotations and reflections; 1, or no such tag, is upright."""


def features_of(dataset: SourceDataset, has_segments: bool) -> Features:
    """Describe the columns of a prepared dataset; the features name the classes, and which of them are things."""
    from datasets import ClassLabel, Features, Image, List, Value

    names = ClassLabel(names=[category.name for category in dataset.categories])
    columns: dict[str, Any] = {"image": Image(), "label": Image()}
    if has_segments:
        segment = {
            "id": Value("int32"),
            "category_id": names,
            "isthing": Value("bool"),
            "iscrowd": Value("bool"),
        }
        columns |= {"panoptic": Image(), "segments": List(segment)}
    columns["classes"] = List(names)
    if _knows_things(dataset):
        things = [category.name for category in dataset.categories if category.is_thing]
        columns["things"] = List(ClassLabel(names=things))
    return Features(columns | {"ignore_index": Value("int32"), "image_id": Value("string")})


def _knows_things(dataset: SourceDataset) -> bool:
    return all(category.is_thing is not None for category in dataset.categories)


def encode_row(dataset: SourceDataset, image: LabeledImage, has_segments: bool) -> dict[str, Any]:
    """Encode an image and its maps; ITAError if they do not fit each other, or hold what is no class or segment."""
    if image.image_id != image.image_id.encode(errors="replace").decode():
        raise ITAError(f"{ascii(image.image_id)}: the name of the image is not valid UTF-8")
    width, height = image_size(image.image)
    for what, array in (("label", image.label), ("panoptic map", image.panoptic)):
        if array is not None and array.shape != (height, width):
            raise ITAError(f"{image.image_id}: its {what} is {array.shape}, its image {(height, width)}")
    if (image.panoptic is not None) != has_segments:
        lacks = "lacks" if image.panoptic is None else "has"
        raise ITAError(f"{image.image_id} {lacks} segments, unlike others")
    present = _classes_in(dataset, image)
    orientation = _orientation(image)
    row: dict[str, Any] = {
        "image": {"bytes": image.image, "path": None},
        "label": _png(image.label, orientation),
        "classes": present,
        "ignore_index": dataset.ignore_index,
        "image_id": image.image_id,
    }
    if image.panoptic is not None:
        row["panoptic"] = _png(ids_to_rgb(image.panoptic), orientation)
        row["segments"] = image.segments
    if _knows_things(dataset):
        things = [index for index, category in enumerate(dataset.categories) if category.is_thing]
        row["things"] = [things.index(index) for index in present if index in things]
    return row


def _classes_in(dataset: SourceDataset, image: LabeledImage) -> list[int]:
    """List the classes in an image's label, ascending."""
    dtype = np.uint8 if dataset.ignore_index == 255 else np.uint16
    if image.label.dtype != dtype:
        raise ITAError(f"{image.image_id}: its label is {image.label.dtype}, not {np.dtype(dtype)}")
    values = np.flatnonzero(np.bincount(image.label.ravel())).tolist()
    present = [value for value in values if value != dataset.ignore_index]
    if present and present[-1] >= len(dataset.categories):
        raise ITAError(f"{image.image_id}: its label contains {present[-1]}, which is not a class")
    return present


def _orientation(image: LabeledImage) -> int | None:
    """Read how an image is to be rotated or reflected, 2..8 as in EXIF; None if it is stored upright."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = open_image(image.image).getexif().get(ORIENTATION)
    except DECODING_ERRORS as error:
        raise ITAError(f"{image.image_id}: its image's EXIF is damaged: {one_line(error, 80)}") from error
    return value if value in range(2, 9) else None


def _png(array: np.ndarray, orientation: int | None) -> dict[str, Any]:
    """Encode a map, (H, W) uint8 or uint16 or (H, W, 3) uint8, with the orientation of its image."""
    buffer, exif = io.BytesIO(), Image.Exif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
    Image.fromarray(array).save(buffer, "PNG", **({"exif": exif} if orientation else {}))
    return {"bytes": buffer.getvalue(), "path": None}
