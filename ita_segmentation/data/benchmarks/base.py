"""What `ita prepare` reads: a source dataset, one class for each official release.

A source dataset lists the images of a folder and decodes one of them at a time, with the labels exactly as the
release defines them. Both name the file that is missing or malformed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ita_segmentation.data.categories import Category


@dataclass(frozen=True)
class ImageEntry:
    """An image of a source dataset and where its labels are. Paths are relative to the source folder.

    `label` is the file of its label map or panoptic map (None if `annotation` has the labels, as a shared file says
    them), `instances` that of its instance map (None where there is none). `image_id` is unique within a split.
    """

    image_id: str
    image: str
    label: str | None = None
    instances: str | None = None
    annotation: tuple = ()
    has_segments: bool = False

    @property
    def files(self) -> list[str]:
        """All files of this image."""
        return [name for name in (self.image, self.label, self.instances) if name is not None]


@dataclass(frozen=True)
class LabeledImage:
    """An image, as the content of its JPEG or PNG file, and its labels.

    `label` is (H, W) uint8 or uint16, class indices 0..K-1 or the ignore index; `panoptic` is (H, W) int32 segment ids,
    0 for none, or None, and `segments` has `{"id": int, "category_id": class index, "isthing": bool, "iscrowd": bool}`
    for each of them.
    """

    image_id: str
    image: bytes
    label: np.ndarray
    panoptic: np.ndarray | None = None
    segments: list[dict[str, Any]] = field(default_factory=list)


class SourceDataset:
    """The official release of one benchmark.

    Attributes:
        categories: K classes; labels are their indices.
        ignore_index: the label of ignored pixels: 255, or 65535 if K is above 255.
        splits: names of the splits as `datasets` calls them: "train", "validation".
        layout: what the folder must contain, in one line, for messages.
    """

    categories: Sequence[Category] = ()
    ignore_index: int = 255
    splits: tuple[str, ...] = ("train", "validation")
    layout: str = ""

    def index(self, source: Path, split: str) -> list[ImageEntry]:
        """List the images of a split in the order of the release; ITAError if the folder is not this release.

        Single missing files are left to `read`, so that all of them are reported and not only the first.
        """
        raise NotImplementedError

    def read(self, source: Path, entry: ImageEntry) -> LabeledImage:
        """Read one image and its labels; ITAError names a file that is missing, truncated, or of wrong content."""
        raise NotImplementedError
