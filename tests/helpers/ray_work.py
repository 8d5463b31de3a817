"""Work for actors of Ray that needs no model: a label map of an image's mean, as slowly as a test wants it."""

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ita_segmentation.prediction import ParquetSegmenter, SegmentedImage, open_rows
from ita_segmentation.prediction.segmenter import describe_segments

CLASSES = [["dark"], ["bright"]]


class MeanSegmenter:
    """Segments an image as a whole: dark or bright.

    Args:
        seconds: for each image.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds

    def segment_images(self, images: Sequence[Image.Image]) -> list[SegmentedImage]:
        """Segment images."""
        time.sleep(self.seconds * len(images))
        return [self._segment(image) for image in images]

    @staticmethod
    def _segment(image: Image.Image) -> SegmentedImage:
        found = int(np.asarray(image).mean() > 127)
        label_map = np.full((image.height, image.width), found, np.uint8)
        entries = [{"id": found, "label_id": found, "score": 1.0}]
        return SegmentedImage(label_map, "semantic", CLASSES, describe_segments(label_map, CLASSES, entries))


def open_work(
    dataset: Path,
    unit_size: int,
    seconds: float,
    slow: Path | None,
    note_length: Callable[[int, int], None],
) -> tuple[Any, ParquetSegmenter, dict[str, Any]]:
    """Open a folder of images; the first process that makes the file `slow` takes ten times as long."""
    if slow is not None:
        with contextlib.suppress(FileExistsError):
            slow.open("x").close()
            seconds *= 10
    rows = open_rows(
        str(dataset),
        None,
        "image",
        None,
        part_length=lambda part: None,
        note_length=note_length,
        unit_size=unit_size,
    )
    (dataset / f".{os.getpid()}.pid").touch()  # hidden: no image of the folder
    return rows, ParquetSegmenter(MeanSegmenter(seconds), ("labels", "segments")), {"classes": CLASSES}  # type: ignore[arg-type]
