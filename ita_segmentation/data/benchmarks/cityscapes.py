"""Cityscapes: 19 classes of street scenes, 8 of them things. Cordts et al., arXiv 1604.01685.

The release that one downloads has `*_gtFine_labelIds.png` (34 label ids, of which 19 are classes) and
`*_gtFine_instanceIds.png` (16 bits: class id * 1000 + instance; below 1000 the class id alone, of stuff or of a group
of things that are not told apart). `*_gtFine_labelTrainIds.png` (0..18, 255) are made from the former by the authors'
scripts; where there are none, they are made here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ita_segmentation.data.benchmarks.files import (
    ImageFiles,
    check_label_range,
    check_same_size,
    each_of,
    files_by_stem,
    image_size,
    read_label_png,
    read_pair,
    relabel,
    require_folder,
)
from ita_segmentation.data.benchmarks.release import Category, LabelledImage, ReleaseError
from ita_segmentation.data.categories import category_ids, load_categories

FOLDERS = {"train": "train", "validation": "val"}
IMAGE_ENDING = "_leftImg8bit"
NUM_LABEL_IDS = 34


class Cityscapes:
    """leftImg8bit and gtFine. Images have panoptic maps if the folder has instanceIds."""

    categories: Sequence[Category] = load_categories("cityscapes")
    ignore_index = 255
    splits: tuple[str, ...] = ("train", "validation")
    has_segments = True
    layout = (
        "leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/ with *_gtFine_labelTrainIds.png "
        "or *_gtFine_labelIds.png, and *_gtFine_instanceIds.png for panoptic labels"
    )

    def index(self, source: Path, split: str) -> list[ImageFiles]:
        folders = [f"{part}/{FOLDERS[split]}" for part in ("leftImg8bit", "gtFine")]
        require_folder(source, folders, self.layout)
        images = _by_city(source, folders[0], IMAGE_ENDING)
        labels = {
            kind: _by_city(source, folders[1], f"_gtFine_{kind}")
            for kind in ("labelTrainIds", "labelIds", "instanceIds")
        }
        kind = "labelTrainIds" if labels["labelTrainIds"] else "labelIds"
        if not labels[kind]:
            raise ReleaseError(f"{source / folders[1]} has no labels: expected {self.layout}")
        image_files = sorted(images | labels[kind] | labels["instanceIds"])
        return [
            ImageFiles(
                image_id=Path(name).name,
                image=f"{folders[0]}/{name}{IMAGE_ENDING}.png",
                label=f"{folders[1]}/{name}_gtFine_{kind}.png",
                instances=f"{folders[1]}/{name}_gtFine_instanceIds.png" if labels["instanceIds"] else None,
            )
            for name in image_files
        ]

    def read(self, source: Path, item: ImageFiles) -> LabelledImage:
        if item.instances is None:
            image, values = read_pair(source, item)
            return LabelledImage(item.image_id, image, self._label(source, item, values))
        path = source / item.instances
        (image, values), ids = each_of(lambda: read_pair(source, item), lambda: read_label_png(path))
        check_same_size(image_size(image), ids, source / item.image, path)
        panoptic, segments = _segments(ids.astype(np.int32), path)
        return LabelledImage(item.image_id, image, self._label(source, item, values), panoptic, segments)

    def _label(self, source: Path, item: ImageFiles, values: np.ndarray) -> np.ndarray:
        """(H, W) uint8 class indices of a map of train ids or of label ids."""
        indices = _CLASS_OF[item.label.endswith("TrainIds.png")]
        return relabel(values, indices, self.ignore_index, source / item.label)


_CLASS_OF_LABEL_ID = dict.fromkeys(range(NUM_LABEL_IDS), Cityscapes.ignore_index) | {
    label_id: index for index, label_id in enumerate(category_ids("cityscapes"))
}
_CLASS_OF = {
    True: {index: index for index in [*range(len(Cityscapes.categories)), Cityscapes.ignore_index]},
    False: _CLASS_OF_LABEL_ID,
}
"""Class index of each label value, of labelTrainIds (True) and of labelIds (False)."""


def _by_city(source: Path, folder: str, ending: str) -> set[str]:
    """CITY/NAME of the PNG files of one kind in the folders of the cities."""
    return {
        f"{city.name}/{stem}"
        for city in sorted((source / folder).iterdir())
        if city.is_dir() and not city.name.startswith(".")
        for stem in files_by_stem(city, (".png",), ending)
    }


def _segments(ids: np.ndarray, path: Path) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The panoptic map (H, W) int32 of a map (H, W) int32 of instance ids, and its segments by ascending id.

    Raises:
        ReleaseError: an id is of no class.
    """
    label_ids = np.where(ids < 1000, ids, ids // 1000)
    check_label_range(label_ids, range(NUM_LABEL_IDS), path)
    segments = []
    for value in np.flatnonzero(np.bincount(ids.ravel())).tolist():
        index = _CLASS_OF_LABEL_ID[value if value < 1000 else value // 1000]
        if index != Cityscapes.ignore_index:
            is_thing = bool(Cityscapes.categories[index].is_thing)
            segments.append(
                {"id": value, "category_id": index, "isthing": is_thing, "iscrowd": is_thing and value < 1000}
            )
    counted = np.zeros(ids.max() + 1, bool)
    counted[[segment["id"] for segment in segments]] = True
    return np.where(counted[ids], ids, 0).astype(np.int32), segments
