"""What is taken for what: a confusion matrix as an image, and its worst entries as text.

The matrix is `ConfusionMatrix.matrix`: (K, K) pixel counts, row = reference class, column = predicted class. Each row
is shown in per cent of its own pixels, so that rare classes are as visible as frequent ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MAX_CLASSES_DRAWN = 40
MIN_SHARE_OF_MEAN = 0.01  # classes with fewer of the mean class's pixels say too little to be called confused
CELL, MARGIN, LABEL_SIZE, NUMBER_SIZE, MAX_LABEL_CHARACTERS = 30, 16, 15, 13, 26
PAPER, INK, QUIET_INK, GRID = (255, 255, 255), (24, 24, 24), (110, 110, 110), (226, 226, 226)
HIT_COLOR, MISS_COLOR = (31, 97, 168), (196, 62, 28)  # of a cell that holds the whole row
REST = "all others"


@dataclass(frozen=True)
class Confusion:
    """Pixels of one class that were taken for another.

    Attributes:
        reference, prediction: class indices, never the same.
        pixels: how many.
        share: of the reference class's pixels, in (0, 1].
    """

    reference: int
    prediction: int
    pixels: int
    share: float

    def text(self, names: Sequence[str]) -> str:
        """One line: "wall -> building: 13.2 % of wall's pixels"."""
        truth, taken_for = names[self.reference], names[self.prediction]
        return f"{truth} -> {taken_for}: {100 * self.share:.1f} % of {truth}'s pixels"


def worst_confusions(matrix: np.ndarray, count: int, by: str) -> list[Confusion]:
    """The largest confusions, worst first; what is equal is in the order of the classes.

    Args:
        matrix: (K, K) pixel counts.
        count: at most so many.
        by: "pixels", or "share" of the reference class's pixels; the latter leaves out classes with less than a
            hundredth of the mean class's pixels.

    Raises:
        ValueError: if `matrix` is not square or `by` is something else.
    """
    matrix = _square(matrix)
    if by not in ("pixels", "share"):
        raise ValueError(f"by must be 'pixels' or 'share', got {by!r}")
    pixels = matrix.sum(1)
    misses = matrix.copy()
    np.fill_diagonal(misses, 0)
    if by == "share":
        misses[pixels < MIN_SHARE_OF_MEAN * pixels.sum() / max(1, np.count_nonzero(pixels))] = 0
    shares = misses / np.maximum(pixels, 1)[:, None]
    rows, columns = np.nonzero(misses)
    keys = (misses if by == "pixels" else shares)[rows, columns]
    order = np.argsort(-keys, kind="stable")[:count]
    return [
        Confusion(int(row), int(column), int(misses[row, column]), float(shares[row, column]))
        for row, column in zip(rows[order], columns[order], strict=True)
    ]


def classes_to_draw(matrix: np.ndarray, limit: int = MAX_CLASSES_DRAWN) -> list[int]:
    """Indices of the classes that matter: all that have pixels, or, if those are too many, the most confused ones.

    The latter come pair by pair, so that classes taken for each other stand together.
    """
    matrix = _square(matrix)
    present = np.flatnonzero(matrix.sum(0) + matrix.sum(1))
    if len(present) <= limit:
        return present.tolist()
    chosen: dict[int, None] = {}
    for confusion in worst_confusions(matrix, limit * limit, "share"):
        pair = dict.fromkeys((confusion.reference, confusion.prediction))
        if len(chosen | pair) > limit:
            break
        chosen |= pair
    return list(chosen) or present[:limit].tolist()


def confusion_image(matrix: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Draws the confusion matrix: rows are reference classes, columns predicted ones, numbers per cent of the row.

    Args:
        matrix: (K, K) pixel counts, any K.
        names: (K,) class names.

    Returns:
        an RGB image with at most 40 classes; if some are left out, a last column holds the rest of each row.

    Raises:
        ValueError: if the matrix is not square or `names` is not as long.
    """
    matrix = _square(matrix)
    if len(names) != len(matrix):
        raise ValueError(f"{len(names)} names for a confusion matrix of {len(matrix)} classes")
    chosen = classes_to_draw(matrix)
    totals = matrix.sum(1)[chosen]
    cells = matrix[np.ix_(chosen, chosen)]
    present = int(np.count_nonzero(matrix.sum(0) + matrix.sum(1)))
    title = f"{len(chosen)} classes"
    columns = [_short(names[index]) for index in chosen]
    rows = list(columns)
    if len(chosen) < present:
        title = f"The {len(chosen)} most confused of {present} classes"
        cells, columns = np.column_stack([cells, totals - cells.sum(1)]), [*columns, REST]
    shares = cells / np.maximum(totals, 1)[:, None]
    return _draw(shares, totals > 0, rows, columns, f"Rows: the reference. Columns: what was said. {title}.")


def _square(matrix: np.ndarray) -> np.ndarray:
    matrix = np.asarray(matrix)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"a confusion matrix is (K, K), got {matrix.shape}")
    return matrix.astype(np.int64)


def _short(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= MAX_LABEL_CHARACTERS else name[: MAX_LABEL_CHARACTERS - 1].rstrip() + "…"


def _draw(
    shares: np.ndarray, known: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str
) -> Image.Image:
    """`shares` (R, C) in [0, 1]; rows that are not `known` (R,) have no pixels and stay blank."""
    font, number_font = ImageFont.load_default(LABEL_SIZE), ImageFont.load_default(NUMBER_SIZE)
    left = round(max([font.getlength(name) for name in rows], default=0)) + 2 * MARGIN
    top = round(max([font.getlength(name) for name in columns], default=0)) + 3 * MARGIN + 2 * LABEL_SIZE
    width = max(left + CELL * len(columns), round(font.getlength(title)) + MARGIN) + MARGIN
    canvas = Image.new("RGB", (width, top + CELL * len(rows) + MARGIN), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN), title, fill=INK, font=font)
    draw.text((MARGIN, MARGIN + 1.4 * LABEL_SIZE), "Numbers: per cent of the row.", fill=QUIET_INK, font=font)
    for row, name in enumerate(rows):
        place = (left - MARGIN // 2, top + CELL * row + CELL // 2)
        draw.text(place, name, fill=INK if known[row] else QUIET_INK, font=font, anchor="rm")
    for column, name in enumerate(columns):
        _upright_text(canvas, (left + CELL * column + CELL // 2, top - MARGIN // 2), name, font)
    for row, column in np.ndindex(shares.shape):
        x, y, share = left + CELL * column, top + CELL * row, float(shares[row, column])
        hit = row == column
        fill = _blend(HIT_COLOR if hit else MISS_COLOR, share)
        draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), fill=fill, outline=GRID)
        if known[row] and (share >= 0.005 or hit):
            ink = INK if sum(fill) > 430 else PAPER
            place = (x + CELL // 2, y + CELL // 2)
            draw.text(place, f"{100 * share:.0f}", fill=ink, font=number_font, anchor="mm")
    return canvas


def _blend(color: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    """Paper at 0, `color` at 1; small shares are made visible by a square root."""
    weight = share**0.5
    red, green, blue = (round(255 + (part - 255) * weight) for part in color)
    return red, green, blue


def _upright_text(
    canvas: Image.Image, foot: tuple[int, int], text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont
) -> None:
    """Text that runs upwards from `foot` (x of its middle, y of its start)."""
    mask = Image.new("L", (max(1, round(font.getlength(text))), round(1.4 * LABEL_SIZE)))
    ImageDraw.Draw(mask).text((0, mask.height // 2), text, fill=255, font=font, anchor="lm")
    mask = mask.rotate(90, expand=True)
    canvas.paste(INK, (foot[0] - mask.width // 2, foot[1] - mask.height), mask)
