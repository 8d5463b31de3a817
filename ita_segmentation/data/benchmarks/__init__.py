"""The benchmarks that `ita prepare` knows, by name, and the readers of their official releases."""

from pathlib import Path

from ita_segmentation.data.benchmarks.ade20k import Ade20k150, Ade20k847
from ita_segmentation.data.benchmarks.base import ImageEntry, LabeledImage, SourceDataset
from ita_segmentation.data.benchmarks.cityscapes import Cityscapes
from ita_segmentation.data.benchmarks.coco import CocoPanoptic
from ita_segmentation.data.benchmarks.folder import FolderDataset
from ita_segmentation.data.benchmarks.pascal_context import PascalContext59, PascalContext459
from ita_segmentation.data.benchmarks.pascal_voc import PascalVoc

__all__ = ["FOLDER", "SOURCE_DATASETS", "ImageEntry", "LabeledImage", "SourceDataset", "open_source_dataset"]

FOLDER = "folder"  # the name for a user's own folder

SOURCE_DATASETS: dict[str, SourceDataset] = {
    "ade20k-150": Ade20k150(),
    "ade20k-847": Ade20k847(),
    "pascal-context-59": PascalContext59(),
    "pascal-context-459": PascalContext459(),
    "pascal-voc-20": PascalVoc("pascal-voc-20"),
    "pascal-voc-21": PascalVoc("pascal-voc-21"),
    "coco-panoptic": CocoPanoptic(),
    "cityscapes": Cityscapes(),
    FOLDER: FolderDataset(),
}


def open_source_dataset(benchmark: str, source: Path, classes: Path | None = None) -> SourceDataset:
    """Find the reader of a benchmark in `SOURCE_DATASETS`; a user's own folder is read with its class file."""
    return FolderDataset.at(source, classes) if benchmark == FOLDER else SOURCE_DATASETS[benchmark]
