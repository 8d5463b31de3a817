"""Read a miniature release in tests, and compare it with what was worked out by hand."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.miniature_releases import Expected
from ita_segmentation.data.benchmarks import LabeledImage
from ita_segmentation.errors import ITAError


def read_all(dataset: Any, source: Path, split: str = "validation") -> dict[str, LabeledImage]:
    images = [dataset.read(source, entry) for entry in dataset.index(source, split)]
    return {image.image_id: image for image in images}


def check_split(dataset: Any, source: Path, split: str, expected: dict[str, Expected]) -> None:
    """Images, their order, labels, maps and segments are exactly those expected, with the documented types."""
    found = read_all(dataset, source, split)
    assert list(found) == list(expected)
    for image_id, image in found.items():
        reference = expected[image_id]
        assert image.label.dtype == (np.uint8 if dataset.ignore_index == 255 else np.uint16)
        assert image.label.tolist() == reference.label.tolist()
        assert Image.open(io.BytesIO(image.image)).size == reference.label.shape[::-1]
        if reference.image is not None:
            assert image.image == reference.image
        assert image.segments == reference.segments
        assert (image.panoptic is None) == (reference.panoptic is None)
        if image.panoptic is not None and reference.panoptic is not None:
            assert image.panoptic.dtype == np.int32
            assert image.panoptic.tolist() == reference.panoptic.tolist()


def check_refused(dataset: Any, source: Path, *said: str, split: str = "validation") -> None:
    """The release is refused in one line that says all of this."""
    with pytest.raises(ITAError) as refusal:
        read_all(dataset, source, split)
    message = str(refusal.value)
    assert "\n" not in message
    assert [text for text in said if text not in message] == [], message
