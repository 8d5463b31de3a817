"""How cost grows with the image's area, the names, the queries and the batch: seconds, memory, and exponents.

Each point is measured in a process of its own (`measure.py`). Writes `growth.json`, `growth.md` and `growth.png`. An
exponent is the slope of a straight line through the points in log-log scale: 1 is proportional, 0 is independent.
"""

import argparse
import datetime
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from measure import STAGES
from speed import machine, run
from tqdm import tqdm

SIDE, CLASSES, QUERIES, BATCH = 512, 150, 200, 1
POINTS: dict[str, list[int]] = {
    "area": [256, 512, 768, 1024],
    "names": [20, 150, 847, 10_000],
    "queries": [100, 200, 400],
    "batch": [1, 2, 4],
}
LABELS = {
    "area": "area of the image, pixels",
    "names": "names in the vocabulary",
    "queries": "queries",
    "batch": "images in a batch",
}


def settings(axis: str, value: int) -> dict[str, Any]:
    """Arguments of `run` for one point of an axis; the other axes stay at 512 x 512, 150 classes, 200 queries, 1."""
    side = value if axis == "area" else SIDE
    chosen = {"queries": QUERIES, "batch": BATCH} | ({axis: value} if axis in ("queries", "batch") else {})
    return {"size": (side, side), "classes": value if axis == "names" else CLASSES, **chosen}


def place(axis: str, result: dict[str, Any]) -> float:
    """Where a result stands on an axis."""
    return result["height"] * result["width"] if axis == "area" else result[axis]


def exponent(points: list[tuple[float, float]]) -> float:
    """Slope of the least-squares line through (x, y) in log-log scale."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread


def quantities(result: dict[str, Any]) -> dict[str, float]:
    """What is drawn of a result: seconds of the backbone, of all after it and of its parts, and GiB above the model."""
    seconds = result["seconds"]
    after = seconds["total"] - seconds["backbone"]
    stages = {stage: seconds[stage] for stage in STAGES if stage not in ("backbone", "dcu")}
    return {
        "backbone": seconds["backbone"],
        "after the backbone": after,
        **stages,
        "GiB": result["peak_bytes"] / 2**30,
    }


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Exponents as a Markdown table, a row for each axis."""
    names = list(quantities(next(iter(results.values()))[0]))
    lines = [f"| grows with | {' | '.join(names)} |", "|" + " --- |" * (len(names) + 1)]
    for axis, rows in results.items():
        cells = [
            f"{exponent([(place(axis, row), max(quantities(row)[name], 1e-6)) for row in rows]):.2f}"
            for name in names
        ]
        lines.append(f"| {LABELS[axis]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A column for each axis: seconds above, memory below."""
    figure = Figure(figsize=(4.4 * len(results), 8), layout="tight")
    axes = figure.subplots(2, len(results), sharey="row", squeeze=False)
    for column, (axis, rows) in enumerate(results.items()):
        x = [place(axis, row) for row in rows]
        for name in quantities(rows[0]):
            y = [quantities(row)[name] for row in rows]
            label = f"{name}, exponent {exponent(list(zip(x, (max(v, 1e-6) for v in y), strict=True))):.2f}"
            below = name == "GiB"
            thick = name in ("backbone", "after the backbone", "GiB")
            axes[int(below)][column].plot(x, y, "o-" if thick else ".--", lw=2 if thick else 1, label=label)
        for row, panel in enumerate(axes[:, column]):
            panel.set(xscale="log", yscale="log", xlabel=LABELS[axis])
            panel.set_ylabel(("seconds", "GiB above the model")[row] if column == 0 else "")
            panel.grid(alpha=0.3)
            panel.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncols=2 - row)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clip", default="convnext_large_d_320", help="open_clip's name of the frozen CLIP")
    parser.add_argument("--axes", nargs="+", choices=list(POINTS), default=list(POINTS))
    parser.add_argument("--repeats", type=int, default=3, help="warm calls, of which the middle one counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("outputs/growth"), help="a folder")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, Any]]] = {axis: [] for axis in args.axes}
    done: dict[str, dict[str, Any]] = {}
    points = [(axis, value) for axis in args.axes for value in POINTS[axis]]
    for axis, value in tqdm(points, unit="measurement"):
        chosen = settings(axis, value)
        key = json.dumps(chosen)
        if key not in done:  # the axes meet in one point
            try:
                done[key] = run(args.clip, repeats=args.repeats, threads=args.threads, **chosen)
            except RuntimeError as error:
                sys.exit(f"growth.py: {error}")
        results[axis].append(done[key])
    about = {"machine": machine(args.threads), "date": datetime.date.today().isoformat(), "clip": args.clip}
    (args.output / "growth.json").write_text(json.dumps(about | {"results": results}, indent=2) + "\n")
    draw(results, args.output / "growth.png")
    text = f"{table(results)}\n*{about['machine']}, {about['clip']}, {about['date']}.*\n"
    (args.output / "growth.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
