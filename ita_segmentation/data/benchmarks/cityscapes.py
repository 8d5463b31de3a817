"""Cityscapes: 19 classes of street scenes, 8 of them things. Cordts et al., arXiv 1604.01685.

The download has `*_gtFine_labelIds.png` (34 label ids, 19 of which are classes) and `*_gtFine_instanceIds.png`
(16 bits: class id * 1000 + instance; values below 1000 are the class id of stuff or of a group of things).
`*_gtFine_labelTrainIds.png` (0..18, 255) come from the authors' scripts and are used where they exist.
"""

from pathlib import Path
from typing import Any

import numpy as np

from ita_segmentation.data.benchmarks import readers
from ita_segmentation.data.benchmarks.base import ImageEntry, LabeledImage, SourceDataset
from ita_segmentation.data.categories import category_ids, load_categories
from ita_segmentation.errors import ITAError

FOLDERS = {"train": "train", "validation": "val"}
IMAGE_ENDING = "_leftImg8bit"
LABEL_IDS = range(34)


class Cityscapes(SourceDataset):
    """leftImg8bit and gtFine. Images have panoptic maps if the folder has instanceIds."""

    categories = load_categories("cityscapes")
    layout = (
        "leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/ with *_gtFine_labelTrainIds.png "
        "or *_gtFine_labelIds.png, and *_gtFine_instanceIds.png for panoptic labels"
    )

    def index(self, source: Path, split: str) -> list[ImageEntry]:
        """List the images of a split; see `SourceDataset.index`."""
        folders = [f"{part}/{FOLDERS[split]}" for part in ("leftImg8bit", "gtFine")]
        readers.require_folder(source, folders, self.layout)
        images = _files_by_city(source / folders[0], IMAGE_ENDING)
        labels = {
            kind: _files_by_city(source / folders[1], f"_gtFine_{kind}")
            for kind in ("labelTrainIds", "labelIds", "instanceIds")
        }
        kind = "labelTrainIds" if labels["labelTrainIds"] else "labelIds"
        if not labels[kind]:
            raise ITAError(f"{source / folders[1]} has no labels: expected {self.layout}")
        return [
            ImageEntry(
                image_id=Path(name).name,
                image=f"{folders[0]}/{name}{IMAGE_ENDING}.png",
                label=f"{folders[1]}/{name}_gtFine_{kind}.png",
                instances=f"{folders[1]}/{name}_gtFine_instanceIds.png" if labels["instanceIds"] else None,
                has_segments=bool(labels["instanceIds"]),
            )
            for name in sorted(images | labels[kind] | labels["instanceIds"])
        ]

    def read(self, source: Path, entry: ImageEntry) -> LabeledImage:
        """Read one image; see `SourceDataset.read`."""
        indices = CLASS_OF_TRAIN_ID if str(entry.label).endswith("TrainIds.png") else CLASS_OF_LABEL_ID
        label_path = source / str(entry.label)
        if entry.instances is None:
            image, values = readers.read_pair(source, entry)
            return LabeledImage(entry.image_id, image, readers.relabel(values, indices, 255, label_path))
        path = source / entry.instances
        (image, values), ids = readers.read_all(
            lambda: readers.read_pair(source, entry), lambda: readers.read_label_png(path)
        )
        readers.check_same_size(readers.image_size(image), ids, source / entry.image, path)
        panoptic, segments = _segments(ids.astype(np.int32), path)
        label = readers.relabel(values, indices, 255, label_path)
        return LabeledImage(entry.image_id, image, label, panoptic, segments)


CLASS_OF_TRAIN_ID = {index: index for index in [*range(19), 255]}
CLASS_OF_LABEL_ID = dict.fromkeys(LABEL_IDS, 255) | {
    label_id: index for index, label_id in enumerate(category_ids("cityscapes"))
}


def _files_by_city(folder: Path, ending: str) -> set[str]:
    """CITY/NAME of the PNG files of one kind."""
    return {
        f"{city.name}/{stem}"
        for city in sorted(folder.iterdir())
        if city.is_dir() and not city.name.startswith(".")
        for stem in readers.files_by_stem(city, (".png",), ending)
    }


def _segments(ids: np.ndarray, path: Path) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Build the panoptic map (H, W) int32 of instance ids, 0 for no class, and its segments by ascending id."""
    readers.check_label_range(np.where(ids < 1000, ids, ids // 1000), LABEL_IDS, path)
    segments = []
    for value in np.flatnonzero(np.bincount(ids.ravel())).tolist():
        index = CLASS_OF_LABEL_ID[value if value < 1000 else value // 1000]
        if index != 255:
            is_thing = bool(Cityscapes.categories[index].is_thing)
            segments.append(
                {"id": value, "category_id": index, "isthing": is_thing, "iscrowd": is_thing and value < 1000}
            )
    return np.where(np.isin(ids, [segment["id"] for segment in segments]), ids, 0), segments
