"""A bar for each class as inline SVG, best first: where the mean comes from."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ita_segmentation.evaluation.reporting.score_tables import (
    CLASS_COLUMNS,
    counted_classes,
    main_class_column,
    score_of,
)

WIDTH, HEIGHT, LEFT, TOP = 1134, 210, 34, 12
MIN_LABELLED_BAR = 13  # pixels that a name needs
LABEL_ROOM, MAX_LABEL_CHARACTERS = 142, 18
GROUPS = {True: "seen", False: "unseen", None: "plain"}


def class_chart(classes: Sequence[Mapping[str, Any]]) -> str:
    """A chart of the first score that classes have; "" if none has one.

    Names stand under the bars where there is room; a bar under the pointer is named beneath the chart.
    """
    title = main_class_column(classes)
    key = CLASS_COLUMNS[title] if title else ""
    bars = [entry for entry in counted_classes(classes) if not math.isnan(score_of(entry, key))]
    if not bars:
        return ""
    step = min(40.0, (WIDTH - LEFT) / len(bars))
    labelled = step >= MIN_LABELLED_BAR
    width, height = LEFT + step * len(bars), TOP + HEIGHT + (LABEL_ROOM if labelled else 8)
    parts = [
        _grid(width),
        *(_bar(entry, score_of(entry, key), place, step) for place, entry in enumerate(bars)),
    ]
    if labelled:
        parts += [_label(str(entry["name"]), place, step) for place, entry in enumerate(bars)]
    mean = sum(score_of(entry, key) for entry in bars) / len(bars)
    y = TOP + HEIGHT * (1 - mean)
    parts.append(f'<line class="mean" x1="{LEFT}" x2="{width:.1f}" y1="{y:.1f}" y2="{y:.1f}"></line>')
    groups = {entry.get("seen") for entry in bars}
    keys = "".join(
        f'<span class="{GROUPS[group]}">{GROUPS[group]}</span>' for group in (True, False) if group in groups
    )
    legend = f'<span class="mean">mean {100 * mean:.2f}</span>{keys}'
    return (
        f'<div class="chart"><p class="keys">{title}, per cent {legend}</p><div class="scroll">'
        f'<svg viewBox="0 0 {width:.1f} {height}" style="max-width:{width:.0f}px" role="img" '
        f'aria-label="{title} of each class, best first">{"".join(parts)}</svg></div>'
        "<output>Point at a bar for its class.</output></div>\n"
    )


def _grid(width: float) -> str:
    lines = ""
    for per_cent in (0, 25, 50, 75, 100):
        y = TOP + HEIGHT * (1 - per_cent / 100)
        lines += f'<line class="grid" x1="{LEFT}" x2="{width:.1f}" y1="{y:.1f}" y2="{y:.1f}"></line>'
        lines += f'<text class="axis" x="{LEFT - 6}" y="{y + 4:.1f}">{per_cent}</text>'
    return lines


def _bar(entry: Mapping[str, Any], score: float, place: int, step: float) -> str:
    """The visible bar, and over its whole column an invisible one that knows its name."""
    x, height = LEFT + step * place, HEIGHT * score
    gap = min(3.0, 0.2 * step)
    name = html.escape(" ".join(str(entry["name"]).split()), quote=True)
    return (
        f'<g data-name="{name}: {100 * score:.2f}">'
        f'<rect class="{GROUPS[entry.get("seen")]}" x="{x:.2f}" y="{TOP + HEIGHT - height:.2f}" '
        f'width="{step - gap:.2f}" height="{max(height, 0.6):.2f}"></rect>'
        f'<rect class="area" x="{x:.2f}" y="{TOP}" width="{step:.2f}" height="{HEIGHT}"></rect></g>'
    )


def _label(name: str, place: int, step: float) -> str:
    name = " ".join(name.split())
    if len(name) > MAX_LABEL_CHARACTERS:
        name = name[: MAX_LABEL_CHARACTERS - 1].rstrip() + "…"
    x, y = LEFT + step * (place + 0.5), TOP + HEIGHT + 8
    return f'<text class="name" transform="translate({x + 3:.1f} {y}) rotate(-90)">{html.escape(name)}</text>'
