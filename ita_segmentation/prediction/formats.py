"""The files that an image becomes; the formats of other tools are in `ita_segmentation.integrations.formats`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ita_segmentation.files import json_bytes, path_text
from ita_segmentation.images import png_bytes
from ita_segmentation.prediction.segmenter import SegmentedImage
from ita_segmentation.prediction.sources import InputFile
from ita_segmentation.visualization import draw_overlay

Encode = Callable[[SegmentedImage, InputFile, Image.Image, Mapping[str, Any]], bytes]
"""Segments, the file that they are of, its RGB image, and the settings -> the content of a file."""


@dataclass(frozen=True)
class ResultFormat:
    """A file format for the segments of one image.

    Attributes:
        ending: what follows the name of the image in the name of the file.
        encode: gives the content of the file.
        keeps_overlaps: whether overlapping instances are kept whole.
    """

    ending: str
    encode: Encode
    keeps_overlaps: bool = False


def label_png(label_map: np.ndarray) -> bytes:
    """Encode a label map (H, W), uint8 or uint16, as a PNG of one channel."""
    return png_bytes(Image.fromarray(label_map))


def legend_of(segments: Sequence[Mapping[str, Any]]) -> list[tuple[int, str, float | None]]:
    """Return the legend of an overlay: id, label and score of each segment."""
    return [(one["id"], one["label"], one["score"]) for one in segments]


def _overlay(result: SegmentedImage, file: InputFile, image: Image.Image, settings: Any) -> bytes:
    return png_bytes(draw_overlay(image, result.label_map, legend_of(result.segments)))


def _document(result: SegmentedImage, file: InputFile, image: Image.Image, settings: Any) -> bytes:
    return json_bytes({"image": path_text(file.path), **settings, **result.document()})


RESULT_FORMATS: Mapping[str, ResultFormat] = {
    "overlay": ResultFormat("_overlay.png", _overlay),
    "labels": ResultFormat("_labels.png", lambda result, *_: label_png(result.label_map)),
    "segments": ResultFormat("_segments.json", _document),
}
DEFAULT_FORMATS = tuple(RESULT_FORMATS)
