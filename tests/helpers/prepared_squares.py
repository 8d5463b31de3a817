"""A small dataset on disk as `ita prepare` lays it out: noise images with panoptic and semantic labels."""

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from helpers.tiny_checkpoint import CLASSES

NAMES = [entry if isinstance(entry, str) else ", ".join(entry) for entry in CLASSES]
IS_THING = [False, True, False, True]
THINGS = [name for name, thing in zip(NAMES, IS_THING, strict=True) if thing]
SIZES = [(48, 64), (64, 48), (70, 70), (48, 64), (40, 100)]
IGNORE = 255


def png(array: np.ndarray) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def features() -> datasets.Features:
    segment = {
        "id": datasets.Value("int32"),
        "category_id": datasets.ClassLabel(names=NAMES),
        "isthing": datasets.Value("bool"),
        "iscrowd": datasets.Value("bool"),
    }
    return datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.Image(),
            "panoptic": datasets.Image(),
            "segments": datasets.List(segment),
            "classes": datasets.List(datasets.ClassLabel(names=NAMES)),
            "things": datasets.List(datasets.ClassLabel(names=THINGS)),
            "ignore_index": datasets.Value("int32"),
            "image_id": datasets.Value("string"),
        }
    )


def row(image_id: str, image: np.ndarray, segments: np.ndarray, class_of: dict[int, int]) -> dict[str, Any]:
    """One row; `segments` (H, W) holds ids, 0 for none, and `class_of` says the class of each."""
    label = np.full(segments.shape, IGNORE, np.uint8)
    for segment, category in class_of.items():
        label[segments == segment] = category
    present = sorted(set(class_of.values()))
    shifted = [(segments >> shift & 255).astype(np.uint8) for shift in (0, 8, 16)]
    return {
        "image": png(image),
        "label": png(label),
        "panoptic": png(np.stack(shifted, axis=-1)),
        "segments": [
            {"id": one, "category_id": category, "isthing": IS_THING[category], "iscrowd": False}
            for one, category in class_of.items()
        ],
        "classes": present,
        "things": [THINGS.index(NAMES[category]) for category in present if IS_THING[category]],
        "ignore_index": IGNORE,
        "image_id": image_id,
    }


def save_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "data").mkdir(parents=True)
    dataset = datasets.Dataset.from_list(rows, features=features())
    dataset.to_parquet(folder / "data" / "validation-00000-of-00001.parquet")
    return folder


def save_squares(folder: Path, count: int = len(SIZES)) -> Path:
    """`count` noise images in quarters: a class each, the first three rows without a label."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(count):
        height, width = SIZES[index % len(SIZES)]
        segments = np.zeros((height, width), np.int32)
        top, left = int(rng.integers(10, height - 10)), int(rng.integers(10, width - 10))
        segments[:top, :left], segments[:top, left:] = 1, 2
        segments[top:, :left], segments[top:, left:] = 300, 70_000
        segments[:3] = 0
        class_of = dict(zip((1, 2, 300, 70_000), rng.integers(0, 4, 4).tolist(), strict=True))
        image = rng.integers(0, 255, (height, width, 3), np.uint8)
        rows.append(row(f"square_{index}", image, segments, class_of))
    return save_rows(folder, rows)
