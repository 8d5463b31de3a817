"""COCO 2017 panoptic: 80 things and 53 stuff classes, for training (118,287 images) and validation (5,000)."""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ita_segmentation.data.benchmarks import readers
from ita_segmentation.data.benchmarks.base import ImageEntry, LabeledImage, SourceDataset
from ita_segmentation.data.categories import category_ids, load_categories
from ita_segmentation.data.segment_maps import lookup_ids, rgb_to_ids
from ita_segmentation.errors import ITAError, one_line

FOLDERS = {"train": "train2017", "validation": "val2017"}


class _Segment(NamedTuple):
    """An entry of "segments_info" in the file."""

    id: int
    category_id: int
    iscrowd: int


class CocoPanoptic(SourceDataset):
    """COCO 2017 with its panoptic annotations: `panoptic_*.json` and PNGs of segment ids, R + 256 G + 65536 B.

    A pixel's class is that of its segment, crowds included; pixels without a segment (id 0) are void. Every segment
    of the JSON must be in its PNG, and every id of the PNG in the JSON.
    """

    categories = load_categories("coco-panoptic")
    layout = (
        "COCO 2017: {train,val}2017/*.jpg, annotations/panoptic_{train,val}2017.json and the PNGs of "
        "panoptic_{train,val}2017.zip, unpacked in annotations/ or beside it"
    )

    def index(self, source: Path, split: str) -> list[ImageEntry]:
        """List the images of a split; see `SourceDataset.index`. `annotation` has (id, class index, iscrowd)s."""
        folder = FOLDERS[split]
        annotations = f"annotations/panoptic_{folder}.json"
        maps = f"annotations/panoptic_{folder}"
        if not (source / maps).is_dir() and (source / f"panoptic_{folder}").is_dir():
            maps = f"panoptic_{folder}"
        readers.require_folder(source, [folder, annotations, maps], self.layout)
        path = source / annotations
        images, rows = _read_annotations(path)
        class_of = {category_id: index for index, category_id in enumerate(category_ids("coco-panoptic"))}
        entries = []
        for row in rows:
            image, panoptic, segments = _parse_annotation(row, images, class_of, path)
            entries.append(
                ImageEntry(
                    image_id=Path(image).stem,
                    image=f"{folder}/{image}",
                    label=f"{maps}/{panoptic}",
                    annotation=segments,
                    has_segments=True,
                )
            )
        annotated = {row["image_id"] for row in rows}
        missing = [name for image_id, name in images.items() if image_id not in annotated]
        if missing:
            raise ITAError(
                f"{path} has no annotation of {len(missing):,} of its images, first of {missing[0]}"
            )
        if not entries:
            raise ITAError(f"{path} has no annotations")
        return entries

    def read(self, source: Path, entry: ImageEntry) -> LabeledImage:
        """Read one image; see `SourceDataset.read`."""
        image_path, panoptic_path = source / entry.image, source / str(entry.label)
        image = readers.read_image_bytes(image_path)
        ids = rgb_to_ids(readers.read_color_png(panoptic_path))
        readers.check_same_size(readers.image_size(image), ids, image_path, panoptic_path)
        classes = {0: self.ignore_index} | {segment_id: index for segment_id, index, _ in entry.annotation}
        segments = [
            {
                "id": segment_id,
                "category_id": index,
                "isthing": bool(self.categories[index].is_thing),
                "iscrowd": bool(crowd),
            }
            for segment_id, index, crowd in entry.annotation
        ]
        return LabeledImage(entry.image_id, image, _label_map(ids, classes, panoptic_path), ids, segments)


def _label_map(ids: np.ndarray, classes: dict[int, int], path: Path) -> np.ndarray:
    """Look up the class of each pixel: (H, W) uint8. Raises ITAError if an id has no class, or a segment no pixel."""
    present, label = lookup_ids(ids, classes, default=0)
    unknown = sorted(set(present.tolist()) - classes.keys())
    if unknown:
        raise ITAError(
            f"{path} has the segment {unknown[0]}, which the JSON does not list ({len(unknown)} such)"
        )
    missing = sorted(classes.keys() - {0, *present.tolist()})
    if missing:
        raise ITAError(f"{path} lacks the segment {missing[0]}, which the JSON lists ({len(missing)} such)")
    return label.astype(np.uint8)


def _compact(entry: dict[str, Any]) -> Any:
    """Keep less of the segments, which are nearly all of the file."""
    if "iscrowd" in entry and "category_id" in entry and "id" in entry:
        return _Segment(entry["id"], entry["category_id"], entry["iscrowd"])
    return entry


def _read_annotations(path: Path) -> tuple[dict[int, str], list[dict[str, Any]]]:
    """Read the file names of the images by id, and the annotations, of `panoptic_*.json`."""
    content = readers.read_json(path, _compact)
    content = content if isinstance(content, dict) else {}
    images, rows = content.get("images"), content.get("annotations")
    if not isinstance(images, list) or not isinstance(rows, list):
        raise ITAError(f"{path} is not a panoptic annotation file: it needs lists 'images' and 'annotations'")
    try:
        return {image["id"]: str(image["file_name"]) for image in images}, rows
    except (KeyError, TypeError) as error:
        raise ITAError(f"{path}: an entry of 'images' has no 'id' or 'file_name'") from error


def _parse_annotation(
    row: Any, images: dict[int, str], class_of: dict[int, int], path: Path
) -> tuple[str, str, tuple[tuple[int, int, int], ...]]:
    """Check an annotation; return the names of image and map, and its segments (id, class index, iscrowd)."""
    try:
        image_id, panoptic, segments = row["image_id"], row["file_name"], row["segments_info"]
        where = f"{path}, {panoptic}"
        if image_id not in images:
            raise ITAError(f"{where}: 'images' has no image {image_id}")
        if not all(isinstance(segment, _Segment) for segment in segments):
            raise ITAError(f"{where}: a segment lacks 'id', 'category_id' or 'iscrowd'")
        unknown = [segment for segment in segments if segment.category_id not in class_of]
        ids = Counter(segment.id for segment in segments)
    except (KeyError, TypeError) as error:
        raise ITAError(f"{path}: an annotation is malformed: {one_line(repr(row), 120)}") from error
    if unknown:
        raise ITAError(f"{where}: segment {unknown[0].id} has the unknown category {unknown[0].category_id}")
    wrong = [
        value
        for value, count in ids.items()
        if count > 1 or not (isinstance(value, int) and 0 < value < 1 << 24)
    ]
    if wrong:
        raise ITAError(f"{where}: the segment id {wrong[0]!r} is not from 1 to 2^24 - 1, or occurs twice")
    for name in (images[image_id], panoptic):
        if not isinstance(name, str) or Path(name).name != name:
            raise ITAError(f"{path}: {name!r} is not a file name")
    parsed = tuple((segment.id, class_of[segment.category_id], segment.iscrowd) for segment in segments)
    return images[image_id], panoptic, parsed
