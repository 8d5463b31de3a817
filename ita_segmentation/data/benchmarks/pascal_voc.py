"""Pascal VOC 2012: 20 objects, with or without the background as a class of its own.

Labels are palette PNGs of `SegmentationClass`: 0 is background, 1..20 the objects, 255 the border between them.
Everingham et al., The PASCAL Visual Object Classes Challenge 2012.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ita_segmentation.data.benchmarks.files import (
    ImageFiles,
    read_bytes,
    read_pair,
    relabel,
    require_folder,
)
from ita_segmentation.data.benchmarks.release import Category, LabelledImage, ReleaseError
from ita_segmentation.data.categories import category_ids, load_categories

LISTS = {"train": "ImageSets/Segmentation/train.txt", "validation": "ImageSets/Segmentation/val.txt"}


class PascalVoc:
    """VOC2012 with the classes of one of the two benchmarks.

    Args:
        benchmark: "pascal-voc-20" (background ignored) or "pascal-voc-21" (background is class 0).
    """

    ignore_index = 255
    splits: tuple[str, ...] = ("train", "validation")
    has_segments = False
    layout = "VOC2012: JPEGImages/*.jpg, SegmentationClass/*.png and ImageSets/Segmentation/{train,val}.txt"

    def __init__(self, benchmark: str):
        self.categories: Sequence[Category] = load_categories(benchmark)
        classes = {value: index for index, value in enumerate(category_ids(benchmark))}
        self._indices = {0: self.ignore_index, 255: self.ignore_index} | classes

    def index(self, source: Path, split: str) -> list[ImageFiles]:
        require_folder(source, ["JPEGImages", "SegmentationClass", LISTS[split]], self.layout)
        path = source / LISTS[split]
        names = read_bytes(path).decode(errors="replace").split()
        strange = [name for name in names if "/" in name or not name.isprintable()]
        if strange:
            raise ReleaseError(f"{path} is no list of image names: it has {strange[0][:40]!r}")
        return [
            ImageFiles(name, f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png")
            for name in dict.fromkeys(names)
        ]

    def read(self, source: Path, item: ImageFiles) -> LabelledImage:
        image, values = read_pair(source, item)
        label = relabel(values, self._indices, self.ignore_index, source / item.label)
        return LabelledImage(item.image_id, image, label)
