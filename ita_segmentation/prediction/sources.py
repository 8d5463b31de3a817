"""Find what is to be segmented: images, folders of them, patterns such as "photos/**/*.jpg", videos."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ita_segmentation.errors import ITAError
from ita_segmentation.files import path_text
from ita_segmentation.images import IMAGE_SUFFIXES, find_images

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")
MAX_NAME_BYTES = 200
"""Of a result's name without its ending; file systems allow 255 for both."""


@dataclass(frozen=True)
class InputFile:
    """An image or video.

    Attributes:
        path: where it is.
        base: the output folder and the name of its results in it.
    """

    path: Path
    base: Path

    def result(self, ending: str) -> Path:
        """Return the result with this ending."""
        return self.base.with_name(self.base.name + ending)


def is_video(path: Path) -> bool:
    """Tell whether a file is read as a video, by its suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def find_sources(given: Sequence[Path]) -> list[Path]:
    """List the files given, the images directly in the folders given, and what the patterns match, each once.

    A name with `*`, `?` or `[` that no file has is a pattern; `**` matches folders of any depth. Patterns match
    images and videos only, by their suffix, and nothing hidden.

    Raises:
        ITAError: a source does not exist, a folder holds no image, or a pattern matches nothing.
    """
    expanded: list[Path] = []
    for source in given:
        if not glob.has_magic(str(source)) or source.exists():
            expanded.append(source)
            continue
        suffixes = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
        matches = (Path(name) for name in sorted(glob.glob(str(source), recursive=True)))
        matching = [path for path in matches if path.suffix.lower() in suffixes and path.is_file()]
        if not matching:
            raise ITAError(f"no image or video matches {path_text(source)}")
        expanded += matching
    return find_images(expanded)


def output_names(paths: Sequence[Path]) -> list[str]:
    """Name each image's results: by its stem; NAME_2, NAME_3, ... where another image has that name already.

    Stems of more than 200 bytes are cut and end in a digest of the whole.
    """
    stems = [_short(path.stem) for path in paths]
    reserved, taken = {stem.casefold() for stem in stems}, set[str]()
    names = []
    for stem in stems:
        name, number = stem, 1
        while name.casefold() in taken or (number > 1 and name.casefold() in reserved):
            number += 1
            name = f"{stem}_{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def _short(stem: str) -> str:
    encoded = os.fsencode(stem)
    if len(encoded) <= MAX_NAME_BYTES:
        return path_text(stem)
    cut = encoded[: MAX_NAME_BYTES - 9].decode("utf-8", "ignore")
    return f"{cut}-{hashlib.sha256(encoded).hexdigest()[:8]}"
