"""The figures of a report, by matplotlib: a confusion matrix, and a bar for each class.

Rows of a confusion matrix are compared by their shares of the row's pixels, so rare classes are as visible as others.
"""

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from ita_segmentation.evaluation.reporting.score_tables import class_title, counted_classes, score_of

TRUE_COLOR, FALSE_COLOR, MUTED = "#1f61a8", "#c43e1c", "#6e6e6e"
GROUP_COLORS = {True: "#1f61a8", False: "#c2541d", None: "#1f61a8"}
GROUP_TITLES = {True: "seen", False: "unseen", None: None}
MEANS = {"iou": "miou", "acc": "macc", "pq": "pq", "sq": "sq", "rq": "rq", "ap": "ap"}
MAX_NAMED_BARS = 90
MAX_NAME_CHARACTERS = 26
DPI = 100
MAX_CLASSES_DRAWN = 40
MIN_SHARE_OF_MEAN = 0.01  # classes with fewer of the mean class's pixels are too small to be called confused


class Confusion(NamedTuple):
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
    """Return the classes that have pixels, or, if those are more than `limit`, the most confused ones, pair by pair."""
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


def confusion_figure(matrix: np.ndarray, names: Sequence[str]) -> Figure:
    """Draw a confusion matrix of at most 40 classes, in percent of each row; a last column holds the rest of it."""
    chosen = classes_to_draw(matrix)
    present = int(np.count_nonzero(matrix.sum(0) + matrix.sum(1)))
    totals = matrix.sum(1)[chosen]
    cells = matrix[np.ix_(chosen, chosen)]
    rows = [_short(names[index]) for index in chosen]
    columns, title = list(rows), f"{len(chosen)} classes"
    if len(chosen) < present:
        title = f"The {len(chosen)} most confused of {present} classes"
        cells, columns = np.column_stack([cells, totals - cells.sum(1)]), [*columns, "all others"]
    shares = cells / np.maximum(totals, 1)[:, None]

    figure = Figure(figsize=(2 + 0.3 * len(columns), 2 + 0.3 * len(rows)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    target = np.where(np.eye(len(rows), len(columns))[..., None] > 0, to_rgb(TRUE_COLOR), to_rgb(FALSE_COLOR))
    colors = 1 + np.sqrt(shares)[..., None] * (target - 1)  # the square root makes small shares visible
    axes.pcolormesh(range(len(columns)), range(len(rows)), colors, edgecolors="#e2e2e2", linewidth=0.5)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    for row, column in np.ndindex(shares.shape):
        share = shares[row, column]
        if totals[row] and (share >= 0.005 or row == column):
            ink = "white" if share > 0.35 else "black"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=ink, fontsize=8)
    axes.set_xticks(range(len(columns)), columns, rotation=90, parse_math=False)
    axes.set_yticks(range(len(rows)), rows, parse_math=False)
    for label, total in zip(axes.get_yticklabels(), totals, strict=True):
        label.set_color("black" if total else MUTED)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0, labelsize=9)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("reference class")
    axes.set_title(f"{title}, percent of each row", fontsize=10)
    return figure


def class_figure(results: Mapping[str, Any]) -> Figure | None:
    """Draw a bar for the first score of each class of a benchmark, best first; None if no class has one."""
    classes = results["classes"]
    column = class_title(classes)
    if column is None:
        return None
    title, key = column
    bars = [entry for entry in counted_classes(classes) if not np.isnan(score_of(entry, key))]
    if not bars:
        return None
    scores = [100 * score_of(entry, key) for entry in bars]
    figure = Figure(figsize=(min(12.0, 2 + 0.3 * len(bars)), 3.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for group in (True, False, None):
        places = [place for place, entry in enumerate(bars) if entry.get("seen") is group]
        if places:
            heights = [scores[place] for place in places]
            axes.bar(places, heights, 0.8, color=GROUP_COLORS[group], label=GROUP_TITLES[group])
    mean = 100 * score_of(results, MEANS[key])
    if not np.isnan(mean):
        axes.axhline(mean, color="black", linestyle="--", linewidth=1, label=f"mean {mean:.2f}")
    if len(bars) <= MAX_NAMED_BARS:
        names = [_short(str(entry["name"])) for entry in bars]
        axes.set_xticks(range(len(bars)), names, rotation=90, fontsize=8, parse_math=False)
    else:
        axes.set_xticks([])
        axes.set_xlabel(f"{len(bars)} classes, best first")
    axes.set(ylabel=f"{title}, percent", ylim=(0, 100), xlim=(-0.6, len(bars) - 0.4))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    return figure


def png_of(figure: Figure) -> bytes:
    """Render a figure as the content of a PNG file."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # names may be in any script
        figure.savefig(content, format="png")
    return content.getvalue()


def _short(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= MAX_NAME_CHARACTERS else name[: MAX_NAME_CHARACTERS - 1].rstrip() + "…"
