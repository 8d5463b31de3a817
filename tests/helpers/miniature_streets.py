"""Miniature releases of Pascal VOC and Cityscapes, and a user's folder, with the expected labels worked out by hand.

As in `miniature_releases.py`, each builder makes a folder in the official layout and returns what has to come out of
it. `BUILDERS` has the builders of all benchmarks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from helpers.miniature_releases import (
    VOID,
    Expected,
    build_ade20k_150,
    build_ade20k_847,
    build_coco_panoptic,
    build_pascal_context_59,
    build_pascal_context_459,
    save_jpeg,
    save_png,
    segment,
)

PALETTE = [(index * 7 + shift) % 256 for index in range(256) for shift in (3, 90, 200)]
"""Colors that never equal the index."""


def save_palette_png(path: Path, indices: Any) -> None:
    """A palette PNG of (H, W) indices."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(indices, np.uint8))
    image.putpalette(PALETTE)
    assert image.mode == "P"
    image.save(path, "PNG")


# ------------------------------------------------------------------------------------------------------------
# Pascal VOC

AEROPLANE_AND_TV = [
    [0, 0, 255, 1, 1, 255],
    [0, 0, 255, 1, 1, 255],
    [0, 0, 255, 255, 255, 255],
    [20, 20, 0, 0, 0, 0],
]
"""Values as in the release: 0 background, 255 borders."""
BACKGROUND_AND_PERSON = [[0, 0, 0, 0, 0, 0], [0, 255, 255, 255, 255, 0], [0, 255, 15, 15, 255, 0], [0] * 6]


def build_pascal_voc(folder: Path, benchmark: str = "pascal-voc-20") -> dict[str, dict[str, Expected]]:
    """One image for training, two for validation, listed against the order of their names."""
    names = {
        "2008_000002": BACKGROUND_AND_PERSON,
        "2007_000033": AEROPLANE_AND_TV,
        "2007_000032": [[15] * 6] * 4,
    }
    images = {name: save_jpeg(folder / f"JPEGImages/{name}.jpg") for name in names}
    for name, values in names.items():
        save_palette_png(folder / f"SegmentationClass/{name}.png", values)
    save_jpeg(folder / "JPEGImages/2009_000001.jpg")  # in no list: most of VOC has no segmentation
    lists = folder / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000032\n")
    (lists / "val.txt").write_text("2008_000002\n2007_000033\n")
    (lists / "trainval.txt").write_text("2007_000032\n2007_000033\n2008_000002\n")

    if benchmark == "pascal-voc-20":
        labels = {
            "2008_000002": [[VOID] * 6, [VOID] * 6, [VOID, VOID, 14, 14, VOID, VOID], [VOID] * 6],
            "2007_000033": [
                [VOID, VOID, VOID, 0, 0, VOID],
                [VOID, VOID, VOID, 0, 0, VOID],
                [VOID] * 6,
                [19, 19, VOID, VOID, VOID, VOID],
            ],
            "2007_000032": [[14] * 6] * 4,
        }
    else:
        labels = names
    made = {name: Expected(images[name], np.array(label, np.uint8)) for name, label in labels.items()}
    return {
        "train": {"2007_000032": made["2007_000032"]},
        "validation": {name: made[name] for name in ("2008_000002", "2007_000033")},
    }


# ------------------------------------------------------------------------------------------------------------
# Cityscapes

STREET = "frankfurt_000000_000294"
STREET_LABEL_IDS = [
    [7, 7, 8, 8, 23, 23],
    [7, 7, 26, 26, 24, 24],
    [0, 3, 26, 26, 25, 25],
    [33, 33, 26, 26, 4, 4],
]
STREET_INSTANCE_IDS = [
    [7, 7, 8, 8, 23, 23],
    [7, 7, 26000, 26001, 24, 24],
    [0, 3, 26000, 26001, 25000, 25001],
    [33000, 33000, 26000, 26001, 4, 4],
]
STREET_LABEL = [
    [0, 0, 1, 1, 10, 10],
    [0, 0, 13, 13, 11, 11],
    [VOID, VOID, 13, 13, 12, 12],
    [18, 18, 13, 13, VOID, VOID],
]
STREET_PANOPTIC = [
    [7, 7, 8, 8, 23, 23],
    [7, 7, 26000, 26001, 24, 24],
    [0, 0, 26000, 26001, 25000, 25001],
    [33000, 33000, 26000, 26001, 0, 0],
]
STREET_SEGMENTS = [
    segment(7, 0, False),
    segment(8, 1, False),
    segment(23, 10, False),
    segment(24, 11, True, iscrowd=True),  # people who are not told apart
    segment(25000, 12, True),
    segment(25001, 12, True),
    segment(26000, 13, True),
    segment(26001, 13, True),
    segment(33000, 18, True),
]


def build_cityscapes(
    folder: Path, train_ids: bool = False, instances: bool = True
) -> dict[str, dict[str, Expected]]:
    """An image of Aachen for training, one of Frankfurt and one of Munster, all sky, for validation.

    Args:
        train_ids: whether there are labelTrainIds beside labelIds, as after the authors' scripts.
        instances: whether there are instanceIds.
    """
    images = {
        f"val/frankfurt/{STREET}": (STREET_LABEL_IDS, STREET_INSTANCE_IDS, STREET_LABEL),
        "val/munster/munster_000001_000019": ([[23] * 6] * 4, [[23] * 6] * 4, [[10] * 6] * 4),
        "train/aachen/aachen_000000_000019": ([[11] * 6] * 4, [[11] * 6] * 4, [[2] * 6] * 4),
    }
    made: dict[str, dict[str, Expected]] = {"train": {}, "validation": {}}
    for name, (label_ids, instance_ids, label) in images.items():
        image = folder / f"leftImg8bit/{name}_leftImg8bit.png"
        save_png(image, np.full((4, 6, 3), (70, 80, 90)))
        save_png(folder / f"gtFine/{name}_gtFine_labelIds.png", label_ids)
        save_png(folder / f"gtFine/{name}_gtFine_color.png", np.zeros((4, 6, 3)))
        if train_ids:
            save_png(folder / f"gtFine/{name}_gtFine_labelTrainIds.png", label)
        panoptic, segments = None, []
        if instances:
            save_png(folder / f"gtFine/{name}_gtFine_instanceIds.png", instance_ids, np.uint16)
            panoptic = np.array(STREET_PANOPTIC if STREET in name else label_ids, np.int32)
            one = segment(label_ids[0][0], label[0][0], False)
            segments = STREET_SEGMENTS if STREET in name else [one]
        split = "train" if name.startswith("train/") else "validation"
        made[split][name.split("/")[-1]] = Expected(
            image.read_bytes(), np.array(label, np.uint8), panoptic, segments
        )
    return made


# ------------------------------------------------------------------------------------------------------------
# A user's folder


def build_folder(
    folder: Path, classes: Any = ("cat", ["dog", "puppy"], "grass")
) -> dict[str, dict[str, Expected]]:
    """Two images without splits; the first label has 8 bits, the second 16."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.json").write_text(json.dumps(classes))
    images = {name: save_jpeg(folder / f"images/{name}.jpg") for name in ("a", "b")}
    save_png(folder / "labels/a.png", [[0] * 6, [1] * 6, [2] * 6, [255] * 6])
    save_png(folder / "labels/b.png", [[65535] * 6, [2] * 6, [2] * 6, [255] * 6], np.uint16)
    labels = {
        "a": [[0] * 6, [1] * 6, [2] * 6, [VOID] * 6],
        "b": [[VOID] * 6, [2] * 6, [2] * 6, [VOID] * 6],
    }
    return {"train": {name: Expected(images[name], np.array(labels[name], np.uint8)) for name in labels}}


BUILDERS = {
    "ade20k-150": build_ade20k_150,
    "ade20k-847": build_ade20k_847,
    "pascal-context-59": build_pascal_context_59,
    "pascal-context-459": build_pascal_context_459,
    "pascal-voc-20": build_pascal_voc,
    "pascal-voc-21": lambda folder: build_pascal_voc(folder, "pascal-voc-21"),
    "coco-panoptic": build_coco_panoptic,
    "cityscapes": build_cityscapes,
    "folder": build_folder,
}
