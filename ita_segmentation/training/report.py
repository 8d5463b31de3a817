"""A run as one HTML page: curves, what it was run with and on, what happened, sample predictions.

    python -m ita_segmentation.training.report OUTPUT

writes `OUTPUT/training_report.html` from what a run has left there, finished or not. The page asks for nothing from
anywhere and stays below 2 MB however long the run was: curves keep at most `MOST_POINTS` points, with their extremes.
"""

import base64
import datetime
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import TrainerState

from ita_segmentation.evaluation.reporting.html_report import POLICY, text
from ita_segmentation.evaluation.reporting.html_style import STYLE
from ita_segmentation.training.history import curve
from ita_segmentation.training.metrics import LOSS_PARTS
from ita_segmentation.training.report_chart import CURVE_SCRIPT, CURVE_STYLE, Curve, line_chart
from ita_segmentation.training.report_record import (
    RunRecord,
    is_number,
    read_record,
    read_state,
    write_whole,
)
from ita_segmentation.training.report_samples import as_jpeg, sample_files
from modeling_ita.image_io import open_image

REPORT = "training_report.html"
MOST_POINTS, MOST_POINTS_OF_LAYER = 600, 240
MOST_EVENTS, MOST_SAMPLES, MOST_CLASSES = 100, 6, 1000
SAMPLE_BYTES = 750_000  # of all embedded images; base64 adds a third
SAMPLE_STEPS = (
    (1100, 80),
    (900, 72),
    (700, 68),
    (500, 60),
    (360, 50),
    (240, 40),
)  # longer side, JPEG quality
# Title, what it shows, the logged names and what the chart calls them, whether its axis may be logarithmic.
CHARTS: tuple[tuple[str, str, dict[str, str], bool], ...] = (
    ("Loss", "sum over all predictions, weighted", {"loss": "loss"}, False),
    (
        "Scores",
        "mean IoU of the evaluation images",
        {"eval_miou": "all classes", "eval_miou_seen": "seen", "eval_miou_unseen": "unseen"},
        False,
    ),
    ("Loss of the last layer", "its parts", {part: part.removeprefix("loss_") for part in LOSS_PARTS}, False),
    (
        "Loss of all layers",
        "its parts, summed",
        {f"{part}_sum": part.removeprefix("loss_") for part in LOSS_PARTS},
        False,
    ),
    ("Learning rate", "of the first group", {"learning_rate": "learning rate"}, False),
    ("Gradient", "norm before clipping", {"grad_norm": "gradient norm"}, True),
    (
        "Text queries",
        "shares, 0 to 1",
        {
            "matched_text_queries": "of matched queries that are text queries",
            "true_classes_dominant": "of true classes that are dominant categories",
        },
        False,
    ),
    ("Pixels", "of the evaluation images", {"eval_pacc": "accuracy", "eval_fwiou": "weighted IoU"}, False),
    ("Speed", "without evaluations and checkpoints", {"images_per_second": "images per second"}, False),
    (
        "Memory",
        "peak so far, GiB",
        {"memory_gib": "first process", "cuda_memory_gib": "its GPU"},
        False,
    ),
    ("Skipped images", "that could not be read, so far", {"skipped_images": "images"}, False),
)


def html_report(title: str, state: TrainerState, record: RunRecord, samples: Mapping[int, Path]) -> str:
    """The whole page.

    Args:
        title: names the run.
        samples: step -> file with sample predictions.
    """
    sections = [
        _section("summary", "State", _tiles(state) + _state_line(state, record)),
        _section("curves", "Curves", f'<div class="grid-of-curves">{_charts(state.log_history)}</div>'),
        _section("layers", "Loss of each layer", _layer_charts(state.log_history)),
        _section("samples", "Sample predictions", _samples(state, samples)),
        _section("events", "What happened", _events(record.events)),
        _section("run", "The run", _facts(record)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{text(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>Training of {text(title)}</title>\n<style>{STYLE}{CURVE_STYLE}</style>\n</head>\n<body>\n"
        f"<header><p>Training of</p><h1>{text(title)}</h1></header>\n<main>\n"
        + "".join(sections)
        + f"</main>\n<script>{CURVE_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _section(name: str, title: str, body: str) -> str:
    return f'<section id="{name}"><h2>{title}</h2>\n{body}</section>\n' if body else ""


def numbers_of(history: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """As `history.curve`, without what is no number, and with the last value of a step."""
    steps, values = curve([dict(entry) for entry in history], name)
    points = {step: float(value) for step, value in zip(steps, values, strict=True) if is_number(value)}
    return sorted(points), [points[step] for step in sorted(points)]


# ------------------------------------------------------------------------------------------------------------
# State


def _tiles(state: TrainerState) -> str:
    """The main numbers, large."""
    history = state.log_history

    def last(name: str) -> float | None:
        values = numbers_of(history, name)[1]
        return values[-1] if values else None

    tiles: list[tuple[str, str]] = [("step", f"{state.global_step:,} of {state.max_steps:,}")]
    for name, title, form in (
        ("loss", "loss", "{:.4g}"),
        ("eval_miou", "mIoU", "{:.3f}"),
        ("eval_miou_seen", "mIoU seen", "{:.3f}"),
        ("eval_miou_unseen", "mIoU unseen", "{:.3f}"),
        ("images_per_second", "images per second", "{:.3g}"),
        ("skipped_images", "skipped images", "{:.0f}"),
    ):
        value = last(name)
        if value is not None:
            tiles.append((title, form.format(value)))
    steps, scores = numbers_of(history, "eval_miou")
    if scores:
        best = max(range(len(scores)), key=scores.__getitem__)
        tiles.append(("best mIoU", f"{scores[best]:.3f} at step {steps[best]:,}"))
    if (minutes := last("minutes")) is not None:
        tiles.append(("time", duration(minutes)))
    is_over = state.global_step >= state.max_steps or any("train_runtime" in entry for entry in history)
    if (left := last("eta_minutes")) is not None and not is_over:
        tiles.append(("time left", duration(left)))
    items = "".join(f"<div><dt>{text(title)}</dt><dd>{text(value)}</dd></div>" for title, value in tiles)
    return f'<dl class="tiles">{items}</dl>\n'


def duration(minutes: float) -> str:
    return str(datetime.timedelta(seconds=round(60 * max(minutes, 0.0))))


def _state_line(state: TrainerState, record: RunRecord) -> str:
    """How the run stands, and when this was written."""
    now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
    what = record.events[-1]["what"] if record.events else f"step {state.global_step}"
    not_numbers = sum(
        isinstance(value, float) and not is_number(value)
        for entry in state.log_history
        for value in entry.values()
    )
    note = f"{not_numbers} logged values are no number; curves leave them out." if not_numbers else ""
    line = f'<p class="remark">Written {text(now)}; last: {text(what)}.</p>\n'
    return line + (f'<p class="note">{note}</p>\n' if note else "")


# ------------------------------------------------------------------------------------------------------------
# Curves


def _charts(history: Sequence[Mapping[str, Any]]) -> str:
    charts = ""
    for title, note, names, is_log in CHARTS:
        curves = [Curve(label, *numbers_of(history, name)) for name, label in names.items()]
        charts += line_chart(title, note, curves, MOST_POINTS, is_log)
    return charts


def _layer_charts(history: Sequence[Mapping[str, Any]]) -> str:
    """A chart for each part of the loss, with a curve for each prediction."""
    names = {name for entry in history for name in entry}
    charts = ""
    for part in LOSS_PARTS:
        numbers = sorted(int(name[len(part) + 1 :]) for name in names if re.fullmatch(rf"{part}_\d+", name))
        labels = {f"{part}_{n}": f"after layer {n}" if n else "before the first layer" for n in numbers}
        if labels and part in names:
            labels[part] = "last layer"
        curves = [Curve(label, *numbers_of(history, name)) for name, label in labels.items()]
        charts += line_chart(part.removeprefix("loss_"), "weighted", curves, MOST_POINTS_OF_LAYER)
    return charts and f'<div class="grid-of-curves">{charts}</div>'


# ------------------------------------------------------------------------------------------------------------
# Images and words


def _samples(state: TrainerState, files: Mapping[int, Path]) -> str:
    """Sample predictions of a few evaluations of this run, the last one unfolded."""
    evaluated = set(numbers_of(state.log_history, "eval_miou")[0])
    steps = [step for step in files if step in evaluated]
    if len(steps) > MOST_SAMPLES:
        steps = [steps[place * (len(steps) - 1) // (MOST_SAMPLES - 1)] for place in range(MOST_SAMPLES)]
    images: dict[int, tuple[bytes, tuple[int, int]]] = {}
    for side, quality in SAMPLE_STEPS:
        images = {step: _small(files[step], side, quality) for step in steps}
        if sum(len(content) for content, _ in images.values()) <= SAMPLE_BYTES:
            break
    return "".join(
        f"<details{' open' if step == steps[-1] else ''}><summary>step {step:,}</summary>"
        f'<img class="samples" src="data:image/jpeg;base64,{base64.b64encode(content).decode()}" '
        f'width="{size[0]}" height="{size[1]}" alt="sample predictions of step {step}"></details>\n'
        for step, (content, size) in images.items()
    )


def _small(file: Path, side: int, quality: int) -> tuple[bytes, tuple[int, int]]:
    """An image's JPEG, at most `side` pixels wide and three times as high, and its size."""
    with open_image(file) as opened:
        image = opened.convert("RGB")
    image.thumbnail((side, 3 * side), Image.Resampling.LANCZOS)
    return as_jpeg(image, quality), image.size


def _events(events: Sequence[Mapping[str, Any]]) -> str:
    shown = list(events)
    hidden = len(shown) - MOST_EVENTS
    if hidden > 0:  # the first and the last ones
        middle = {"time": "", "step": 0, "what": f"and {hidden} more"}
        shown = [*shown[: MOST_EVENTS // 2], middle, *shown[-MOST_EVENTS // 2 :]]
    rows = "".join(
        f'<tr><td>{text(event["time"])}</td><td class="number">{event["step"]:,}</td>'
        f'<td class="words">{text(event["what"])}</td></tr>\n'
        for event in shown
    )
    head = '<thead><tr><th>time</th><th class="number">step</th><th>what</th></tr></thead>'
    return rows and f'<div class="scroll tall"><table>{head}<tbody>{rows}</tbody></table></div>\n'


def _facts(record: RunRecord) -> str:
    """Arguments, data, machine, versions and classes."""
    tables = (
        ("Data set", record.data),
        ("Arguments that are not the default", record.arguments),
        ("Machine", record.machine),
        ("Versions", record.versions),
    )
    body = "".join(f"<h3>{title}</h3>{_table(values)}" for title, values in tables if values)
    for title, wanted in (("Classes that are seen", True), ("Classes that are unseen", False)):
        names = [text(name) for name, seen in record.classes if seen == wanted]
        more = f" and {len(names) - MOST_CLASSES:,} more" if len(names) > MOST_CLASSES else ""
        if names:
            listed = ", ".join(names[:MOST_CLASSES])
            body += f"<details><summary>{title}: {len(names):,}</summary><p>{listed}{more}</p></details>\n"
    return body


def _table(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in values.items()
    )
    return f'<div class="scroll"><table class="settings"><tbody>{rows}</tbody></table></div>\n'


# ------------------------------------------------------------------------------------------------------------


def write_report(output: Path, state: TrainerState, record: RunRecord) -> Path:
    """Writes `training_report.html`, whole or not at all. Raises OSError if it cannot."""
    name = output.resolve().name
    write_whole(output / REPORT, html_report(name, state, record, sample_files(output)))
    return output / REPORT


def main(argv: list[str] | None = None) -> None:
    """The report of a run's folder; bad input is answered in one line, with status 2."""
    words = sys.argv[1:] if argv is None else argv
    if len(words) != 1 or words[0].startswith("-"):
        sys.stderr.write("usage: python -m ita_segmentation.training.report OUTPUT\n")
        raise SystemExit(0 if words in (["-h"], ["--help"]) else 2)
    output = Path(words[0])
    try:
        file = write_report(output, read_state(output), read_record(output))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"ita_segmentation.training.report: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from error
    sys.stdout.write(f"{file}\n")


if __name__ == "__main__":
    main()
