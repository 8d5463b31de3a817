"""The tables of a report: titles and rows, the same for Markdown, HTML and CSV.

In rows a float is a score in [0, 1] (NaN: not measured), an int a number, and everything else is shown as text.
`results` is always benchmark name -> what `BenchmarkScores.results` returns, with `settings`.

Scores of other systems, never measured here, are in `published_scores.json`: image tower, source (empty where that is
not recorded), and benchmark -> key of the results -> percent, as printed. All were trained on COCO's masks. Scores on
other protocols (such as Pascal VOC with a background made of Pascal Context's classes) are not listed, since no
benchmark here measures the same.
"""

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Results = Mapping[str, Mapping[str, Any]]

SCORE_COLUMNS: dict[str, dict[str, str]] = {
    "semantic": {
        "mIoU": "miou",
        "mIoU seen": "miou_seen",
        "mIoU unseen": "miou_unseen",
        "mIoU with predicted": "miou_with_predicted",
        "fwIoU": "fwiou",
        "mAcc": "macc",
        "pAcc": "pacc",
    },
    "panoptic": {
        "PQ": "pq",
        "SQ": "sq",
        "RQ": "rq",
        "PQ things": "pq_things",
        "PQ stuff": "pq_stuff",
        "PQ seen": "pq_seen",
        "PQ unseen": "pq_unseen",
    },
    "instance": {
        "AP": "ap",
        "AP50": "ap50",
        "AP75": "ap75",
        "APs": "aps",
        "APm": "apm",
        "APl": "apl",
        "AP seen": "ap_seen",
        "AP unseen": "ap_unseen",
    },
}
"""Task -> column title -> key of the results."""

TASK_TITLES = {
    "semantic": "Semantic segmentation",
    "panoptic": "Panoptic segmentation",
    "instance": "Instance segmentation",
}
CLASS_TITLES = {"IoU": "iou", "accuracy": "acc", "PQ": "pq", "SQ": "sq", "RQ": "rq", "AP": "ap"}
"""Column title -> key of a class's scores."""
HEADLINES = {"mIoU": "miou", "PQ": "pq", "AP": "ap"}  # the scores that others publish

MIOU_NOTE = (
    "mIoU is the mean over the classes with ground truth (as in detectron2's main branch and, as far as they say, in "
    "published tables); “mIoU with predicted” also counts classes that are only predicted, with IoU 0 (as in "
    "detectron2 0.6)."
)
MARK = "published by the authors, not measured here"
VALIDATION_IMAGES = {
    "ade20k-150": 2000,
    "ade20k-847": 2000,
    "pascal-context-59": 5104,
    "pascal-context-459": 5104,
    "pascal-voc-20": 1449,
    "pascal-voc-21": 1449,
    "coco-panoptic": 5000,
    "cityscapes": 500,
}
"""Size of each benchmark's validation set: scores on fewer images are not comparable."""
MAX_SETTING_CHARACTERS = 200  # in tables; results.json has all of them


class PublishedSystem(NamedTuple):
    """A system, its image encoder, and what its authors report: benchmark -> "miou", "pq", "ap" -> percent."""

    name: str
    image_tower: str
    source: str
    scores: Mapping[str, Mapping[str, float]]


@lru_cache
def published_systems() -> tuple[PublishedSystem, ...]:
    """Read the published scores."""
    content = json.loads(Path(__file__).with_name("published_scores.json").read_text(encoding="utf-8"))
    return tuple(PublishedSystem(**system) for system in content)


class ScoreTable(NamedTuple):
    """A table: its title, the titles of its columns, and rows as long as those."""

    title: str
    columns: list[str]
    rows: list[list[Any]]


def cell_text(value: Any) -> str:
    """Format a cell: scores as percent with two decimals, a dash for what was not measured."""
    if value is None:
        return "-"
    if isinstance(value, (float, np.floating)):
        return "-" if math.isnan(value) else f"{100 * value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def setting_text(value: Any) -> str:
    """Format a setting, cut off if it is long."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_SETTING_CHARACTERS else text[: MAX_SETTING_CHARACTERS - 1] + "…"


def score_of(scores: Mapping[str, Any], key: str) -> float:
    """Return a score as a Python float; NaN where there is none."""
    value = scores.get(key)
    return math.nan if value is None else float(value)


def tasks_of(scores: Mapping[str, Any]) -> list[str]:
    """Return the tasks of a benchmark that were scored."""
    return [task for task, columns in SCORE_COLUMNS.items() if any(key in scores for key in columns.values())]


def summary_tables(results: Results) -> list[ScoreTable]:
    """Make one table a task, one row a benchmark; columns without a number are left out."""
    tables: list[ScoreTable] = []
    for task, columns in SCORE_COLUMNS.items():
        scored = {name: scores for name, scores in results.items() if task in tasks_of(scores)}
        if not scored:
            continue
        headline = next(iter(columns))
        kept = {
            title: key
            for title, key in columns.items()
            if title == headline or any(not math.isnan(score_of(scores, key)) for scores in scored.values())
        }
        rows: list[list[Any]] = []
        for name, scores in scored.items():
            counted = scores.get(f"{task}_num_classes_counted", scores.get("num_classes_counted", 0))
            extent = [int(scores["num_images"]), f"{counted} of {len(scores['classes'])}"]
            rows.append([name, *extent, *(score_of(scores, key) for key in kept.values())])
        tables.append(ScoreTable(TASK_TITLES[task], ["benchmark", "images", "classes counted", *kept], rows))
    return tables


def published_table(results: Results) -> ScoreTable | None:
    """Put this model beside what others published for the same benchmarks and scores; None if nobody did."""
    rows: list[list[Any]] = []
    for name, scores in results.items():
        for title, key in HEADLINES.items():
            published = [system.scores.get(name, {}).get(key) for system in published_systems()]
            if key in scores and any(value is not None for value in published):
                texts = ["-" if value is None else f"{value:.1f}" for value in published]
                rows.append([name, title, score_of(scores, key), *texts])
    shown = [i for i, _ in enumerate(published_systems()) if any(row[3 + i] != "-" for row in rows)]
    if not shown:
        return None
    systems = [published_systems()[i] for i in shown]
    titles = [f"published: {', '.join(filter(None, system[:3]))}" for system in systems]
    rows = [[*row[:3], *(row[3 + i] for i in shown)] for row in rows]
    return ScoreTable("Published scores", ["benchmark", "score", "measured here", *titles], rows)


def comparison_note(results: Results) -> str:
    """Name the benchmarks that were not scored on the whole validation set; "" if all were."""
    partial = [
        f"{name} ({scores['num_images']:,} images, not {VALIDATION_IMAGES[name]:,})"
        for name, scores in results.items()
        if scores["num_images"] != VALIDATION_IMAGES.get(name, scores["num_images"])
    ]
    if not partial:
        return ""
    return f"Not comparable with scores on the whole validation set: {', '.join(partial)}."


def class_title(classes: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    """Return title and key of the first score that classes have; None if they have none."""
    return next((column for column in CLASS_TITLES.items() if any(column[1] in e for e in classes)), None)


def counted_classes(classes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the classes that have a score, best first (by the first score that classes have)."""
    column = class_title(classes)
    if column is None:
        return []
    keys = CLASS_TITLES.values()
    counted = [entry for entry in classes if any(not math.isnan(score_of(entry, key)) for key in keys)]
    return sorted(counted, key=lambda entry: -np.nan_to_num(score_of(entry, column[1]), nan=-1.0))


def class_table(classes: Sequence[Mapping[str, Any]], chosen: Sequence[Mapping[str, Any]]) -> ScoreTable:
    """Make a table of the `chosen` classes, in their order; columns that none of `classes` has are left out."""
    flags = {
        "masks in training": ("seen", {True: "seen", False: "unseen", None: "-"}),
        "kind": ("is_thing", {True: "thing", False: "stuff", None: "-"}),
    }
    flags = {title: flag for title, flag in flags.items() if any(e.get(flag[0]) is not None for e in classes)}
    keys = {title: key for title, key in CLASS_TITLES.items() if any(key in e for e in classes)}
    rows = [
        [
            entry["name"],
            *(score_of(entry, key) for key in keys.values()),
            *(texts[entry.get(key)] for key, texts in flags.values()),
        ]
        for entry in chosen
    ]
    return ScoreTable("Each class", ["class", *keys, *flags], rows)
