"""The benchmarks that `run_prepare.py` knows, by name."""

from __future__ import annotations

from pathlib import Path

from ita_segmentation.data.benchmarks.ade20k import Ade20k150, Ade20k847
from ita_segmentation.data.benchmarks.cityscapes import Cityscapes
from ita_segmentation.data.benchmarks.coco import CocoPanoptic
from ita_segmentation.data.benchmarks.folder import FolderRelease
from ita_segmentation.data.benchmarks.pascal_context import PascalContext59, PascalContext459
from ita_segmentation.data.benchmarks.pascal_voc import PascalVoc
from ita_segmentation.data.benchmarks.release import Release

FOLDER = "folder"

RELEASES: dict[str, Release] = {
    "ade20k-150": Ade20k150(),
    "ade20k-847": Ade20k847(),
    "pascal-context-59": PascalContext59(),
    "pascal-context-459": PascalContext459(),
    "pascal-voc-20": PascalVoc("pascal-voc-20"),
    "pascal-voc-21": PascalVoc("pascal-voc-21"),
    "coco-panoptic": CocoPanoptic(),
    "cityscapes": Cityscapes(),
    FOLDER: FolderRelease(),
}


def open_release(benchmark: str, source: Path, classes: Path | None = None) -> Release:
    """A release by its name; a user's folder with the classes that it, or a file of names, has.

    Raises:
        KeyError: there is no such benchmark.
        ReleaseError: the user's folder or file is not as expected.
    """
    return FolderRelease.at(source, classes) if benchmark == FOLDER else RELEASES[benchmark]
