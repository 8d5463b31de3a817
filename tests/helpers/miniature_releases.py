"""Miniature releases, built file by file in the official layouts, with the expected labels worked out by hand.

Each builder makes a folder that can be the source of its benchmark, and returns what has to come out of it:
`{split: {image_id: Expected}}`. Images are 6 x 4 pixels unless a size matters.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from scipy.io import savemat

VOID = 255
VOID_16 = 65535


@dataclass(frozen=True)
class Expected:
    """What an image of a release has to become; the image is None where it is not stored as it is."""

    image: bytes | None
    label: np.ndarray
    panoptic: np.ndarray | None = None
    segments: list[dict[str, Any]] = field(default_factory=list)


def save_jpeg(
    path: Path, width: int = 6, height: int = 4, color: tuple[int, int, int] = (90, 140, 60)
) -> bytes:
    """An image of one color; returns the file's content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), color).save(path, "JPEG", quality=90)
    return path.read_bytes()


def save_png(path: Path, pixels: Any, dtype: Any = np.uint8) -> None:
    """A gray map (H, W), or one of three channels (H, W, 3)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype)).save(path, "PNG")


def segment(segment_id: int, category_id: int, isthing: bool, iscrowd: bool = False) -> dict[str, Any]:
    return {"id": segment_id, "category_id": category_id, "isthing": isthing, "iscrowd": iscrowd}


def truncate(path: Path, share: float = 0.6) -> None:
    """Leaves only the first part of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


# ------------------------------------------------------------------------------------------------------------
# ADEChallengeData2016


def build_ade20k_150(folder: Path, instances: bool = True) -> dict[str, dict[str, Expected]]:
    """Two images of validation and one of training.

    Values 1, 3, 7 are the stuff wall, sky, road; 8, 13, 21, 150 the things bed, person, car, flag. Of the 100 thing
    classes these are number 1, 4, 9 and 100.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.15\t11664\t1172\t1\twall\n"
    )

    # Stuff in every corner, two people, and a bed without instance.
    first = save_jpeg(folder / "images/validation/ADE_val_00000001.jpg")
    annotation = [
        [3, 3, 3, 3, 3, 3],
        [1, 1, 13, 13, 1, 1],
        [1, 1, 13, 13, 13, 0],
        [7, 7, 7, 8, 8, 150],
    ]
    first_label = [
        [2, 2, 2, 2, 2, 2],
        [0, 0, 12, 12, 0, 0],
        [0, 0, 12, 12, 12, VOID],
        [6, 6, 6, 7, 7, 149],
    ]
    thing_class = [
        [0, 0, 0, 0, 0, 0],
        [0, 0, 4, 4, 4, 0],
        [0, 0, 4, 4, 0, 0],
        [0, 0, 0, 0, 0, 100],
    ]
    instance = [
        [0, 0, 0, 0, 0, 0],
        [0, 0, 2, 1, 1, 0],
        [0, 0, 2, 1, 0, 0],
        [0, 0, 0, 0, 0, 9],
    ]
    # wall 1, sky 2, road 3; then the instances 1, 2 and 9 of the image. An instance goes before what the semantic
    # annotation says (row 1, column 4); things without instance are void.
    first_panoptic = [
        [2, 2, 2, 2, 2, 2],
        [1, 1, 5, 4, 4, 1],
        [1, 1, 5, 4, 0, 0],
        [3, 3, 3, 0, 0, 6],
    ]
    first_segments = [
        segment(1, 0, False),
        segment(2, 2, False),
        segment(3, 6, False),
        segment(4, 12, True),
        segment(5, 12, True),
        segment(6, 149, True),
    ]
    save_png(folder / "annotations/validation/ADE_val_00000001.png", annotation)

    # Only another class: nothing is labelled.
    second = save_jpeg(folder / "images/validation/ADE_val_00000002.jpg", width=3, height=2)
    save_png(folder / "annotations/validation/ADE_val_00000002.png", np.zeros((2, 3)))

    third = save_jpeg(folder / "images/training/ADE_train_00000001.jpg", width=2, height=2)
    save_png(folder / "annotations/training/ADE_train_00000001.png", [[21, 21], [7, 7]])

    if instances:
        blank = np.zeros((4, 6))
        save_png(
            folder / "annotations_instance/validation/ADE_val_00000001.png",
            np.stack([thing_class, instance, blank], axis=-1),
        )
        save_png(folder / "annotations_instance/validation/ADE_val_00000002.png", np.zeros((2, 3, 3)))
        save_png(
            folder / "annotations_instance/training/ADE_train_00000001.png",
            [[[9, 1, 0], [9, 1, 0]], [[0, 0, 0], [0, 0, 0]]],
        )

    def expected(image: bytes, label: Any, panoptic: Any, segments: list[dict[str, Any]]) -> Expected:
        if not instances:
            return Expected(image, np.array(label, np.uint8))
        return Expected(image, np.array(label, np.uint8), np.array(panoptic, np.int32), segments)

    return {
        "validation": {
            "ADE_val_00000001": expected(first, first_label, first_panoptic, first_segments),
            "ADE_val_00000002": expected(second, np.full((2, 3), VOID), np.zeros((2, 3)), []),
        },
        "train": {
            "ADE_train_00000001": expected(
                third,
                [[20, 20], [6, 6]],
                [[2, 2], [1, 1]],
                [segment(1, 6, False), segment(2, 20, True)],
            )
        },
    }


# ------------------------------------------------------------------------------------------------------------
# ADE20K_2021_17_01


def save_full_seg(path: Path, full_indices: Any) -> None:
    """A `_seg.png` of indices in the full list; the last digit of R, and B, do not count."""
    full = np.asarray(full_indices)
    which_instance = np.full_like(full, 3)
    save_png(path, np.stack([full // 256 * 10 + 7 * (full > 0), full % 256, which_instance], axis=-1))


def build_ade20k_847(folder: Path) -> dict[str, dict[str, Expected]]:
    """A small and a large image of validation, and one of training.

    Of the full list, 2978 is wall (class 0), 312 building (1), 2420 sky (2), 1831 person (11), 2855 tree (3), and
    2 is none of the 847.
    """
    street, bedroom = "images/ADE/validation/urban/street", "images/ADE/validation/home_or_hotel/bedroom"
    train = "images/ADE/training/urban/street"

    first = save_jpeg(folder / street / "ADE_val_00000001.jpg")
    save_full_seg(
        folder / street / "ADE_val_00000001_seg.png",
        [
            [2420, 2420, 2420, 2420, 2420, 2420],
            [312, 312, 2855, 2855, 2420, 2420],
            [312, 312, 2855, 2, 2, 0],
            [2978, 2978, 1831, 1831, 0, 0],
        ],
    )
    first_label = [
        [2, 2, 2, 2, 2, 2],
        [1, 1, 3, 3, 2, 2],
        [1, 1, 3, VOID_16, VOID_16, VOID_16],
        [0, 0, 11, 11, VOID_16, VOID_16],
    ]

    # 1,536 x 1,024 pixels become 768 x 512: every second row and column stays.
    save_jpeg(folder / bedroom / "ADE_val_00000002.jpg", width=1536, height=1024, color=(200, 30, 30))
    large = np.full((1024, 1536), 2978)
    large[512:] = 312
    large[:, 1::2] = 2  # the columns that go
    save_full_seg(folder / bedroom / "ADE_val_00000002_seg.png", large)
    second_label = np.zeros((512, 768))
    second_label[256:] = 1

    third = save_jpeg(folder / train / "ADE_train_00000001.jpg", width=2, height=1)
    save_full_seg(folder / train / "ADE_train_00000001_seg.png", [[2978, 0]])

    names = ["ADE_train_00000001.jpg", "ADE_val_00000001.jpg", "ADE_val_00000002.jpg"]
    index = {
        "filename": names,
        "folder": [f"ADE20K_2021_17_01/{place}" for place in (train, street, bedroom)],
        "objectPresence": np.ones((5, 3), np.float32),
        "objectcounts": np.arange(5),
        "objectnames": ["-", "aqueduct", "wall", "building", "sky"],
        "description": {"filename": "array of length N=3 with the image file names"},
    }
    (folder / "index_ade20k.pkl").write_bytes(pickle.dumps(index))
    return {
        "validation": {
            "ADE_val_00000001": Expected(first, np.array(first_label, np.uint16)),
            "ADE_val_00000002": Expected(None, second_label.astype(np.uint16)),
        },
        "train": {"ADE_train_00000001": Expected(third, np.array([[0, VOID_16]], np.uint16))},
    }


# ------------------------------------------------------------------------------------------------------------
# VOC2010: Pascal Context


def _run_length_code(mask: Any) -> dict[str, Any]:
    coded = coco_mask.encode(np.asfortranarray(np.asarray(mask, np.uint8)))
    return {"size": coded["size"], "counts": coded["counts"].decode()}


def _write_detail(folder: Path, images: list[dict[str, Any]], masks: list[tuple[int, int, Any]]) -> None:
    """`trainval_merged.json` with all that the official file has; masks are (image id, category id, mask)."""
    annotations = [
        {
            "id": number + 1,
            "image_id": image_id,
            "category_id": category_id,
            "segmentation": _run_length_code(mask),
            "area": int(np.sum(mask)),
            "bbox": [0, 0, 1, 1],
            "iscrowd": number % 2,
            "parts": [{"part_id": 7, "segmentation": _run_length_code(np.ones_like(mask))}],
        }
        for number, (image_id, category_id, mask) in enumerate(masks)
    ]
    first = images[0]["image_id"]
    content = {
        "info": {"description": "PASCAL in Detail, in miniature", "year": 2017},
        "images": images,
        "annos_segmentation": annotations,
        "annos_occlusion": [{"image_id": first, "imsize": [4, 6], "ne": 1, "edges": {"indices": [[0, 1]]}}],
        "annos_boundary": [{"image_id": first, "boundary_mask": _run_length_code(np.ones((4, 6)))}],
        "annos_joints": [],
        "categories": [{"category_id": 2, "name": "aeroplane", "supercategory": "object", "parts": [7]}],
        "parts": [{"part_id": 7, "name": "tail", "superpart": "none"}],
    }
    (folder / "trainval_merged.json").write_text(json.dumps(content))


def _detail_image(name: str, phase: str, width: int = 6, height: int = 4) -> dict[str, Any]:
    image_id = int(name.replace("_", ""))
    return {
        "image_id": image_id,
        "file_name": f"{name}.jpg",
        "phase": phase,
        "width": width,
        "height": height,
        "date_captured": "2008",
    }


def build_pascal_context_59(folder: Path) -> dict[str, dict[str, Expected]]:
    """Two images of validation and one of training; masks overlap, and some pixels have none.

    Of the merged categories, 2 is aeroplane (class 0), 9 bag (class 1), 458 wood (class 58).
    """
    first = save_jpeg(folder / "JPEGImages/2008_000002.jpg")
    second = save_jpeg(folder / "JPEGImages/2008_000003.jpg", width=3, height=2)
    third = save_jpeg(folder / "JPEGImages/2008_000001.jpg", width=2, height=2)
    images = [
        _detail_image("2008_000001", "train", 2, 2),
        _detail_image("2008_000002", "val"),
        _detail_image("2008_000003", "val", 3, 2),
    ]
    plane = [[0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    wood = [[0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]
    bag = [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    masks = [
        (2008000002, 2, plane),
        (2008000001, 2, [[1, 1], [0, 0]]),
        (2008000002, 458, wood),
        (2008000002, 9, bag),
    ]
    _write_detail(folder, images, masks)
    first_label = [
        [VOID, 0, 0, 1, 1, 1],
        [58, 58, 58, 1, 1, 1],
        [58, 58, 58, 58, 58, 58],
        [VOID, VOID, VOID, VOID, VOID, VOID],
    ]
    return {
        "validation": {
            "2008_000002": Expected(first, np.array(first_label, np.uint8)),
            "2008_000003": Expected(second, np.full((2, 3), VOID, np.uint8)),
        },
        "train": {"2008_000001": Expected(third, np.array([[0, 0], [VOID, VOID]], np.uint8))},
    }


def build_pascal_context_459(folder: Path) -> dict[str, dict[str, Expected]]:
    """One image of validation and one of training, and a label file of an image that is in neither."""
    first = save_jpeg(folder / "JPEGImages/2008_000002.jpg")
    second = save_jpeg(folder / "JPEGImages/2008_000001.jpg", width=2, height=1)
    images = [_detail_image("2008_000001", "train", 2, 1), _detail_image("2008_000002", "val")]
    _write_detail(folder, images, [(2008000001, 2, [[1, 1]])])
    label_map = [
        [0, 1, 1, 2, 2, 459],
        [0, 1, 1, 2, 2, 459],
        [0, 0, 256, 256, 300, 300],
        [0, 0, 256, 256, 300, 300],
    ]
    first_label = [
        [VOID_16, 0, 0, 1, 1, 458],
        [VOID_16, 0, 0, 1, 1, 458],
        [VOID_16, VOID_16, 255, 255, 299, 299],
        [VOID_16, VOID_16, 255, 255, 299, 299],
    ]
    save_label_map(folder / "trainval/2008_000002.mat", label_map)
    save_label_map(folder / "trainval/2008_000001.mat", [[5, 0]])
    save_label_map(folder / "trainval/2007_000009.mat", [[5, 0]])
    (folder / "labels.txt").write_text("1: accordion\n2: aeroplane\n")
    return {
        "validation": {"2008_000002": Expected(first, np.array(first_label, np.uint16))},
        "train": {"2008_000001": Expected(second, np.array([[4, VOID_16]], np.uint16))},
    }


def save_label_map(path: Path, label_map: Any, dtype: Any = np.uint16, name: str = "LabelMap") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {name: np.asarray(label_map, dtype)}, do_compression=True)


# ------------------------------------------------------------------------------------------------------------
# COCO 2017 panoptic


def save_segment_ids(path: Path, ids: Any) -> None:
    """A PNG of segment ids: R + 256 G + 65536 B."""
    ids = np.asarray(ids)
    save_png(path, np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1))


def build_coco_panoptic(folder: Path, maps_beside: bool = False) -> dict[str, dict[str, Expected]]:
    """Two images of validation, one of them with a crowd, and one of training.

    Category 1 is person (class 0, a thing), 3 car (2, a thing), 187 sky (119, stuff), 200 rug (132, stuff).

    Args:
        maps_beside: whether the folders of PNGs are beside `annotations`, not in it.
    """
    maps = folder / ("." if maps_beside else "annotations")
    first = save_jpeg(folder / "val2017/000000000139.jpg")
    # Ids that need one, two and three channels; 8000000 = 0 + 256 * 18 + 65536 * 122.
    save_segment_ids(
        maps / "panoptic_val2017/000000000139.png",
        [
            [8000000, 8000000, 8000000, 8000000, 8000000, 8000000],
            [7, 7, 0, 700, 700, 8000000],
            [7, 7, 0, 700, 700, 70000],
            [0, 0, 0, 70000, 70000, 70000],
        ],
    )
    first_label = [
        [119, 119, 119, 119, 119, 119],
        [0, 0, VOID, 0, 0, 119],
        [0, 0, VOID, 0, 0, 132],
        [VOID, VOID, VOID, 132, 132, 132],
    ]
    first_panoptic = [
        [8000000, 8000000, 8000000, 8000000, 8000000, 8000000],
        [7, 7, 0, 700, 700, 8000000],
        [7, 7, 0, 700, 700, 70000],
        [0, 0, 0, 70000, 70000, 70000],
    ]
    second = save_jpeg(folder / "val2017/000000000285.jpg", width=2, height=2)
    save_segment_ids(maps / "panoptic_val2017/000000000285.png", [[5, 5], [6, 6]])
    third = save_jpeg(folder / "train2017/000000000009.jpg", width=2, height=1)
    save_segment_ids(maps / "panoptic_train2017/000000000009.png", [[0, 4]])

    _write_panoptic(
        folder / "annotations/panoptic_val2017.json",
        {139: [(8000000, 187, 0), (7, 1, 0), (700, 1, 1), (70000, 200, 0)], 285: [(5, 3, 0), (6, 3, 0)]},
    )
    _write_panoptic(folder / "annotations/panoptic_train2017.json", {9: [(4, 1, 0)]})
    first_segments = [
        segment(8000000, 119, False),
        segment(7, 0, True),
        segment(700, 0, True, iscrowd=True),
        segment(70000, 132, False),
    ]
    return {
        "validation": {
            "000000000139": Expected(
                first, np.array(first_label, np.uint8), np.array(first_panoptic, np.int32), first_segments
            ),
            "000000000285": Expected(
                second,
                np.array([[2, 2], [2, 2]], np.uint8),
                np.array([[5, 5], [6, 6]], np.int32),
                [segment(5, 2, True), segment(6, 2, True)],
            ),
        },
        "train": {
            "000000000009": Expected(
                third,
                np.array([[VOID, 0]], np.uint8),
                np.array([[0, 4]], np.int32),
                [segment(4, 0, True)],
            )
        },
    }


def _write_panoptic(path: Path, segments: dict[int, list[tuple[int, int, int]]]) -> None:
    """`panoptic_*.json` of segments (id, category id, iscrowd) by image id."""
    content = {
        "info": {"description": "COCO 2017, in miniature"},
        "licenses": [],
        # The order of the annotations is what counts, not that of the images.
        "images": [
            {"id": image_id, "file_name": f"{image_id:012}.jpg", "width": 6, "height": 4, "license": 3}
            for image_id in reversed(list(segments))
        ],
        "annotations": [
            {
                "image_id": image_id,
                "file_name": f"{image_id:012}.png",
                "segments_info": [
                    {
                        "id": segment_id,
                        "category_id": category_id,
                        "iscrowd": crowd,
                        "area": 1,
                        "bbox": [0, 0, 1, 1],
                    }
                    for segment_id, category_id, crowd in rows
                ],
            }
            for image_id, rows in segments.items()
        ],
        "categories": [{"id": 1, "name": "person", "supercategory": "person", "isthing": 1}],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
