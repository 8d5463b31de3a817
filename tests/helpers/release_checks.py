"""How the tests of the releases read a miniature release, and compare it with what was worked out by hand."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.miniature_releases import Expected
from ita_segmentation.data.benchmarks.release import LabelledImage, ReleaseError


def read_all(release: Any, source: Path, split: str = "validation") -> dict[str, LabelledImage]:
    images = [release.read(source, item) for item in release.index(source, split)]
    return {image.image_id: image for image in images}


def check_split(release: Any, source: Path, split: str, expected: dict[str, Expected]) -> None:
    """Images, their order, labels, maps and segments are exactly those expected, of the types of the contract."""
    found = read_all(release, source, split)
    assert list(found) == list(expected)
    for image_id, image in found.items():
        wanted = expected[image_id]
        assert image.label.dtype == (np.uint8 if release.ignore_index == 255 else np.uint16)
        assert image.label.tolist() == wanted.label.tolist()
        assert Image.open(io.BytesIO(image.image)).size == wanted.label.shape[::-1]
        if wanted.image is not None:
            assert image.image == wanted.image
        assert image.segments == wanted.segments
        assert (image.panoptic is None) == (wanted.panoptic is None)
        if image.panoptic is not None and wanted.panoptic is not None:
            assert image.panoptic.dtype == np.int32
            assert image.panoptic.tolist() == wanted.panoptic.tolist()


def check_refused(release: Any, source: Path, *said: str, split: str = "validation") -> None:
    """The release is refused in one line that says all of this."""
    with pytest.raises(ReleaseError) as refusal:
        read_all(release, source, split)
    message = str(refusal.value)
    assert "\n" not in message
    assert [words for words in said if words not in message] == [], message
