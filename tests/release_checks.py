"""How the tests of the releases read a miniature release, and compare it with what was worked out by hand."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_ita.release import LabelledPicture, ReleaseError
from miniature_releases import Expected


def read_all(release: Any, source: Path, split: str = "validation") -> dict[str, LabelledPicture]:
    pictures = [release.read(source, item) for item in release.index(source, split)]
    return {picture.image_id: picture for picture in pictures}


def check_split(release: Any, source: Path, split: str, expected: dict[str, Expected]) -> None:
    """Pictures, their order, labels, maps and segments are exactly those expected, of the types of the contract."""
    found = read_all(release, source, split)
    assert list(found) == list(expected)
    for image_id, picture in found.items():
        wanted = expected[image_id]
        assert picture.label.dtype == (np.uint8 if release.ignore_index == 255 else np.uint16)
        assert picture.label.tolist() == wanted.label.tolist()
        assert Image.open(io.BytesIO(picture.image)).size == wanted.label.shape[::-1]
        if wanted.image is not None:
            assert picture.image == wanted.image
        assert picture.segments == wanted.segments
        assert (picture.panoptic is None) == (wanted.panoptic is None)
        if picture.panoptic is not None and wanted.panoptic is not None:
            assert picture.panoptic.dtype == np.int32
            assert picture.panoptic.tolist() == wanted.panoptic.tolist()


def check_refused(release: Any, source: Path, *said: str, split: str = "validation") -> None:
    """The release is refused in one line that says all of this."""
    with pytest.raises(ReleaseError) as refusal:
        read_all(release, source, split)
    message = str(refusal.value)
    assert "\n" not in message
    assert [words for words in said if words not in message] == [], message
