"""Segments drawn over their image: colours blended in, thin outlines, and a legend on a strip of its own.

The legend never covers the image: it stands at the right of upright and square images and beneath wide ones, in
a font that does not shrink with the image.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LegendEntry = tuple[int, str, "float | None"]

MAX_LEGEND_ENTRIES = 24
MAX_LABEL_CHARACTERS = 40
MAX_IMAGE_PIXELS = 16_000_000  # larger images are drawn smaller: an overlay is for looking at
STRIP_COLOR, TEXT_COLOR, QUIET_TEXT_COLOR = (255, 255, 255), (24, 24, 24), (110, 110, 110)
OUTLINE_SHADE = 0.45  # an outline is its segment's colour, darkened


def color_of(index: int) -> tuple[int, int, int]:
    """An 8-bit RGB colour for a class or segment id: always the same one, neighbouring ids far apart.

    Hues follow the golden ratio; saturation and brightness alternate, so that ids which come near in hue differ.
    """
    hue = (0.03 + index * 0.6180339887498949) % 1.0
    saturation = (0.85, 0.6, 0.95)[index % 3]
    value = (0.95, 0.8, 0.65, 1.0)[index // 3 % 4]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_overlay(
    image: Image.Image,
    segmentation: Any,
    legend: Sequence[LegendEntry],
    alpha: float = 0.55,
) -> Image.Image:
    """Draws a segmentation over its image, with a legend of what is in it.

    Args:
        image: the image, any mode.
        segmentation: (H, W) integer array or tensor of ids, the image's size.
        legend: (id, label, score or None) for each id; pixels of other ids stay unpainted, and entries that no
            pixel has are left out. Sorted by area; more than 24 end in "and n more".
        alpha: share of the colour in painted pixels, 0 to 1.

    Returns:
        an RGB image: `image` (made smaller above 16 million pixels) and, if anything is painted, the legend.

    Raises:
        ValueError: if sizes differ or alpha is outside [0, 1].
    """
    return add_legend(*paint_segments(image, segmentation, legend, alpha))


def paint_segments(
    image: Image.Image,
    segmentation: Any,
    legend: Sequence[LegendEntry],
    alpha: float = 0.55,
) -> tuple[Image.Image, list[LegendEntry]]:
    """`draw_overlay` without the legend; takes and raises the same.

    Returns:
        the painted RGB image, and the legend's entries that are in it, largest first.
    """
    ids = np.asarray(segmentation.detach().cpu() if hasattr(segmentation, "detach") else segmentation)
    if ids.shape != (image.height, image.width):
        raise ValueError(f"segmentation has shape {ids.shape} for an image of {(image.height, image.width)}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
    image = image.convert("RGB")
    if not legend:
        return image, []
    lowest, highest = min(entry[0] for entry in legend), max(entry[0] for entry in legend)
    # Ids outside of the legend's take the first or the last place.
    places = ids.astype(np.int64).clip(lowest - 1, highest + 1) - (lowest - 1)
    areas = np.bincount(places.ravel(), minlength=highest - lowest + 3)
    present = [entry for entry in legend if areas[entry[0] - lowest + 1]]
    present.sort(key=lambda entry: -areas[entry[0] - lowest + 1])
    if not present:
        return image, []
    if image.width * image.height > MAX_IMAGE_PIXELS:
        image, places = _shrink(image, places)
    colors, known = np.zeros((len(areas), 3), dtype=np.uint8), np.zeros(len(areas), dtype=bool)
    for index, _, _ in present:
        colors[index - lowest + 1], known[index - lowest + 1] = color_of(index), True
    return _paint(image, places, colors, known, alpha), present


def _shrink(image: Image.Image, places: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    factor = math.sqrt(MAX_IMAGE_PIXELS / (image.width * image.height))
    width, height = max(1, int(image.width * factor)), max(1, int(image.height * factor))
    return image.resize((width, height), Image.Resampling.BILINEAR), resize_labels(places, (height, width))


def resize_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A label map (H, W) brought to `size` (height, width): the nearest label above and left of each pixel."""
    rows = np.arange(size[0]) * labels.shape[0] // size[0]
    columns = np.arange(size[1]) * labels.shape[1] // size[1]
    return labels[rows[:, None], columns]


def _paint(
    image: Image.Image, places: np.ndarray, colors: np.ndarray, known: np.ndarray, alpha: float
) -> Image.Image:
    """Blends in `colors` (n, 3) uint8 where `known` (n,) bool, both looked up by `places` (H, W)."""
    inside, edges = known[places], _outlines(places)
    blended = Image.blend(image, Image.fromarray(colors[places]), alpha)
    blended = Image.composite(blended, image, Image.fromarray(inside))
    dark = Image.fromarray((OUTLINE_SHADE * colors).astype(np.uint8)[places])
    return Image.composite(dark, blended, Image.fromarray(inside & edges))


def _outlines(places: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels whose right or lower neighbour is another's; wider on large images."""
    edges = np.zeros(places.shape, dtype=bool)
    for step in range(1, 2 + max(places.shape) // 1200):
        edges[:, :-step] |= places[:, :-step] != places[:, step:]
        edges[:-step] |= places[:-step] != places[step:]
    return edges


def add_legend(image: Image.Image, entries: Sequence[LegendEntry]) -> Image.Image:
    """The image with a strip that names the colours of these ids; the image itself if there are none."""
    if not entries:
        return image
    lines: list[tuple[int | None, str]] = [(index, _line(label, score)) for index, label, score in entries]
    if len(lines) > MAX_LEGEND_ENTRIES:
        hidden = len(lines) - MAX_LEGEND_ENTRIES
        lines = [*lines[:MAX_LEGEND_ENTRIES], (None, f"and {hidden} more")]
    text_size = min(28, max(13, round(math.sqrt(image.width * image.height) / 38)))
    font = ImageFont.load_default(text_size)
    row_height, margin = round(1.5 * text_size), round(0.6 * text_size)
    column_width = math.ceil(max(font.getlength(text) for _, text in lines)) + 3 * margin + text_size
    beneath = image.width > 1.4 * image.height
    if beneath:
        columns = min(len(lines), max(1, (image.width - margin) // column_width))
        rows = -(-len(lines) // columns)
    else:
        rows = min(len(lines), max(6, (image.height - 2 * margin) // row_height))
        columns = -(-len(lines) // rows)
    width, height = columns * column_width + margin, rows * row_height + 2 * margin
    if beneath:
        corner, size = (0, image.height), (max(image.width, width), image.height + height)
    else:
        corner, size = (image.width, 0), (image.width + width, max(image.height, height))
    canvas = Image.new("RGB", size, STRIP_COLOR)
    canvas.paste(image, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for place, (index, text) in enumerate(lines):
        x = corner[0] + margin + place // rows * column_width
        y = corner[1] + margin + place % rows * row_height
        if index is not None:
            box = (x, y + 1, x + text_size, y + 1 + text_size)
            color = color_of(index)
            draw.rectangle(box, fill=color, outline=tuple(round(OUTLINE_SHADE * part) for part in color))
        color = TEXT_COLOR if index is not None else QUIET_TEXT_COLOR
        draw.text((x + text_size + margin, y + 1 + text_size // 2), text, fill=color, font=font, anchor="lm")
    return canvas


def _line(label: str, score: float | None) -> str:
    label = " ".join(label.split())
    if len(label) > MAX_LABEL_CHARACTERS:
        label = label[: MAX_LABEL_CHARACTERS - 1].rstrip() + "…"
    return label if score is None else f"{label}  {score:.2f}"
