"""One file of a prepared data set: images of a release read, checked and written as rows of parquet.

A shard's bytes depend on the release and on the versions of Pillow and pyarrow only, not on the process that writes
it or on the time. It is written under a temporary name and renamed when it is complete; at any time a process holds
the rows of one row group.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from ita_segmentation.data.benchmarks.files import image_size
from ita_segmentation.data.benchmarks.release import LabelledImage, Release, ReleaseError
from ita_segmentation.errors import one_line
from ita_segmentation.images import DECODING_ERRORS

if TYPE_CHECKING:
    from datasets import Features

ROWS_PER_GROUP = 32
ORIENTATION = 0x0112
"""The EXIF tag that says how an image is to be turned; 1, or no such tag: not at all."""


@dataclass(frozen=True)
class Shard:
    """What a worker needs to write one file.

    Attributes:
        items: those of the release's index that it holds.
        path: where the file belongs when it is complete.
        with_segments: whether rows have panoptic maps and segments.
        schema: of the rows; its metadata tells `datasets` the features.
    """

    release: Release
    source: Path
    items: Sequence[Any]
    path: Path
    with_segments: bool
    schema: pyarrow.Schema


def features_of(release: Release, with_segments: bool) -> Features:
    """The columns of a prepared data set; their features name the release's classes and which are things."""
    from datasets import ClassLabel, Features, Image, List, Value

    names = ClassLabel(names=[category.name for category in release.categories])
    columns: dict[str, Any] = {"image": Image(), "label": Image()}
    if with_segments:
        segment = {
            "id": Value("int32"),
            "category_id": names,
            "isthing": Value("bool"),
            "iscrowd": Value("bool"),
        }
        columns |= {"panoptic": Image(), "segments": List(segment)}
    columns["classes"] = List(names)
    if knows_things(release):
        things = [category.name for category in release.categories if category.is_thing]
        columns["things"] = List(ClassLabel(names=things))
    return Features(columns | {"ignore_index": Value("int32"), "image_id": Value("string")})


def knows_things(release: Release) -> bool:
    """Whether the release tells things from stuff."""
    return all(category.is_thing is not None for category in release.categories)


def write_shard(shard: Shard, on_image: Callable[[], None]) -> list[str]:
    """Reads the images of a shard and writes its file, unless one of them is not what it should be.

    Args:
        on_image: called after each image.

    Returns:
        A line for each image that could not be read, in order; the file is written only if there is none.
    """
    problems: list[str] = []
    temporary = shard.path.with_name(f".{shard.path.name}.{os.getpid()}.tmp")
    try:
        with pyarrow.parquet.ParquetWriter(
            temporary, shard.schema, use_dictionary=False, write_statistics=False
        ) as writer:
            for start in range(0, len(shard.items), ROWS_PER_GROUP):
                rows = []
                for item in shard.items[start : start + ROWS_PER_GROUP]:
                    try:
                        rows.append(row_of(shard.release, shard.release.read(shard.source, item)))
                        _check_segments(rows[-1], shard.with_segments)
                    except ReleaseError as error:
                        problems.append(str(error))
                    on_image()
                if not problems:
                    writer.write_table(pyarrow.Table.from_pylist(rows, shard.schema), ROWS_PER_GROUP)
        if not problems:
            os.replace(temporary, shard.path)
    finally:
        temporary.unlink(missing_ok=True)
    return problems


def _check_segments(row: dict[str, Any], with_segments: bool) -> None:
    if ("panoptic" in row) != with_segments:
        raise ReleaseError(f"{row['image_id']} {'lacks' if with_segments else 'has'} segments, unlike others")


def row_of(release: Release, image: LabelledImage) -> dict[str, Any]:
    """An image as a row of the data set, its maps encoded.

    Raises:
        ReleaseError: the maps do not fit the image as it is stored, or hold what is neither class nor segment.
    """
    width, height = image_size(image.image)
    for what, array in (("label", image.label), ("panoptic map", image.panoptic)):
        if array is not None and array.shape != (height, width):
            raise ReleaseError(f"{image.image_id}: its {what} is {array.shape}, its image {(height, width)}")
    present = _classes_in(release, image)
    orientation = orientation_of(image)
    row: dict[str, Any] = {
        "image": {"bytes": image.image, "path": None},
        "label": _png(image.label, orientation),
    }
    if image.panoptic is not None:
        channels = np.stack([image.panoptic >> shift & 255 for shift in (0, 8, 16)], axis=-1)
        row["panoptic"] = _png(channels.astype(np.uint8), orientation)
        row["segments"] = image.segments
    row["classes"] = present
    if knows_things(release):
        thing_classes = [index for index, category in enumerate(release.categories) if category.is_thing]
        position = {index: place for place, index in enumerate(thing_classes)}
        row["things"] = [position[index] for index in present if index in position]
    return row | {"ignore_index": release.ignore_index, "image_id": image.image_id}


def _classes_in(release: Release, image: LabelledImage) -> list[int]:
    """The classes in an image's label, ascending."""
    dtype = np.uint8 if release.ignore_index == 255 else np.uint16
    if image.label.dtype != dtype:
        raise ReleaseError(f"{image.image_id}: its label is {image.label.dtype}, not {np.dtype(dtype)}")
    values = np.flatnonzero(np.bincount(image.label.ravel())).tolist()
    present = [value for value in values if value != release.ignore_index]
    if present and present[-1] >= len(release.categories):
        raise ReleaseError(f"{image.image_id}: its label has {present[-1]}, which is no class")
    return present


def orientation_of(image: LabelledImage) -> int | None:
    """How an image is to be turned, 2..8 as in EXIF; None for one that is upright as it is stored.

    Raises:
        ReleaseError: its EXIF is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = Image.open(io.BytesIO(image.image)).getexif().get(ORIENTATION)
    except DECODING_ERRORS as error:
        raise ReleaseError(f"{image.image_id}: its image's EXIF is damaged: {one_line(error, 80)}") from error
    return value if value in range(2, 9) else None


def _png(array: np.ndarray, orientation: int | None) -> dict[str, Any]:
    """A map as PNG: (H, W) uint8, (H, W) uint16 or (H, W, 3) uint8; turned as its image says that it is."""
    buffer, exif = io.BytesIO(), Image.Exif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
    Image.fromarray(array).save(buffer, "PNG", **({"exif": exif} if orientation else {}))
    return {"bytes": buffer.getvalue(), "path": None}
