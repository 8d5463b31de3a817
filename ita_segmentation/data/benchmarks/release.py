"""What an official release gives: its classes, and images with labels read exactly as it defines them.

A `Release` knows one benchmark's files. `index` looks at the folder and lists the images; `read` decodes one of
them. Both name the file that is missing or malformed (`ReleaseError`). `run_prepare.py` turns what they give into a
`datasets` data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class ReleaseError(Exception):
    """A release that is not what it should be, said in one line that names the file or folder."""


@dataclass(frozen=True)
class Category:
    """A class of a benchmark.

    Attributes:
        name: the words for it, the first the most usual, separated by commas: "road, route".
        official_name: as the release spells it.
        is_thing: whether its instances are told apart; None where the release does not say.
    """

    name: str
    official_name: str
    is_thing: bool | None = None


@dataclass(frozen=True)
class LabelledImage:
    """An image and its labels.

    Attributes:
        image_id: unique in its split.
        image: the encoded image (JPEG or PNG file content).
        label: (H, W) uint8 or uint16, class indices 0..K-1 or the release's ignore index.
        panoptic: (H, W) int32 segment ids, 0 where there is none; None where the release has no segments.
        segments: of the panoptic map, each {"id": int, "category_id": class index, "isthing": bool, "iscrowd": bool}.
    """

    image_id: str
    image: bytes
    label: np.ndarray
    panoptic: np.ndarray | None = None
    segments: list[dict[str, Any]] = field(default_factory=list)


class Release(Protocol):
    """One benchmark's release.

    Attributes:
        categories: K classes; labels are their indices.
        ignore_index: label of pixels that are left out: 255, or 65535 where K is above 255.
        splits: names of the splits, as `datasets` calls them: "train", "validation".
        has_segments: whether images come with panoptic maps.
        layout: what the folder is expected to hold, in one line, for messages.
    """

    categories: Sequence[Category]
    ignore_index: int
    splits: tuple[str, ...]
    has_segments: bool
    layout: str

    def index(self, source: Path, split: str) -> list[Any]:
        """Everything `read` needs to know of each image, picklable, in the release's order.

        Raises:
            ReleaseError: the folder is not this release (what was expected and what was found), or files are
                missing (how many, and the first by name).
        """

    def read(self, source: Path, item: Any) -> LabelledImage:
        """One image of the index.

        Raises:
            ReleaseError: a file is missing, cut off, of the wrong size or kind, or holds a label out of range.
        """
