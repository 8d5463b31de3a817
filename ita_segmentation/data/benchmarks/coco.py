"""COCO 2017 panoptic: 80 things and 53 stuff classes, for training (118,287 images) and validation (5,000)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ita_segmentation.data.benchmarks.files import (
    check_same_size,
    image_size,
    read_bytes,
    read_color_png,
    read_image_bytes,
    require_folder,
)
from ita_segmentation.data.benchmarks.release import Category, LabelledImage, ReleaseError
from ita_segmentation.data.categories import category_ids, load_categories
from ita_segmentation.errors import one_line

FOLDERS = {"train": "train2017", "validation": "val2017"}


class _Segment(NamedTuple):
    """An entry of "segments_info", as it stands in the file."""

    id: int
    category_id: int
    iscrowd: int


@dataclass(frozen=True)
class PanopticItem:
    """An image and its segments: (id, class index, iscrowd); paths relative to the source."""

    image: str
    panoptic: str
    segments: tuple[tuple[int, int, int], ...]


class CocoPanoptic:
    """COCO 2017 with its panoptic annotations: `panoptic_*.json` and PNGs of segment ids, R + 256 G + 65536 B.

    A pixel's class is that of its segment, crowds included; pixels of no segment (id 0) are void. Every segment of
    the JSON must be in its PNG, and every id of the PNG in the JSON.
    """

    categories: Sequence[Category] = load_categories("coco-panoptic")
    ignore_index = 255
    splits: tuple[str, ...] = ("train", "validation")
    has_segments = True
    layout = (
        "COCO 2017: {train,val}2017/*.jpg, annotations/panoptic_{train,val}2017.json and the PNGs of "
        "panoptic_{train,val}2017.zip, unpacked in annotations/ or beside it"
    )

    def index(self, source: Path, split: str) -> list[PanopticItem]:
        folder = FOLDERS[split]
        annotations = f"annotations/panoptic_{folder}.json"
        maps = f"annotations/panoptic_{folder}"
        if not (source / maps).is_dir() and (source / f"panoptic_{folder}").is_dir():
            maps = f"panoptic_{folder}"
        require_folder(source, [folder, annotations, maps], self.layout)
        path = source / annotations
        images, rows = _read_panoptic_json(path)
        class_indices = {
            category_id: index for index, category_id in enumerate(category_ids("coco-panoptic"))
        }
        items = []
        for row in rows:
            image, panoptic, segments = _checked(row, images, class_indices, path)
            items.append(PanopticItem(f"{folder}/{image}", f"{maps}/{panoptic}", segments))
        annotated = {row["image_id"] for row in rows}
        bare = [name for image_id, name in images.items() if image_id not in annotated]
        if bare:
            raise ReleaseError(f"{path} has no annotation of {len(bare):,} of its images, first of {bare[0]}")
        if not items:
            raise ReleaseError(f"{path} has no annotations")
        return items

    def read(self, source: Path, item: PanopticItem) -> LabelledImage:
        image_path, panoptic_path = source / item.image, source / item.panoptic
        image = read_image_bytes(image_path)
        encoded = read_color_png(panoptic_path)
        check_same_size(image_size(image), encoded, image_path, panoptic_path)
        ids = encoded[..., 0] | encoded[..., 1].astype(np.int32) << 8 | encoded[..., 2].astype(np.int32) << 16
        classes = {0: self.ignore_index} | {segment_id: index for segment_id, index, _ in item.segments}
        segments = [
            {
                "id": segment_id,
                "category_id": index,
                "isthing": bool(self.categories[index].is_thing),
                "iscrowd": bool(crowd),
            }
            for segment_id, index, crowd in item.segments
        ]
        return LabelledImage(image_path.stem, image, _class_map(ids, classes, panoptic_path), ids, segments)


def _class_map(ids: np.ndarray, classes: dict[int, int], path: Path) -> np.ndarray:
    """(H, W) uint8 class of each pixel, found once for each run of equal ids in a row of pixels.

    Args:
        ids: (H, W) int32 segment ids, 0 for void.
        classes: the class of each id, void included.

    Raises:
        ReleaseError: an id of the map has no class, or the map lacks a segment.
    """
    flat = ids.ravel()
    starts = np.flatnonzero(np.concatenate(([True], flat[1:] != flat[:-1])))
    present, which = np.unique(flat[starts], return_inverse=True)
    unknown = [segment_id for segment_id in present.tolist() if segment_id not in classes]
    if unknown:
        raise ReleaseError(
            f"{path} has the segment {unknown[0]}, which the JSON does not list ({len(unknown)} such)"
        )
    lacking = sorted(classes.keys() - {0} - set(present.tolist()))
    if lacking:
        raise ReleaseError(
            f"{path} lacks the segment {lacking[0]}, which the JSON lists ({len(lacking)} such)"
        )
    of_present = np.array([classes[segment_id] for segment_id in present.tolist()], np.uint8)
    lengths = np.diff(starts, append=flat.size)
    return np.repeat(of_present[which], lengths).reshape(ids.shape)


# ------------------------------------------------------------------------------------------------------------
# The JSON


def _compact(entry: dict[str, Any]) -> Any:
    """What stays of an object of the file, innermost objects first; the segments are nearly all of it."""
    if "iscrowd" in entry and "category_id" in entry and "id" in entry:
        return _Segment(entry["id"], entry["category_id"], entry["iscrowd"])
    return entry


def _read_panoptic_json(path: Path) -> tuple[dict[int, str], list[dict[str, Any]]]:
    """File names of the images by id, and the annotations of `panoptic_*.json`.

    Raises:
        ReleaseError: it is no JSON, or none of panoptic annotations.
    """
    try:
        content = json.loads(read_bytes(path), object_hook=_compact)
    except (ValueError, RecursionError) as error:
        raise ReleaseError(f"{path} is not JSON: {one_line(error, 120)}") from error
    images, rows = (
        (content.get("images"), content.get("annotations")) if isinstance(content, dict) else (None, None)
    )
    if not isinstance(images, list) or not isinstance(rows, list):
        raise ReleaseError(
            f"{path} is no panoptic annotation: lists 'images' and 'annotations' were expected"
        )
    try:
        names = {image["id"]: str(image["file_name"]) for image in images}
    except (KeyError, TypeError) as error:
        raise ReleaseError(f"{path}: an entry of 'images' has no 'id' or 'file_name'") from error
    return names, rows


def _checked(
    row: Any, images: dict[int, str], class_indices: dict[int, int], path: Path
) -> tuple[str, str, tuple[tuple[int, int, int], ...]]:
    """Names of the image and of the map, and the segments (id, class index, iscrowd) of an annotation."""
    try:
        image_id, panoptic, segments = row["image_id"], row["file_name"], row["segments_info"]
        where = f"{path}, {panoptic}"
        if image_id not in images:
            raise ReleaseError(f"{where}: 'images' has no image {image_id}")
        if not all(isinstance(segment, _Segment) for segment in segments):
            raise ReleaseError(f"{where}: a segment lacks 'id', 'category_id' or 'iscrowd'")
        unknown = [segment for segment in segments if segment.category_id not in class_indices]
        ids = Counter(segment.id for segment in segments)
    except (KeyError, TypeError) as error:
        raise ReleaseError(f"{path}: an annotation is malformed: {one_line(repr(row), 120)}") from error
    if unknown:
        raise ReleaseError(
            f"{where}: segment {unknown[0].id} has the unknown category {unknown[0].category_id}"
        )
    wrong = [segment_id for segment_id, count in ids.items() if count > 1 or not _is_segment_id(segment_id)]
    if wrong:
        raise ReleaseError(
            f"{where}: the segment id {wrong[0]!r} is not from 1 to 2^24 - 1, or is there twice"
        )
    for name in (images[image_id], panoptic):
        if not isinstance(name, str) or Path(name).name != name:
            raise ReleaseError(f"{path}: {name!r} is no file name")
    rows = tuple((segment.id, class_indices[segment.category_id], segment.iscrowd) for segment in segments)
    return images[image_id], panoptic, rows


def _is_segment_id(value: Any) -> bool:
    return isinstance(value, int) and 0 < value < 1 << 24
