"""Draw segments over their image: colors blended in, thin outlines, and a legend on a strip of its own.

The one palette and the one legend of the repository. The palette begins with that of Okabe and Ito ("Color Universal
Design", 2008) and goes on with the colors that are farthest, in Oklab and under simulated protanopia and
deuteranopia, from all before. The legend never covers the image: it stands to the right of upright and square images
and beneath wide ones, in a font that does not shrink with the image.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
"""8-bit RGB."""
LegendEntry = tuple[int, str, "float | None"]
"""Id, label, and score or None."""

_PALETTE_BYTES = bytes.fromhex(
    "e69f00 56b4e9 009e73 f0e442 0072b2 d55e00 cc79a7 871e4b 0000ff 78ffff 9669ff 690fa5 "
    "69d296 695a00 c30f87 ff4b69 69ff96 e10fd2 ffb4d2 b43c4b ff78d2 4b00d2 00e1ff 8796ff"
)
PALETTE: tuple[Color, ...] = tuple(
    zip(_PALETTE_BYTES[0::3], _PALETTE_BYTES[1::3], _PALETTE_BYTES[2::3], strict=True)
)
MIN_COLOR_DISTANCE = 0.16
"""Between the colors of an image, where enough of them are that far apart; see `color_distances`."""
MAX_LEGEND_ENTRIES = 24
MAX_LABEL_CHARACTERS = 40
MAX_OVERLAY_PIXELS = 16_000_000
"""Larger images are drawn smaller."""
STRIP_COLOR, TEXT_COLOR, MUTED_TEXT_COLOR = (255, 255, 255), (24, 24, 24), (95, 95, 95)
OUTLINE_SHADE = 0.45
"""An outline is its segment's color, darkened by this factor."""


def color_of(index: int) -> Color:
    """Return the preferred color of a class or segment id; ids 24 apart share one."""
    return PALETTE[index % len(PALETTE)]


def assign_colors(ids: Iterable[int], before: Mapping[int, Color] | None = None) -> dict[int, Color]:
    """Give the ids of an image colors that can be told apart.

    An id keeps the color that it had `before`; else it gets that of `color_of`, or, where that is near another's, the
    next one of the palette that is not, or the one that is farthest from all others. Beyond 24 ids colors repeat.

    Args:
        ids: ids of classes or segments, the most important first: earlier ids choose first.
        before: colors of an earlier frame.

    Returns:
        the color of each id.
    """
    wanted = list(dict.fromkeys(ids))
    before = before or {}
    places: dict[int, int] = {}
    for index in sorted(wanted, key=lambda one: one not in before):
        preferred = PALETTE.index(before.get(index, color_of(index)))
        if index not in before and places:
            nearest = color_distances()[:, sorted(set(places.values()))].min(axis=1)
            order = np.roll(np.arange(len(PALETTE)), -preferred)
            far = [place for place in order.tolist() if nearest[place] >= MIN_COLOR_DISTANCE]
            if far or nearest.max() > 0:
                preferred = far[0] if far else int(nearest.argmax())
        places[index] = preferred
    return {index: PALETTE[places[index]] for index in wanted}


@functools.cache
def color_distances() -> np.ndarray:
    """Distances in Oklab between the colors of the palette, (24, 24).

    The smallest of those seen with normal vision and, times 1.6, with protanopia and deuteranopia (Machado et al.,
    2009, on linear RGB).
    """
    to_cones = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])
    to_lab = np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])
    protanopia = np.array([[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]])
    deuteranopia = np.array([[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]])
    share = np.array(PALETTE) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    distances = []
    for vision, weight in ((np.eye(3), 1.0), (protanopia, 1.6), (deuteranopia, 1.6)):
        lab = np.cbrt(np.clip(linear @ vision.T, 0, 1) @ to_cones.T) @ to_lab.T
        distances.append(weight * np.linalg.norm(lab[:, None] - lab[None], axis=-1))
    return np.min(distances, axis=0)


def draw_overlay(
    image: Image.Image, segmentation: Any, legend: Sequence[LegendEntry], alpha: float = 0.55
) -> Image.Image:
    """Draw a segmentation over its image, with a legend of what is in it.

    Args:
        image: the image, any mode.
        segmentation: (H, W) integer array or tensor of ids, the image's size.
        legend: (id, label, score or None) of each id; pixels of other ids stay unpainted, and entries that no pixel
            has are left out. Sorted by area; more than 24 end in "and n more".
        alpha: share of the color in painted pixels, 0 to 1.

    Returns:
        an RGB image: `image` (made smaller above 16 million pixels) and, if anything is painted, the legend. The
        colors are those of `assign_colors`, largest segment first.

    Raises:
        ValueError: if sizes differ or alpha is outside [0, 1].
    """
    ids = _ids_of(image, segmentation)
    present = _present(ids, legend)
    colors = assign_colors(index for index, _, _ in present)
    painted, _ = paint_segments(image, ids, present, alpha, colors)
    return add_legend(painted, present, colors)


def paint_segments(
    image: Image.Image,
    segmentation: Any,
    legend: Sequence[LegendEntry],
    alpha: float = 0.55,
    colors: Mapping[int, Color] | None = None,
) -> tuple[Image.Image, list[LegendEntry]]:
    """Paint a segmentation over its image, as `draw_overlay` does, without the legend.

    Args:
        image: the image, any mode.
        segmentation: (H, W) integer array or tensor of ids, the image's size.
        legend: (id, label, score or None) of each id.
        alpha: share of the color in painted pixels, 0 to 1.
        colors: the color of each id of the legend; `color_of` without.

    Returns:
        the painted RGB image, and the legend's entries that are in it, largest first.

    Raises:
        ValueError: if sizes differ or alpha is outside [0, 1].
    """
    ids = _ids_of(image, segmentation)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
    image = image.convert("RGB")
    present = _present(ids, legend)
    if not present:
        return image, []
    places, lowest, count = _places(ids, legend)
    if image.width * image.height > MAX_OVERLAY_PIXELS:
        image, places = _shrink(image, places)
    table, known = np.zeros((count, 3), dtype=np.uint8), np.zeros(count, dtype=bool)
    for index, _, _ in present:
        table[index - lowest] = color_of(index) if colors is None else colors[index]
        known[index - lowest] = True
    return _paint(image, places, table, known, alpha), present


def add_legend(
    image: Image.Image, entries: Sequence[LegendEntry], colors: Mapping[int, Color] | None = None
) -> Image.Image:
    """Add a strip that names the colors of these ids.

    Args:
        image: an RGB image.
        entries: (id, label, score or None), in order; more than 24 end in "and n more".
        colors: the color of each id; `color_of` without.

    Returns:
        a new image; `image` itself if there are no entries.
    """
    if not entries:
        return image
    lines: list[tuple[Color | None, str]] = [
        (color_of(index) if colors is None else colors[index], legend_text(label, score))
        for index, label, score in entries
    ]
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
    for place, (color, text) in enumerate(lines):
        x = corner[0] + margin + place // rows * column_width
        y = corner[1] + margin + place % rows * row_height
        draw_legend_line(canvas, (x, y), text, color, font)
    return canvas


def draw_legend_line(
    canvas: Image.Image, corner: tuple[int, int], text: str, color: Color | None, font: Any
) -> None:
    """Draw a line of a legend: a square in `color` (None: no square, muted text) and the text to its right."""
    (x, y), size, draw = corner, round(font.size), ImageDraw.Draw(canvas)
    if color is not None:
        dark = tuple(round(OUTLINE_SHADE * part) for part in color)
        draw.rectangle((x, y + 1, x + size, y + 1 + size), fill=color, outline=dark)
    ink = MUTED_TEXT_COLOR if color is None else TEXT_COLOR
    draw.text((x + size + round(0.6 * size), y + 1 + size // 2), text, fill=ink, font=font, anchor="lm")


def legend_text(label: str, score: float | None, max_characters: int = MAX_LABEL_CHARACTERS) -> str:
    """Return a legend's line of text: the label, shortened to `max_characters`, and the score if there is one."""
    label = " ".join(label.split())
    if len(label) > max_characters:
        label = label[: max_characters - 1].rstrip() + "…"
    return label if score is None else f"{label}  {score:.2f}"


def resize_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a label map (H, W) to `size` (height, width): the nearest label above and left of each pixel."""
    rows = np.arange(size[0]) * labels.shape[0] // size[0]
    columns = np.arange(size[1]) * labels.shape[1] // size[1]
    return labels[rows[:, None], columns]


def _ids_of(image: Image.Image, segmentation: Any) -> np.ndarray:
    ids = np.asarray(segmentation.detach().cpu() if hasattr(segmentation, "detach") else segmentation)
    if ids.shape != (image.height, image.width):
        raise ValueError(f"segmentation has shape {ids.shape} for an image of {(image.height, image.width)}")
    return ids


def _places(ids: np.ndarray, legend: Sequence[LegendEntry]) -> tuple[np.ndarray, int, int]:
    """Ids (H, W) as places in a table, its first id and its length; ids outside of the legend's get the ends."""
    first, last = min(entry[0] for entry in legend) - 1, max(entry[0] for entry in legend) + 1
    return ids.astype(np.int64).clip(first, last) - first, first, last - first + 1


def _present(ids: np.ndarray, legend: Sequence[LegendEntry]) -> list[LegendEntry]:
    """The entries that have pixels, largest first."""
    if not legend:
        return []
    places, first, count = _places(ids, legend)
    areas = np.bincount(places.ravel(), minlength=count)
    present = [entry for entry in legend if areas[entry[0] - first]]
    return sorted(present, key=lambda entry: -areas[entry[0] - first])


def _shrink(image: Image.Image, places: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    factor = math.sqrt(MAX_OVERLAY_PIXELS / (image.width * image.height))
    width, height = max(1, int(factor * image.width)), max(1, int(factor * image.height))
    return image.resize((width, height), Image.Resampling.BILINEAR), resize_labels(places, (height, width))


def _paint(
    image: Image.Image, places: np.ndarray, colors: np.ndarray, known: np.ndarray, alpha: float
) -> Image.Image:
    """Blend in `colors` (n, 3) uint8 where `known` (n,) bool, both looked up by `places` (H, W)."""
    inside, edges = known[places], _outlines(places)
    blended = Image.blend(image, Image.fromarray(colors[places]), alpha)
    blended = Image.composite(blended, image, Image.fromarray(inside))
    dark = Image.fromarray((OUTLINE_SHADE * colors).astype(np.uint8)[places])
    return Image.composite(dark, blended, Image.fromarray(inside & edges))


def _outlines(places: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels whose right or lower neighbor is another's; wider on large images."""
    edges = np.zeros(places.shape, dtype=bool)
    for step in range(1, 2 + max(places.shape) // 1200):
        edges[:, :-step] |= places[:, :-step] != places[:, step:]
        edges[:-step] |= places[:-step] != places[step:]
    return edges
