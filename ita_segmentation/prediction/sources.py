"""What is to be segmented: images, folders of them, patterns such as "photos/**/*.jpg", videos."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from ita_segmentation.errors import ITAError
from ita_segmentation.images import IMAGE_SUFFIXES, find_images

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def find_sources(given: Sequence[Path]) -> list[Path]:
    """Files as given, the images directly in the folders given, and what the patterns match, in order, each once.

    A name with `*`, `?` or `[` that no file has is a pattern; `**` goes through folders of any depth. Patterns match
    images and videos only, by their suffix, and nothing hidden.

    Raises:
        ITAError: if a source does not exist, a folder holds no image, or a pattern matches nothing.
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
            raise ITAError(f"no image or video matches {source}")
        expanded += matching
    return find_images(expanded)


def output_names(paths: Sequence[Path]) -> list[str]:
    """A name for each image's files: its stem; NAME_2, NAME_3, ... where another image has that name already."""
    taken: set[str] = set()
    stems = {path.stem.casefold() for path in paths}
    names = []
    for path in paths:
        name, number = path.stem, 1
        while name.casefold() in taken or (number > 1 and name.casefold() in stems):
            number += 1
            name = f"{path.stem}_{number}"
        taken.add(name.casefold())
        names.append(name)
    return names
