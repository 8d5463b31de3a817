"""Images in files: segmented a batch at a time, the files of each written before the next batch is read."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.files import read_text, write_files
from ita_segmentation.images import read_image
from ita_segmentation.prediction.segmenter import Prediction, Segmenter
from ita_segmentation.visualization import draw_overlay

ENDINGS = {
    "overlay": "_overlay.png",
    "labels": "_labels.png",
    "segments": "_segments.json",
    "coco": "_coco.json",
}
"""What an image's files are named after its own name, by format."""
DEFAULT_FORMATS = ("overlay", "labels", "segments")


@dataclass(frozen=True)
class Item:
    """An image and its place among the results: `base` is the output folder and the image's name."""

    path: Path
    base: Path

    def files(self, formats: Sequence[str]) -> dict[str, Path]:
        return {one: self.base.with_name(self.base.name + ENDINGS[one]) for one in formats}


def segment_images(
    segmenter: Segmenter, items: Sequence[Item], formats: Sequence[str], model: Path, batch_size: int = 1
) -> Iterator[list[ITAError | None]]:
    """Segments images and writes their files, batch by batch.

    Args:
        items: what to segment.
        formats: keys of `ENDINGS`.
        model: what the files say of where the model came from.
        batch_size: images in one pass.

    Yields:
        for each batch what was wrong with each image; None where its files are written.
    """
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        errors: dict[int, ITAError | None] = {}
        images: dict[int, Image.Image] = {}
        for index, item in enumerate(batch):
            try:
                images[index] = read_image(item.path)
            except ITAError as error:
                errors[index] = error
        results = segmenter.segment(list(images.values()))
        for (index, image), result in zip(images.items(), results, strict=True):
            errors[index] = _write(batch[index], image, result, formats, model)
        yield [errors[index] for index in range(len(batch))]


def is_done(item: Item, formats: Sequence[str], model: Path, segmenter: Segmenter) -> bool:
    """Whether an image's files are there, of this model, task and vocabulary as far as they say."""
    files = item.files(formats)
    if not all(path.is_file() for path in files.values()):
        return False
    if "segments" not in files:
        return True
    try:
        document = json.loads(read_text(files["segments"]))
    except (ITAError, ValueError):
        return False
    expected = {
        "image": str(item.path),
        "model": str(model),
        "task": segmenter.task,
        "vocabulary": segmenter.classes,
    }
    return isinstance(document, dict) and all(document.get(key) == one for key, one in expected.items())


def keep_inputs(items: Sequence[Item], files: Sequence[Path]) -> None:
    """Raises ITAError where one of the result `files` would take the place of one of the images given."""
    given = {item.path.resolve() for item in items}
    for path in files:
        if path.resolve() in given:
            raise ITAError(
                f"{path} is one of the images given and would be overwritten: choose another --output"
            )


def image_error(path: Path, error: ITAError) -> str:
    """One line that names the image."""
    message = one_line(error)
    return message if str(path) in message else f"{path}: {message}"


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def json_bytes(document: Any) -> bytes:
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()


def label_png(label_map: np.ndarray) -> bytes:
    """(H, W) uint8 or uint16 -> a PNG of one channel."""
    return png(Image.fromarray(label_map))


def _write(
    item: Item, image: Image.Image, result: Prediction | ITAError, formats: Sequence[str], model: Path
) -> ITAError | None:
    if isinstance(result, ITAError):
        return result
    document = {"image": str(item.path), "model": str(model), **result.document}
    contents = {}
    for name, path in item.files(formats).items():
        if name == "overlay":
            legend = [(one["id"], one["label"], one["score"]) for one in result.document["segments"]]
            contents[path] = png(draw_overlay(image, result.label_map, legend))
        elif name == "labels":
            contents[path] = label_png(result.label_map)
        elif name == "segments":
            contents[path] = json_bytes(document)
        else:
            contents[path] = json_bytes(_coco(item, result))
    try:
        write_files(contents)
    except ITAError as error:
        return error
    return None


def _coco(item: Item, result: Prediction) -> dict[str, Any]:
    """A COCO document of one image; its id is its name among the results."""
    from ita_segmentation.integrations import coco_document

    size = {"width": result.document["width"], "height": result.document["height"]}
    images = [{"id": item.base.name, "file_name": str(item.path), **size}]
    annotations = [{"image_id": item.base.name, **entry} for entry in result.run_lengths]
    return coco_document(images, annotations, result.document["vocabulary"])
