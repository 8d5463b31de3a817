"""Show augmented training images with their masks, before a long run starts."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ita_segmentation.files import write_files
from ita_segmentation.visualization import paint_segments

MARGIN = 4


def show_augmented(dataset: Any, path: Path | str, rows: int = 3, columns: int = 4, tile: int = 224) -> None:
    """Draw the first images of a training dataset to a JPEG, one a row, each as its first epochs show it.

    Each mask has a color; what no mask covers (void, crowds, unseen classes) is not painted. An image smaller than the
    crop is at the top left on black. One example is `tile` pixels wide and high.
    """
    step = tile + MARGIN
    sheet = Image.new("RGB", (columns * step - MARGIN, rows * step - MARGIN), "white")
    for row in range(rows):
        for column in range(columns):
            example = dataset[column * len(dataset) + row]
            drawn = _draw(example, tile / dataset.augmentation.size)
            corner = (column * step, row * step)
            sheet.paste((0, 0, 0), (*corner, corner[0] + tile, corner[1] + tile))
            sheet.paste(drawn, corner)
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=85)
    write_files({Path(path): buffer.getvalue()})


def _draw(example: dict[str, Any], scale: float) -> Image.Image:
    """Paint the masks of an example over its image, scaled."""
    image = Image.fromarray(np.ascontiguousarray(example["image"].permute(1, 2, 0).numpy()))
    ids = np.zeros(image.size[::-1], np.int64)
    for number, mask in enumerate(example["mask_labels"].numpy(), start=1):
        ids[mask] = number
    legend = [(number, "", None) for number in range(1, len(example["mask_labels"]) + 1)]
    painted = paint_segments(image, ids, legend)[0]
    size = (max(1, round(painted.width * scale)), max(1, round(painted.height * scale)))
    return painted.resize(size, Image.Resampling.BILINEAR)
