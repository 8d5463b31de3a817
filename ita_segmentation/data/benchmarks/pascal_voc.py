"""Pascal VOC 2012: 20 objects, with or without the background as a class of its own.

Labels are palette PNGs of `SegmentationClass`: 0 is background, 1..20 the objects, 255 the border between them.
Everingham et al., The PASCAL Visual Object Classes Challenge 2012.
"""

from pathlib import Path

from ita_segmentation.data.benchmarks.base import ImageEntry, LabeledImage, SourceDataset
from ita_segmentation.data.benchmarks.readers import read_bytes, read_pair, relabel, require_folder
from ita_segmentation.data.categories import category_ids, load_categories
from ita_segmentation.errors import ITAError

LISTS = {"train": "ImageSets/Segmentation/train.txt", "validation": "ImageSets/Segmentation/val.txt"}


class PascalVoc(SourceDataset):
    """VOC2012 as "pascal-voc-20" (background ignored) or "pascal-voc-21" (background is class 0)."""

    layout = "VOC2012: JPEGImages/*.jpg, SegmentationClass/*.png and ImageSets/Segmentation/{train,val}.txt"

    def __init__(self, benchmark: str):
        self.categories = load_categories(benchmark)
        classes = {value: index for index, value in enumerate(category_ids(benchmark))}
        self._indices = {0: self.ignore_index, 255: self.ignore_index} | classes

    def index(self, source: Path, split: str) -> list[ImageEntry]:
        """List the images of a split; see `SourceDataset.index`."""
        require_folder(source, ["JPEGImages", "SegmentationClass", LISTS[split]], self.layout)
        path = source / LISTS[split]
        names = read_bytes(path).decode(errors="replace").split()
        invalid = [name for name in names if "/" in name or not name.isprintable()]
        if invalid:
            raise ITAError(f"{path} is not a list of image names: it contains {invalid[0][:40]!r}")
        return [
            ImageEntry(name, f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png")
            for name in dict.fromkeys(names)
        ]

    def read(self, source: Path, entry: ImageEntry) -> LabeledImage:
        """Read one image; see `SourceDataset.read`."""
        image, values = read_pair(source, entry)
        label = relabel(values, self._indices, self.ignore_index, source / str(entry.label))
        return LabeledImage(entry.image_id, image, label)
