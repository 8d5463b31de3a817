"""Which tables a report has: titles and rows, the same for Markdown, HTML and CSV.

In rows a float is a score in [0, 1] (nan: not measured), an int a count, and everything else is shown as it stands.
`results` is always benchmark name -> scores: those of `ConfusionMatrix.compute`, `PanopticQuality.compute` and
`MaskAveragePrecision.compute` that were scored, with `num_images`, `settings` and `classes`, a list of {"name",
"seen", "is_thing", "iou", "acc", "pq", "sq", "rq", "ap"} (flags may be None; scores of tasks that were not scored are
left out).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ita_segmentation.evaluation.reporting.examples import ExampleImage
from ita_segmentation.evaluation.reporting.published_scores import PUBLISHED, VALIDATION_IMAGES

Results = Mapping[str, Mapping[str, Any]]

# Task -> column title -> key of the results.
SCORE_COLUMNS: dict[str, dict[str, str]] = {
    "semantic": {
        **{"mIoU": "miou", "mIoU seen": "miou_seen", "mIoU unseen": "miou_unseen"},
        **{"fwIoU": "fwiou", "mAcc": "macc", "pAcc": "pacc"},
    },
    "panoptic": {
        **{"PQ": "pq", "SQ": "sq", "RQ": "rq", "PQ things": "pq_things", "PQ stuff": "pq_stuff"},
        **{"PQ seen": "pq_seen", "PQ unseen": "pq_unseen"},
    },
    "instance": {
        **{"AP": "ap", "AP50": "ap50", "AP75": "ap75", "APs": "aps", "APm": "apm", "APl": "apl"},
        **{"AP seen": "ap_seen", "AP unseen": "ap_unseen"},
    },
}
TASK_TITLES = {
    "semantic": "Semantic segmentation",
    "panoptic": "Panoptic segmentation",
    "instance": "Instance segmentation",
}
CLASS_KEYS = {"semantic": "iou", "panoptic": "pq", "instance": "ap"}  # what a class's score is called
CLASS_COLUMNS = {"IoU": "iou", "accuracy": "acc", "PQ": "pq", "SQ": "sq", "RQ": "rq", "AP": "ap"}

CONFUSIONS_LISTED = 10
MAX_SETTING_CHARACTERS = 200  # in tables; results.json has them whole


@dataclass(frozen=True)
class Evaluation:
    """What there is to report.

    Attributes:
        model: what was evaluated, as given by the user.
        results: benchmark -> scores.
        confusions, confusion_images: benchmark -> confusion matrix (K, K) with at least one pixel, and its image.
        examples: benchmark -> images to show.
        folders: benchmark -> name of the folder of its files.
        versions: package -> version.
    """

    model: str
    results: Results
    confusions: Mapping[str, np.ndarray]
    confusion_images: Mapping[str, Image.Image]
    examples: Mapping[str, Sequence[ExampleImage]]
    folders: Mapping[str, str]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class ScoreTable:
    """A table: its title, the titles of its columns, and rows as long as those."""

    title: str
    columns: list[str]
    rows: list[list[Any]]


def shown(value: Any) -> str:
    """A cell as text: scores as per cent with two decimals, flags and missing ones in words."""
    if value is None:
        return "-"
    if isinstance(value, (float, np.floating)):
        return "-" if math.isnan(value) else f"{100 * value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def setting_text(value: Any) -> str:
    """A setting as text: what a person would type, cut off if it is long."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_SETTING_CHARACTERS else text[: MAX_SETTING_CHARACTERS - 1] + "…"


def class_names(scores: Mapping[str, Any]) -> list[str]:
    """The names of a benchmark's K classes."""
    return [str(entry["name"]) for entry in scores["classes"]]


def score_of(scores: Mapping[str, Any], key: str) -> float:
    """A score as a Python float; nan where there is none."""
    value = scores.get(key)
    return math.nan if value is None else float(value)


def tasks_of(scores: Mapping[str, Any]) -> list[str]:
    """The tasks of a benchmark that were scored: those with a number."""
    return [task for task, columns in SCORE_COLUMNS.items() if any(key in scores for key in columns.values())]


def summary_tables(results: Results) -> list[ScoreTable]:
    """One table a task, one row a benchmark; columns that no benchmark has a number for are left out."""
    tables: list[ScoreTable] = []
    for task, columns in SCORE_COLUMNS.items():
        scored = {name: scores for name, scores in results.items() if task in tasks_of(scores)}
        if not scored:
            continue
        main = next(iter(columns))
        kept = {
            title: key
            for title, key in columns.items()
            if title == main or any(not math.isnan(score_of(scores, key)) for scores in scored.values())
        }
        rows = [
            [name, *_extent(scores, CLASS_KEYS[task]), *(score_of(scores, key) for key in kept.values())]
            for name, scores in scored.items()
        ]
        tables.append(ScoreTable(TASK_TITLES[task], ["benchmark", "images", "classes counted", *kept], rows))
    return tables


def _extent(scores: Mapping[str, Any], class_key: str) -> list[Any]:
    """The number of images, and of classes that have a score."""
    classes = scores["classes"]
    counted = sum(not math.isnan(score_of(entry, class_key)) for entry in classes)
    return [int(scores["num_images"]), f"{counted} of {len(classes)}"]


def published_table(results: Results) -> ScoreTable | None:
    """This model beside what others published for the benchmarks scored; None if nobody did.

    One row for each score; the column "measured here" holds only what was measured.
    """
    keys = {"mIoU": "miou", "PQ": "pq", "AP": "ap"}
    rows_of = {
        (name, title, key): [system.scores.get(name, {}).get(key) for system in PUBLISHED]
        for name, scores in results.items()
        for title, key in keys.items()
        if any(key in system.scores.get(name, {}) for system in PUBLISHED) and key in scores
    }
    speaking = [place for place in range(len(PUBLISHED)) if any(row[place] for row in rows_of.values())]
    if not speaking:
        return None
    rows = [
        [
            *(name, title, score_of(results[name], key)),
            *("-" if row[place] is None else f"{row[place]:.1f}" for place in speaking),
        ]
        for (name, title, key), row in rows_of.items()
    ]
    columns = [
        "benchmark",
        "score",
        "measured here",
        *(f"published: {PUBLISHED[place].title}" for place in speaking),
    ]
    return ScoreTable("Published scores", columns, rows)


def comparison_note(results: Results) -> str:
    """Which benchmarks were not scored on the whole validation set; "" if all were."""
    partial = [
        f"{name} ({scores['num_images']:,} images, not {VALIDATION_IMAGES[name]:,})"
        for name, scores in results.items()
        if scores["num_images"] != VALIDATION_IMAGES.get(name, scores["num_images"])
    ]
    if not partial:
        return ""
    return f"Not comparable with scores on the whole validation set: {', '.join(partial)}."


def counted_classes(classes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The classes that have a score, best first (by the first column that was scored)."""
    main = main_class_column(classes)
    if main is None:
        return []
    keys = CLASS_COLUMNS.values()
    counted = [entry for entry in classes if any(not math.isnan(score_of(entry, key)) for key in keys)]
    return sorted(counted, key=lambda entry: -_last_if_nan(score_of(entry, CLASS_COLUMNS[main])))


def _last_if_nan(score: float) -> float:
    return -1.0 if math.isnan(score) else score


def main_class_column(classes: Sequence[Mapping[str, Any]]) -> str | None:
    """The title of the first column of `CLASS_COLUMNS` that classes have; None if they have none."""
    return next((title for title, key in CLASS_COLUMNS.items() if any(key in e for e in classes)), None)


def class_table(
    classes: Sequence[Mapping[str, Any]], shown_classes: Sequence[Mapping[str, Any]]
) -> ScoreTable:
    """Scores of `shown_classes`, in their order; columns that none of `classes` speaks of are left out."""
    seen = {True: "seen", False: "unseen", None: "-"}
    thing = {True: "thing", False: "stuff", None: "-"}
    flags = {"masks in training": ("seen", seen), "kind": ("is_thing", thing)}
    flags = {title: flag for title, flag in flags.items() if any(e.get(flag[0]) is not None for e in classes)}
    keys = {title: key for title, key in CLASS_COLUMNS.items() if any(key in e for e in classes)}
    rows = [
        [
            entry["name"],
            *(score_of(entry, key) for key in keys.values()),
            *(words[entry.get(key)] for key, words in flags.values()),
        ]
        for entry in shown_classes
    ]
    return ScoreTable("Each class", ["class", *keys, *flags], rows)
