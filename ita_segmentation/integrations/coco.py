"""Predictions in COCO's formats: results with masks, panoptic PNGs, and whole annotation files.

The formats are those that pycocotools and panopticapi read (cocodataset.org, "data format" and "results format").
COCO's category ids begin at 1: class 0 of the vocabulary is category 1 unless `category_ids` says otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ita_segmentation.integrations.polygons import mask_polygons
from ita_segmentation.prediction.segments import ClassNames, iterate_segments, name_of, size_of


def coco_results(
    result: Any, image_id: int | str, category_ids: Sequence[int] | None = None, polygons: bool = False
) -> list[dict[str, Any]]:
    """Convert one image's segments to entries of a results file (what `COCO.loadRes` takes).

    Args:
        result: see `segments_of`. Only `return_binary_maps` keeps what one instance hides of another.
        image_id: the image's, as in the annotations that the results are to be scored with.
        category_ids: COCO's id of each class of the vocabulary; without, its index plus 1.
        polygons: write masks as polygons, which labeling tools read, in the place of run lengths. A hole is joined
            to the outline around it.

    Returns:
        "image_id", "category_id", "segmentation" ({"size": [H, W], "counts": str}, or a list of [x, y, x, y, ...]),
        "score", "area" and "bbox" [x, y, w, h] of each segment. One without a score gets 1.

    Raises:
        ImportError: run lengths without pycocotools.
        ValueError: see `segments_of`.
    """
    return [
        {
            "image_id": image_id,
            "category_id": _category_id(segment.label_id, category_ids),
            "segmentation": [ring.ravel().tolist() for ring in mask_polygons(segment.mask)]
            if polygons
            else run_length(segment.mask),
            "score": 1.0 if segment.score is None else float(segment.score),
            "area": segment.area,
            "bbox": [float(side) for side in segment.box],
        }
        for segment in iterate_segments(result)
    ]


def coco_panoptic(
    result: Any, image_id: int | str, file_name: str, category_ids: Sequence[int] | None = None
) -> tuple[Image.Image, dict[str, Any]]:
    """Convert one image to a panoptic annotation or result, as panopticapi reads it.

    Args:
        result: segments that do not overlap: semantic or panoptic (an instance map works, too).
        image_id: the image's.
        file_name: of the PNG, for the entry.
        category_ids: as for `coco_results`.

    Returns:
        the PNG's RGB image (id = R + 256 G + 65536 B, 0 where there is none) and its entry {"image_id", "file_name",
        "segments_info": [{"id", "category_id", "area", "bbox", "iscrowd", "score"}]}. Ids of a semantic map's regions
        are the index of the class plus 1.

    Raises:
        ValueError: masks overlap, or see `segments_of`.
    """
    ids = np.zeros(size_of(result), dtype=np.uint32)
    is_semantic = not isinstance(result, Mapping) or "segments_info" not in result
    entries = []
    for segment in iterate_segments(result):
        number = segment.id + 1 if is_semantic else segment.id
        if ids[segment.mask].any():
            raise ValueError("segments overlap: a panoptic PNG holds one segment for each pixel")
        ids[segment.mask] = number
        entry = {
            "id": number,
            "category_id": _category_id(segment.label_id, category_ids),
            "area": segment.area,
            "bbox": list(segment.box),
            "iscrowd": 0,
        }
        entries.append(entry if segment.score is None else entry | {"score": float(segment.score)})
    colors = np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], axis=-1).astype(np.uint8)
    annotation = {"image_id": image_id, "file_name": file_name, "segments_info": entries}
    return Image.fromarray(colors), annotation


def coco_document(
    images: Iterable[Mapping[str, Any]],
    annotations: Iterable[Mapping[str, Any]],
    names: ClassNames,
    stuff_ids: Collection[int] = (),
    category_ids: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Make a whole annotation file, for tools that import COCO.

    Args:
        images: {"id", "file_name", "width", "height"} of each image.
        annotations: entries of `coco_results` or of `coco_panoptic` of all images. Those of `coco_results` get an
            "id" from 1 and "iscrowd" 0. Labeling tools read polygons, not run lengths.
        names: the vocabulary.
        stuff_ids: classes of it that are stuff ("isthing" 0).
        category_ids: as for the entries.

    Raises:
        ValueError: an entry belongs to no image or category given.
    """
    image_files = [dict(image) for image in images]
    categories = [
        {
            "id": _category_id(index, category_ids),
            "name": name_of(names, index),
            "supercategory": "",
            "isthing": int(index not in stuff_ids),
        }
        for index in range(len(names))
    ]
    known, ids = {image["id"] for image in image_files}, {category["id"] for category in categories}
    entries = []
    for number, entry in enumerate(annotations, start=1):
        if entry["image_id"] not in known:
            raise ValueError(f"an annotation is of the image {entry['image_id']!r}, which is not given")
        for part in entry.get("segments_info", (entry,)):
            if part["category_id"] not in ids:
                raise ValueError(f"an annotation is of category {part['category_id']}, which has no name")
        entries.append(dict(entry) if "segments_info" in entry else {"id": number, **entry, "iscrowd": 0})
    return {
        "info": {},
        "licenses": [],
        "images": image_files,
        "annotations": entries,
        "categories": categories,
    }


def run_length(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask, (H, W) bool, as COCO's compressed run lengths {"size": [H, W], "counts": str}, ready for JSON."""
    from pycocotools import mask as coco_mask

    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def _category_id(label_id: int, category_ids: Sequence[int] | None) -> int:
    if category_ids is None:
        return label_id + 1
    if not 0 <= label_id < len(category_ids):
        raise ValueError(f"class {label_id} has none of the {len(category_ids)} category ids given")
    return int(category_ids[label_id])
