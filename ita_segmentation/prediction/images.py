"""Segment image files, a batch at a time; the files of each image are written before the next batch is read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.files import path_text, read_text, write_files
from ita_segmentation.images import read_image
from ita_segmentation.prediction.formats import ImageFormat, Item, Source
from ita_segmentation.prediction.segmenter import SegmentedImage, Segmenter

Outcome = tuple[Item, "SegmentedImage | ITAError"]


def segment_images(
    segmenter: Segmenter,
    items: Sequence[Item],
    formats: Mapping[str, ImageFormat],
    settings: Mapping[str, Any],
    batch_size: int = 1,
) -> Iterator[Outcome]:
    """Segment images and write their files.

    Args:
        segmenter: what segments them.
        items: the images.
        formats: what is written of each, by name.
        settings: what the files say of how they were made, see `Source`.
        batch_size: images in one pass.

    Yields:
        each image with its segments, or with what was wrong with it.
    """
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        outcomes: dict[Item, SegmentedImage | ITAError] = {}
        images: dict[Item, Image.Image] = {}
        for item in batch:
            try:
                images[item] = read_image(item.path)
            except ITAError as error:
                outcomes[item] = error
        for item, result in zip(images, segmenter.segment(list(images.values())), strict=True):
            outcomes[item] = result
            if isinstance(result, SegmentedImage):
                source = Source(item, images[item], settings)
                try:
                    write_files(
                        {item.file(one.ending): one.encode(result, source) for one in formats.values()}
                    )
                except ITAError as error:
                    outcomes[item] = error
        yield from ((item, outcomes[item]) for item in batch)


def is_done(
    item: Item,
    formats: Mapping[str, ImageFormat],
    settings: Mapping[str, Any],
) -> bool:
    """Tell whether an image's files are there and, as far as they say, made the same way."""
    files = {name: item.file(one.ending) for name, one in formats.items()}
    if not all(path.is_file() for path in files.values()):
        return False
    return "segments" not in files or document_fits(
        files["segments"], {"image": path_text(item.path), **settings}
    )


def document_fits(path: Path, expected: Mapping[str, object]) -> bool:
    """Tell whether a JSON file holds an object with these keys and values."""
    try:
        document = json.loads(read_text(path))
    except (ITAError, ValueError):
        return False
    return isinstance(document, dict) and all(document.get(key, ...) == one for key, one in expected.items())


def refuse_overwriting(inputs: Sequence[Path], results: Sequence[Path]) -> None:
    """Refuse results that would take the place of an input."""
    given = {path.resolve() for path in inputs}
    for path in results:
        if path.resolve() in given:
            raise ITAError(
                f"{path_text(path)} is one of the inputs and would be overwritten: choose another --output"
            )


def failure_line(path: Path, error: ITAError) -> str:
    """Return one line that names the file and says what was wrong with it."""
    message, name = one_line(error), path_text(path)
    return message if name in message or str(path) in message else f"{name}: {message}"
