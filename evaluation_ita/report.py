"""Scores as files: `results.json` for programs, `results.md` for people.

A score that was not measured (nan) is null in JSON and a dash in the table; it is never written as a number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation_ita.door import write_files

# Column title -> key of `ConfusionMatrix.compute`.
SEMANTIC_COLUMNS = {
    "mIoU": "miou",
    "mIoU seen": "miou_seen",
    "mIoU unseen": "miou_unseen",
    "fwIoU": "fwiou",
    "mAcc": "macc",
    "pAcc": "pacc",
}


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A GitHub Markdown table; floats are scores in [0, 1] and are shown as percentages with two decimals."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join("| " + " | ".join(_cell(value) for value in line) + " |\n" for line in lines)


def summary_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One row a benchmark, in Markdown; `results` as for `results_markdown`."""
    titles = ["benchmark", "images", "classes counted", *SEMANTIC_COLUMNS]
    rows = [
        [
            name,
            scores["num_images"],
            f"{scores['num_classes_counted']} of {len(scores['classes'])}",
            *(scores.get(key, math.nan) for key in SEMANTIC_COLUMNS.values()),
        ]
        for name, scores in results.items()
    ]
    return markdown_table(titles, rows)


def results_markdown(model: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole report: the summary, then the IoU of every class that was counted, best first.

    Args:
        model: what was evaluated, as given by the user.
        results: benchmark name -> scores of `ConfusionMatrix.compute` with `num_images`, and `classes`: list of
            {"name": str, "iou": float, "seen": bool or None}.
    """
    text = f"# Results of `{model}`\n\nScores in per cent.\n\n" + summary_table(results)
    for name, scores in results.items():
        words = {True: "seen", False: "unseen", None: "-"}
        counted = [entry for entry in scores["classes"] if not math.isnan(entry["iou"])]
        counted.sort(key=lambda entry: -entry["iou"])
        text += f"\n## {name}: IoU of each class\n\n"
        text += markdown_table(
            ["class", "masks in training", "IoU"],
            [[entry["name"], words[entry["seen"]], entry["iou"]] for entry in counted],
        )
    return text


def write_results(output: Path, model: str, results: Mapping[str, Mapping[str, Any]]) -> tuple[Path, Path]:
    """Writes `results.json` and `results.md` under `output` (made if missing), whole or not at all.

    Returns:
        the two paths.
    """
    json_path, markdown_path = output / "results.json", output / "results.md"
    document = {"model": model, "benchmarks": _plain(results)}
    write_files(
        {
            json_path: (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode(),
            markdown_path: results_markdown(model, results).encode(),
        }
    )
    return json_path, markdown_path


def _cell(value: Any) -> str:
    if isinstance(value, (float, np.floating)):
        return "-" if math.isnan(value) else f"{100 * value:.2f}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _plain(value: Any) -> Any:
    """What JSON can hold: arrays as lists, nan as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return None if math.isnan(value) else float(value)
    return int(value) if isinstance(value, np.integer) else value
