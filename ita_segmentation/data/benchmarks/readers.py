"""Look at the folders of a release, and read and check its files. Every failure is an `ITAError` naming the file."""

import json
import os
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ita_segmentation.data.benchmarks.base import ImageEntry
from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.images import DECODING_ERRORS, open_image

GRAY_MODES = {"L": np.uint8, "I;16": np.uint16, "I;16B": np.uint16, "I": np.uint16}
PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"
LISTED = 8  # names of a folder's content that a message shows


def require_folder(source: Path, parts: Sequence[str], layout: str) -> None:
    """Raise ITAError, saying what was expected and found, unless the source folder contains these files and folders."""
    if not source.is_dir():
        raise ITAError(f"there is no folder {source}: expected {layout}")
    missing = [part for part in parts if not (source / part).exists()]
    if not missing:
        return
    first = sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
    second = [path for folder in first for path in sorted(folder.iterdir()) if path.is_dir()]
    inside = [folder for folder in first + second if all((folder / part).exists() for part in parts)]
    names = sorted(path.name + "/" * path.is_dir() for path in source.iterdir())
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    found = (", ".join(names[:LISTED]) + more) or "nothing"
    hint = f"; {inside[0]} has them: give that as the source" if len(inside) == 1 else ""
    raise ITAError(
        f"{source} is not the release: missing: {', '.join(missing)}; found: {found}{hint}; expected {layout}"
    )


def files_by_stem(folder: Path, suffixes: Sequence[str], ending: str = "") -> dict[str, str]:
    """List the files of a folder by stem, in order, without hidden ones; `ending` ("_seg") is cut off the stems."""
    found: dict[str, str] = {}
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise ITAError(f"cannot read the folder {folder}: {error.strerror or error}") from error
    for name in names:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() not in suffixes or not stem.endswith(ending):
            continue
        stem = stem.removesuffix(ending)
        if stem in found:
            raise ITAError(f"{folder} has two files for one image: {found[stem]} and {name}")
        found[stem] = name
    return found


def read_bytes(path: Path) -> bytes:
    """Read a file; refuses one that is missing, empty or not regular (such as a named pipe)."""
    try:
        if path.exists() and not path.is_file():
            raise ITAError(f"{path} is not a regular file")
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ITAError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise ITAError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if not content:
        raise ITAError(f"{path} is empty (zero bytes)")
    return content


def read_json(path: Path, object_hook: Callable[[dict[str, Any]], Any]) -> Any:
    """Read a JSON file; `object_hook` replaces each object, innermost objects first."""
    try:
        return json.loads(read_bytes(path), object_hook=object_hook)
    except (ValueError, RecursionError) as error:
        raise ITAError(f"{path} is not JSON: {one_line(error, 120)}") from error


def read_image_bytes(path: Path) -> bytes:
    """Read an image file without changing it, after decoding it once to check it."""
    content = read_bytes(path)
    decode(content, path)
    return content


def read_label_png(path: Path) -> np.ndarray:
    """Read the labels of a PNG with one channel: (H, W) uint8, or uint16 for 16 bits; of a palette, the indices."""
    image = decode(read_bytes(path), path, kind="PNG")
    if image.mode == "P":
        return np.array(image)
    if image.mode not in GRAY_MODES:
        raise ITAError(f"{path} is not a label map: a PNG of mode {image.mode}, not gray or palette")
    return np.array(image).astype(GRAY_MODES[image.mode])


def read_color_png(path: Path) -> np.ndarray:
    """Read a PNG whose three channels encode ids: (H, W, 3) uint8; an alpha channel is dropped."""
    image = decode(read_bytes(path), path, kind="PNG")
    if image.mode not in ("RGB", "RGBA"):
        raise ITAError(f"{path} is a PNG of mode {image.mode}, not RGB")
    return np.array(image)[..., :3]


def decode(content: bytes, path: Path, kind: str | None = None) -> Image.Image:
    """Decode an image as stored, checksums included; of a PNG that holds labels, fewer than 8 bits are ambiguous."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = open_image(content)
            if kind not in (None, image.format):
                raise ITAError(f"{path} is not a {kind} file but {image.format}")
            if image.format == "PNG":
                open_image(content).verify()
                if PNG_END not in content:
                    raise ITAError(f"{path} is truncated or damaged: it has no end")
            tiles = getattr(image, "tile", [])
            few_bits = kind == "PNG" and tiles and tiles[0][3] in ("1", "L;2", "L;4")
            image.load()
    except Image.UnidentifiedImageError as error:
        raise ITAError(f"{path} is not {f'a {kind} file' if kind else 'an image'}") from error
    except (*DECODING_ERRORS, Image.DecompressionBombError) as error:
        raise ITAError(f"{path} is truncated or damaged: {one_line(error, 120)}") from error
    if few_bits:
        raise ITAError(f"{path} is a gray PNG of fewer than 8 bits: its values are ambiguous")
    return image


def image_size(content: bytes) -> tuple[int, int]:
    """Read (width, height) in pixels of an encoded image as stored, before any EXIF rotation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return open_image(content).size


def read_pair(source: Path, entry: ImageEntry) -> tuple[bytes, np.ndarray]:
    """Read the content of an image and its label map, (H, W) uint8 or uint16, unchanged and of one size."""
    image_path, label_path = source / entry.image, source / str(entry.label)
    image, label = read_all(lambda: read_image_bytes(image_path), lambda: read_label_png(label_path))
    check_same_size(image_size(image), label, image_path, label_path)
    return image, label


def read_all(*reads: Callable[[], Any]) -> list[Any]:
    """Call each function and return the results; if some raise ITAError, the message of one joins theirs."""
    results, problems = [], []
    for read in reads:
        try:
            results.append(read())
        except ITAError as error:
            problems.append(str(error))
    if problems:
        raise ITAError("; ".join(problems))
    return results


def check_same_size(size: tuple[int, int], label: np.ndarray, image_path: Path, label_path: Path) -> None:
    """Raise `ITAError` unless an image of `size` (width, height) and a map (H, W, ...) have the same size."""
    height, width = label.shape[:2]
    if (width, height) != tuple(size):
        raise ITAError(
            f"{label_path} is {width} x {height} pixels but its image {image_path} is {size[0]} x {size[1]}"
        )


def check_label_range(label: np.ndarray, allowed: Container[int], where: Path | str) -> None:
    """Raise `ITAError` if a map (H, W) of unsigned integers contains a value that is not allowed."""
    counts = np.bincount(label.ravel())
    wrong = [value for value in np.flatnonzero(counts).tolist() if value not in allowed]
    if wrong:
        values = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        raise ITAError(f"{where} has labels out of range: {values} ({counts[wrong].sum():,} pixels)")


def relabel(
    label: np.ndarray, indices: Mapping[int, int], ignore_index: int, where: Path | str
) -> np.ndarray:
    """Replace the label values of a release by class indices.

    `indices` has the class index, or `ignore_index`, of every value that may occur; another one raises ITAError.
    Returns (H, W) uint8 if `ignore_index` is 255, else uint16.
    """
    check_label_range(label, indices, where)
    table = np.full(max(indices) + 1, ignore_index, np.uint8 if ignore_index == 255 else np.uint16)
    table[list(indices)] = list(indices.values())
    return table[label]
