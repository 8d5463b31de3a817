"""The files that an image becomes: which formats there are, and how each is written.

Formats of other tools are added to `FORMATS` by a caller that knows them (`ita_segmentation.integrations.formats`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ita_segmentation.files import json_bytes, path_text
from ita_segmentation.images import png_bytes
from ita_segmentation.prediction.segmenter import SegmentedImage
from ita_segmentation.visualization import draw_overlay


@dataclass(frozen=True)
class Item:
    """An image and its place among the results."""

    path: Path
    base: Path

    def file(self, ending: str) -> Path:
        """Return the result file with this ending."""
        return self.base.with_name(self.base.name + ending)


@dataclass(frozen=True)
class Source:
    """What a file format may say about where a result comes from."""

    item: Item
    image: Image.Image
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class ImageFormat:
    """A file format for the segments of one image.

    Attributes:
        ending: what follows the name of the image in the name of the file.
        encode: gives the content of the file.
        keeps_overlaps: whether overlapping instances are kept whole.
    """

    ending: str
    encode: Callable[[SegmentedImage, Source], bytes]
    keeps_overlaps: bool = False


def label_png(label_map: np.ndarray) -> bytes:
    """Encode a label map (H, W), uint8 or uint16, as a PNG of one channel."""
    return png_bytes(Image.fromarray(label_map))


def legend_of(segments: Sequence[Mapping[str, Any]]) -> list[tuple[int, str, float | None]]:
    """Return the legend of an overlay: id, label and score of each segment."""
    return [(one["id"], one["label"], one["score"]) for one in segments]


def _overlay(result: SegmentedImage, source: Source) -> bytes:
    return png_bytes(draw_overlay(source.image, result.label_map, legend_of(result.segments)))


def _document(result: SegmentedImage, source: Source) -> bytes:
    return json_bytes({"image": path_text(source.item.path), **source.settings, **result.document()})


FORMATS: Mapping[str, ImageFormat] = {
    "overlay": ImageFormat("_overlay.png", _overlay),
    "labels": ImageFormat("_labels.png", lambda result, source: label_png(result.label_map)),
    "segments": ImageFormat("_segments.json", _document),
}
DEFAULT_FORMATS = ("overlay", "labels", "segments")
