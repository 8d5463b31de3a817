"""Curves as inline SVG with the values under the pointer, in one HTML page that needs nothing else."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ita_segmentation.evaluation.reporting.html_report import text

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 190, 52, 10, 8, 22
COLORS = 10  # of the style sheet; further curves have a colour of these again, dashed
LOG_RATIO = 50.0  # between the largest and the smallest value, from which a logarithmic axis reads better


@dataclass(frozen=True)
class Curve:
    """One line of a chart: `values[i]` at `steps[i]`, steps rising."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True)
class Scale:
    """Where values are drawn.

    Attributes:
        low, high: at the edges.
        start, size: coordinate of `low`, and from there to `high`, in pixels.
        is_log: logarithmic; then `low` and `high` are positive.
    """

    low: float
    high: float
    start: float
    size: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.is_log else (self.low, self.high)
        value = math.log(value) if self.is_log else value
        return self.start + self.size * (value - low) / (high - low)


def downsample(steps: Sequence[int], values: Sequence[float], most: int) -> list[int]:
    """Indices of at most `most` points: the first, the last, and the least and greatest of equal stretches between.

    Args:
        most: at least 4.
    """
    count = len(steps)
    if count <= most:
        return list(range(count))
    stretches = (most - 2) // 2
    kept = {0, count - 1}
    for stretch in range(stretches):
        places = range(1 + (count - 2) * stretch // stretches, 1 + (count - 2) * (stretch + 1) // stretches)
        kept.add(min(places, key=values.__getitem__))
        kept.add(max(places, key=values.__getitem__))
    return sorted(kept)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [place * step for place in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two numbers, at most six."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    return [10.0**power for power in range(first, last + 1, max(1, -(-(last - first) // 5)))]


def line_chart(title: str, note: str, curves: Sequence[Curve], most_points: int, is_log: bool = False) -> str:
    """A chart of all curves on the same axes; "" if no curve has a point.

    Args:
        title, note: any text.
        most_points: of each curve.
        is_log: a logarithmic axis, where all values are positive and far apart.
    """
    curves = [curve for curve in curves if curve.steps]
    if not curves:
        return ""
    values = [value for curve in curves for value in curve.values]
    low, high = min(values), max(values)
    is_log = is_log and low > 0 and high > LOG_RATIO * low
    down, across = _scales(
        low, high, [curve.steps[0] for curve in curves], [c.steps[-1] for c in curves], is_log
    )
    body = _axes(down, across)
    keys, data = "", []
    for number, curve in enumerate(curves):
        kept = downsample(curve.steps, curve.values, most_points)
        points = [(curve.steps[index], curve.values[index]) for index in kept]
        style = f"c{number % COLORS}" + (" again" if number >= COLORS else "")
        body += _line(points, down, across, style)
        keys += f'<span class="{style}">{text(curve.name)}</span>'
        numbers = [float(f"{value:.6g}") for _, value in points]
        data.append({"name": curve.name, "steps": [step for step, _ in points], "values": numbers})
    edges = {"left": LEFT, "right": WIDTH - RIGHT, "low": across.low, "high": across.high}
    content = text(json.dumps({"edges": edges, "curves": data}, separators=(",", ":")))
    return (
        f'<div class="curves" data-content="{content}"><h3>{text(title)}</h3>'
        f'<p class="remark">{text(note)}{", logarithmic" if is_log else ""}</p><p class="keys">{keys}</p>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT + TOP + BOTTOM}" role="img" aria-label="{text(title)}">{body}'
        f'<line class="pointer" y1="{TOP}" y2="{TOP + HEIGHT}" x1="-9" x2="-9"></line></svg>'
        "<output></output></div>\n"
    )


def _scales(
    low: float, high: float, first: Sequence[int], last: Sequence[int], is_log: bool
) -> tuple[Scale, Scale]:
    """Of values and of steps; neither is of no extent."""
    if high <= low:
        margin = 0.5 * abs(low) or 1.0
        low, high = (low - margin if low else 0.0), high + margin
    elif not is_log and 0 <= low < 0.5 * high:
        low = 0.0
    start, end = min(first), max(last)
    if end <= start:
        start, end = start - 1, end + 1
    return (
        Scale(low, high, TOP + HEIGHT, -HEIGHT, is_log),
        Scale(start, end, LEFT, WIDTH - LEFT - RIGHT),
    )


def _axes(down: Scale, across: Scale) -> str:
    parts = []
    for value in log_ticks(down.low, down.high) if down.is_log else ticks(down.low, down.high):
        y = down(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"></line>')
        parts.append(f'<text class="axis" x="{LEFT - 6}" y="{y + 4:.1f}">{value:.4g}</text>')
    for step in ticks(across.low, across.high):
        if step == int(step):
            parts.append(
                f'<text class="step" x="{across(step):.1f}" y="{TOP + HEIGHT + 16}">{int(step):,}</text>'
            )
    return "".join(parts)


def _line(points: Sequence[tuple[int, float]], down: Scale, across: Scale, style: str) -> str:
    """A line through the points; a lone point, or few, as dots, too."""
    places = [(across(step), down(value)) for step, value in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"></circle>' for x, y in places)
    return f'<g class="{style}"><polyline points="{line}"></polyline>{dots if len(places) <= 40 else ""}</g>'


CURVE_STYLE = """
:root {
  --c0: #1f61a8; --c1: #c2541d; --c2: #1d7a46; --c3: #8a3ea8; --c4: #a8801a;
  --c5: #b3321f; --c6: #16808a; --c7: #5d6570; --c8: #c0417f; --c9: #5a7d1a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --c0: #6fb0f5; --c1: #f0935b; --c2: #5cc98c; --c3: #c58be0; --c4: #dfb74f;
    --c5: #f0806f; --c6: #57c3ce; --c7: #b4bcc6; --c8: #ee86b6; --c9: #a8cf5e;
  }
}
.grid-of-curves {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 8px 34px;
}
.curves h3 { margin: 14px 0 0; }
.remark { margin: 0; color: var(--quiet); font-size: 13px; }
.curves svg { display: block; width: 100%; touch-action: pan-y; }
.curves output { display: block; min-height: 3em; color: var(--quiet); font-size: 13px; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums; }
.curves polyline { fill: none; stroke: currentColor; stroke-width: 1.4; stroke-linejoin: round; }
.curves circle { fill: currentColor; }
.curves .again polyline { stroke-dasharray: 5 3; }
.curves .step { text-anchor: middle; }
.curves .pointer { stroke: var(--quiet); stroke-dasharray: 2 3; }
.curves .keys span::before { background: currentColor; }
.curves .keys span { color: inherit; }
""" + "".join(
    f".curves .c{number}, .curves .keys .c{number}::before {{ color: var(--c{number}); }}\n"
    for number in range(COLORS)
)

CURVE_SCRIPT = """
"use strict";
const nearest = (steps, wanted) => {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] < wanted) low = middle; else high = middle;
  }
  return wanted - steps[low] <= steps[high] - wanted ? low : high;
};
for (const chart of document.querySelectorAll(".curves")) {
  const { edges, curves } = JSON.parse(chart.dataset.content);
  const svg = chart.querySelector("svg"), pointer = chart.querySelector(".pointer");
  const output = chart.querySelector("output");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
    const share = (x - edges.left) / (edges.right - edges.left);
    const wanted = edges.low + Math.min(1, Math.max(0, share)) * (edges.high - edges.low);
    const first = curves[0], step = first.steps[nearest(first.steps, wanted)];
    const told = curves.map((curve) => {
      const place = nearest(curve.steps, step), other = curve.steps[place];
      const where = other === step ? "" : ` (step ${other.toLocaleString("en")})`;
      return `${curve.name} ${+curve.values[place].toPrecision(4)}${where}`;
    });
    output.textContent = `step ${step.toLocaleString("en")}: ${told.join(", ")}`;
    const at = edges.left + (step - edges.low) / (edges.high - edges.low) * (edges.right - edges.left);
    pointer.setAttribute("x1", at);
    pointer.setAttribute("x2", at);
  });
}
"""
