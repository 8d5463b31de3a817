"""What the releases have in common: folders that are looked at, files that are read and checked, each by its name.

Every check raises `ReleaseError` with one line that names the file. The items that a release's `index` lists are
made of plain values (strings, numbers, tuples, lists, dictionaries, dataclasses of them) and name each file that
`read` opens by its path relative to the source, as a string: `run_prepare.py` looks at those files' sizes and dates
to know what has to be read again. Let `read` find out that a single file is missing (`read_bytes` names it), so that
all that are missing are listed and not only the first.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ita_segmentation.data.benchmarks.release import ReleaseError
from ita_segmentation.errors import one_line
from ita_segmentation.images import DECODING_ERRORS

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
GREY_MODES = {"L": np.uint8, "I;16": np.uint16, "I;16B": np.uint16, "I": np.uint16}
PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"
LISTED = 8  # names that a message shows of a folder


# ------------------------------------------------------------------------------------------------------------
# Folders


def require_folder(source: Path, parts: Sequence[str], layout: str) -> None:
    """Makes sure that the source has these parts, folders or files, relative to it ("images/validation").

    Args:
        layout: what the folder is expected to hold, in one line: the release's `layout`.

    Raises:
        ReleaseError: it has not; the line says what was expected and what was found, and which folder inside it
            has them all, if one does.
    """
    if not source.is_dir():
        raise ReleaseError(f"there is no folder {source}: expected {layout}")
    missing = [part for part in parts if not (source / part).exists()]
    if not missing:
        return
    inside = [folder for folder in _folders(source) if all((folder / part).exists() for part in parts)]
    hint = f"; {inside[0]} has them: give that as the source" if len(inside) == 1 else ""
    raise ReleaseError(
        f"{source} is not the release: missing: {', '.join(missing)}; found: {folder_content(source)}{hint}; "
        f"expected {layout}"
    )


def _folders(source: Path) -> list[Path]:
    """Folders in the source, and in those, in order."""
    first = sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
    return first + [path for folder in first for path in sorted(folder.iterdir()) if path.is_dir()]


def folder_content(folder: Path) -> str:
    """The first names in a folder, folders with a slash, for a message."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return (", ".join(names[:LISTED]) + more) or "nothing"


def files_by_stem(folder: Path, suffixes: Sequence[str], ending: str = "") -> dict[str, str]:
    """File names in a folder by their stem (without `ending`, such as "_seg", which they must have), in order.

    Hidden files are passed over; suffixes are compared in lower case.

    Raises:
        ReleaseError: the folder cannot be read, or two files have one stem.
    """
    found: dict[str, str] = {}
    try:
        names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise ReleaseError(f"cannot read the folder {folder}: {error.strerror or error}") from error
    for name in names:
        stem, suffix = Path(name).stem, Path(name).suffix.lower()
        if suffix not in suffixes or not stem.endswith(ending):
            continue
        stem = stem.removesuffix(ending)
        if stem in found:
            raise ReleaseError(f"{folder} has two files for one image: {found[stem]} and {name}")
        found[stem] = name
    return found


def missing_files(paths: Iterable[Path], what: str) -> None:
    """Raises ReleaseError if some of the paths are no files: how many, and the first by name.

    For the few files without which nothing can be listed; those of single images are left to `read`.
    """
    missing = [path for path in paths if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise ReleaseError(f"{what} missing: {missing[0]}{more}")


# ------------------------------------------------------------------------------------------------------------
# Files


def read_bytes(path: Path) -> bytes:
    """A file's content.

    Raises:
        ReleaseError: it is missing, empty or cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ReleaseError(f"{path} is missing") from error
    except OSError as error:
        raise ReleaseError(f"cannot read {path}: {error.strerror or error}") from error
    if not content:
        raise ReleaseError(f"{path} is empty (zero bytes)")
    return content


def read_image_bytes(path: Path) -> bytes:
    """The content of an image file as it is, after decoding all of it once.

    Raises:
        ReleaseError: it is missing, empty, cut off or no image.
    """
    content = read_bytes(path)
    decode(content, path)
    return content


def read_label_png(path: Path) -> np.ndarray:
    """The labels of a PNG of one channel: (H, W) uint8, or uint16 from 16 bits; a palette gives indices, not colours.

    Raises:
        ReleaseError: it is missing, empty, cut off, no PNG, or has colours and no palette.
    """
    image = decode(read_bytes(path), path, kind="PNG")
    if image.mode == "P":
        return np.array(image)
    if image.mode not in GREY_MODES:
        raise ReleaseError(f"{path} is no label map: a PNG of mode {image.mode}, not grey or palette")
    return np.array(image).astype(GREY_MODES[image.mode])


def read_color_png(path: Path) -> np.ndarray:
    """A PNG of three channels that encode ids: (H, W, 3) uint8; an alpha channel is left out.

    Raises:
        ReleaseError: it is missing, empty, cut off, no PNG, or has not three channels.
    """
    image = decode(read_bytes(path), path, kind="PNG")
    if image.mode not in ("RGB", "RGBA"):
        raise ReleaseError(f"{path} is a PNG of mode {image.mode}, not RGB")
    return np.array(image)[..., :3]


def decode(content: bytes, path: Path, kind: str | None = None) -> Image.Image:
    """Decodes an image as it is stored: no EXIF rotation, no change of mode; of a PNG, the checksums too.

    Grey PNGs of 1, 2 and 4 bits are refused: whether their values are to be scaled is not said.

    Args:
        path: for messages.
        kind: the format that it must have, such as "PNG".

    Raises:
        ReleaseError: it is cut off, damaged, no image, or of another format.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content))
            if kind not in (None, image.format):
                raise ReleaseError(f"{path} is not a {kind} file but {image.format}")
            if image.format == "PNG":
                Image.open(io.BytesIO(content)).verify()
                if PNG_END not in content:
                    raise ReleaseError(f"{path} is cut off or damaged: it has no end")
            few_bits = kind == "PNG" and image.tile and image.tile[0][3] in ("1", "L;2", "L;4")
            image.load()
    except Image.UnidentifiedImageError as error:
        raise ReleaseError(f"{path} is not {f'a {kind} file' if kind else 'an image'}") from error
    except (*DECODING_ERRORS, Image.DecompressionBombError) as error:
        raise ReleaseError(f"{path} is cut off or damaged: {one_line(error, 120)}") from error
    if few_bits:
        raise ReleaseError(f"{path} is a grey PNG of fewer than 8 bits: its values are ambiguous")
    return image


def image_size(content: bytes) -> tuple[int, int]:
    """(width, height) in pixels of an encoded image, as stored (before any EXIF rotation)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Image.open(io.BytesIO(content)).size


# ------------------------------------------------------------------------------------------------------------
# Checks


def check_same_size(size: tuple[int, int], label: np.ndarray, image_path: Path, label_path: Path) -> None:
    """Raises ReleaseError unless an image of `size` (width, height) and a map (H, W, ...) fit together."""
    height, width = label.shape[:2]
    if (width, height) != tuple(size):
        raise ReleaseError(
            f"{label_path} is {width} x {height} pixels but its image {image_path} is {size[0]} x {size[1]}"
        )


def check_label_range(label: np.ndarray, allowed: Container[int], path: Path) -> None:
    """Raises ReleaseError if a map (H, W) of unsigned integers has a value that is not allowed.

    The line has the first such values, and how many pixels hold one.

    Args:
        allowed: anything that knows `in`: a range, a set, a dictionary.
    """
    counts = np.bincount(label.ravel())
    wrong = [value for value in np.flatnonzero(counts).tolist() if value not in allowed]
    if wrong:
        values = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        raise ReleaseError(f"{path} has labels out of range: {values} ({counts[wrong].sum():,} pixels)")


def relabel(label: np.ndarray, indices: Mapping[int, int], ignore_index: int, path: Path) -> np.ndarray:
    """Class indices for a release's label values: (H, W) uint8 if `ignore_index` is 255, else uint16.

    Args:
        label: (H, W) of unsigned integers up to 16 bits.
        indices: the class index, or `ignore_index`, of every value that the release may hold.

    Raises:
        ReleaseError: the map has a value that `indices` has not.
    """
    check_label_range(label, indices, path)
    dtype = np.uint8 if ignore_index == 255 else np.uint16
    table = np.full(max(indices) + 1, ignore_index, dtype)
    table[list(indices)] = list(indices.values())
    return table[label]


# ------------------------------------------------------------------------------------------------------------
# Images with a label map each


@dataclass(frozen=True)
class ImageFiles:
    """An image of a release; paths relative to the source, `instances` None where the release has none."""

    image_id: str
    image: str
    label: str
    instances: str | None = None


def read_pair(source: Path, item: ImageFiles) -> tuple[bytes, np.ndarray]:
    """The content of an image and its label map, (H, W) uint8 or uint16, as they are in the release.

    Raises:
        ReleaseError: one is missing, cut off or of the wrong kind, or they differ in size.
    """
    image_path, label_path = source / item.image, source / item.label
    image, label = each_of(lambda: read_image_bytes(image_path), lambda: read_label_png(label_path))
    check_same_size(image_size(image), label, image_path, label_path)
    return image, label


def each_of(*reads: Callable[[], Any]) -> list[Any]:
    """What each of these gives, called one after the other.

    Raises:
        ReleaseError: some of them did; the line has what each of those said.
    """
    results, problems = [], []
    for read in reads:
        try:
            results.append(read())
        except ReleaseError as error:
            problems.append(str(error))
    if problems:
        raise ReleaseError("; ".join(problems))
    return results
