"""Read files of examples: for names of classes, images with a mask or box each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.files import path_text, read_mapping
from ita_segmentation.images import read_image
from modeling_ita.class_examples import region_of_image
from modeling_ita.image_io import read_label_map

Examples = dict[str, list[tuple[Image.Image, Any]]]
"""Class name -> pairs of an RGB image and a mask or box, as `modeling_ita` encodes them."""
MAX_EXAMPLES = 1_000


def read_examples(path: Path) -> Examples:
    """Read a file of examples.

    Args:
        path: JSON (or YAML): for each class name a list of {"image": path, "box": [left, top, right, bottom]} or
            {"image": path, "mask": path}, in pixels of the image as a person sees it. A mask is an image whose pixels
            that are not 0 are inside. Paths are relative to the file's folder.

    Raises:
        ITAError: it is not such a file, or an image, mask or box cannot be used; in one line that says which.
    """
    document = read_mapping(path)
    if not document:
        raise ITAError(f"the file of examples {path_text(path)} is empty")
    examples: Examples = {}
    for name, entries in document.items():
        if not isinstance(entries, list) or not entries:
            raise ITAError(
                f"{path_text(path)}: {str(name)!r:.100} needs a list of examples, got {entries!r:.100}"
            )
        examples[str(name)] = [
            _read_example(path.parent, entry, f"{path_text(path)}: example {number} of {str(name)!r:.100}")
            for number, entry in enumerate(entries, start=1)
        ]
    if sum(map(len, examples.values())) > MAX_EXAMPLES:
        raise ITAError(f"the file of examples {path_text(path)} has more than {MAX_EXAMPLES:,} examples")
    return examples


def _read_example(folder: Path, entry: Any, place: str) -> tuple[Image.Image, Any]:
    keys = set(entry) if isinstance(entry, dict) else set()
    if keys not in ({"image", "box"}, {"image", "mask"}):
        raise ITAError(
            f'{place} is {{"image": path, "box": [...]}} or {{"image": path, "mask": path}}, got {entry!r:.100}'
        )
    try:
        image = read_image(folder / str(entry["image"]))
        region = entry["box"] if "box" in keys else read_label_map(folder / str(entry["mask"]))
        region_of_image(region, image.size)
    except (ITAError, ValueError) as error:
        raise ITAError(f"{place}: {one_line(error)}") from error
    return image, region
