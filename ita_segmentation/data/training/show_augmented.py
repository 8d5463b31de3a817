"""Augmented training images with their masks drawn, to see what a run would see before it starts."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

EDGE = (255, 255, 255)
MARGIN = 4


def show_augmented(dataset: Any, path: Path | str, rows: int = 3, columns: int = 4, tile: int = 224) -> None:
    """Draws the first `rows` images of a training data set, each as its first `columns` epochs show it.

    Masks are tinted, one colour each, with a white edge; what no mask covers (void, crowds, unseen classes) is as it
    is. An image smaller than the crop lies at the top left on black.

    Args:
        dataset: of training examples, as `ita_segmentation.data.training.datasets.load_disk` gives.
        path: JPEG to write.
        tile: side of one example in the drawing, in pixels.
    """
    step = tile + MARGIN
    sheet = Image.new("RGB", (columns * step - MARGIN, rows * step - MARGIN), "white")
    for row in range(rows):
        for column in range(columns):
            example = dataset[column * len(dataset) + row]
            sheet.paste(draw_example(example, tile, dataset.augmentation.size), (column * step, row * step))
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    try:
        sheet.save(temporary, "JPEG", quality=85)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def draw_example(example: dict[str, Any], tile: int, crop: int) -> Image.Image:
    """A square of `tile` pixels that stands for the crop of `crop` pixels, with the example at the top left."""
    height, width = example["image"].shape[1:]
    pixels = example["image"].permute(1, 2, 0).float().numpy()
    for number, mask in enumerate(example["mask_labels"]):
        colour = np.array(_colour(number), np.float32)
        pixels[mask.numpy()] = 0.55 * pixels[mask.numpy()] + 0.45 * colour
        pixels[_edge(mask).numpy()] = EDGE
    square = Image.new("RGB", (tile, tile))
    size = (max(1, round(width * tile / crop)), max(1, round(height * tile / crop)))
    square.paste(Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.BILINEAR))
    return square


def _colour(number: int) -> tuple[int, int, int]:
    """Colours far from each other: hues a golden section apart."""
    hue = round(255 * (0.618 * number % 1.0))
    return Image.new("HSV", (1, 1), (hue, 230, 255)).convert("RGB").getpixel((0, 0))  # type: ignore[return-value]


def _edge(mask: Tensor) -> Tensor:
    """(H, W) bool: pixels of a mask that have a neighbour above or on the left outside of it, or the reverse."""
    edge = torch.zeros_like(mask)
    edge[1:] |= mask[1:] ^ mask[:-1]
    edge[:, 1:] |= mask[:, 1:] ^ mask[:, :-1]
    return edge & mask
