"""Which classes are taken for which others: the worst entries of a confusion matrix.

Rows of a matrix are compared by their shares of the row's pixels, so rare classes are as visible as frequent ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_CLASSES_DRAWN = 40
MIN_SHARE_OF_MEAN = 0.01
"""Classes with fewer of the mean class's pixels are too small to be called confused."""


@dataclass(frozen=True)
class Confusion:
    """Pixels of one class (index) predicted as another, and their share of the reference class's, in (0, 1]."""

    reference: int
    prediction: int
    pixels: int
    share: float

    def text(self, names: Sequence[str]) -> str:
        """Format as one line: "wall -> building: 13.2 % of wall's pixels"."""
        reference, prediction = names[self.reference], names[self.prediction]
        return f"{reference} -> {prediction}: {100 * self.share:.1f} % of {reference}'s pixels"


def worst_confusions(matrix: np.ndarray, count: int, by: str) -> list[Confusion]:
    """Return the largest confusions of a matrix (K, K), worst first; equal ones in the order of the classes.

    They are compared by "pixels", or by their "share" of the reference class's pixels, which leaves out classes with
    less than a hundredth of the mean class's pixels.
    """
    if by not in ("pixels", "share"):
        raise ValueError(f"by must be 'pixels' or 'share', got {by!r}")
    pixels = matrix.sum(1)
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    if by == "share":
        wrong[pixels < MIN_SHARE_OF_MEAN * pixels.sum() / max(1, np.count_nonzero(pixels))] = 0
    shares = wrong / np.maximum(pixels, 1)[:, None]
    rows, columns = np.nonzero(wrong)
    keys = (wrong if by == "pixels" else shares)[rows, columns]
    order = np.argsort(-keys, kind="stable")[:count]
    return [
        Confusion(int(row), int(column), int(wrong[row, column]), float(shares[row, column]))
        for row, column in zip(rows[order], columns[order], strict=True)
    ]


def classes_to_draw(matrix: np.ndarray, limit: int = MAX_CLASSES_DRAWN) -> list[int]:
    """Return the classes that have pixels, or, if those are more than `limit`, the most confused ones.

    The latter come pair by pair, so that classes taken for each other stand together.
    """
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
