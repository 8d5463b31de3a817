"""The report as one HTML page that needs nothing else: style, script and images are inside.

It asks for nothing from anywhere (its content security policy forbids it), reads in light and dark and on a phone, and
stays at a few megabytes: images are shown smaller, and fewer of them, the more there are.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ita_segmentation.evaluation.reporting.confusion_matrix import worst_confusions
from ita_segmentation.evaluation.reporting.examples import ExampleImage, encode_image, numbered
from ita_segmentation.evaluation.reporting.html_chart import class_chart
from ita_segmentation.evaluation.reporting.html_style import SCRIPT, STYLE
from ita_segmentation.evaluation.reporting.published_scores import MARK
from ita_segmentation.evaluation.reporting.score_tables import (
    CLASS_COLUMNS,
    CONFUSIONS_LISTED,
    SCORE_COLUMNS,
    Evaluation,
    ScoreTable,
    class_names,
    class_table,
    comparison_note,
    published_table,
    score_of,
    setting_text,
    shown,
    summary_tables,
    tasks_of,
)
from ita_segmentation.visualization import color_of

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
EXAMPLE_BYTES = 2_700_000  # of all examples' JPEGs; base64 adds a third
# Longest side in pixels, JPEG quality, examples of each group: the first step that stays within EXAMPLE_BYTES.
EXAMPLE_STEPS = ((400, 82, 12), (340, 76, 6), (260, 70, 4), (200, 60, 2), (120, 50, 1))
CONFUSION_COLORS = 96
MAX_LEGEND_ENTRIES = 24


def html_report(evaluation: Evaluation) -> str:
    """The whole page."""
    model = text(evaluation.model)
    images = _example_thumbnails(evaluation)
    sections = [_summary(evaluation), _published(evaluation)]
    for place, benchmark in enumerate(evaluation.results):
        sections.append(_benchmark(evaluation, benchmark, place, images.get(benchmark, [])))
    sections.append(_versions(evaluation))
    links = "".join(
        f'<a href="#benchmark-{place}">{text(name)}</a>' for place, name in enumerate(evaluation.results)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{text(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>Evaluation of {model}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><p>Evaluation of</p><h1>{model}</h1><nav>{links}</nav></header>\n<main>\n"
        + "".join(sections)
        + f"</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def text(value: Any) -> str:
    """Anything as text that is no HTML, in one line; safe in attributes too."""
    return html.escape(" ".join(str(value).split()), quote=True)


# --------------------------------------------------------------------------------------------------------------
# Tables


def _cell(value: Any, kind: str = "") -> str:
    if isinstance(value, float):
        known = not math.isnan(value)
        bar = f'<i style="--share:{100 * value:.2f}%"></i>' if known and kind == "bar" else ""
        order = f"{value:.6f}" if known else ""
        return f'<td class="number {kind}" data-value="{order}">{bar}{shown(value)}</td>'
    if isinstance(value, int):
        return f'<td class="number {kind}" data-value="{value}">{shown(value)}</td>'
    return f'<td class="{kind}">{text(shown(value))}</td>'


def _table(table: ScoreTable, kinds: Mapping[str, str] | None = None, sortable: bool = False) -> str:
    """A table in a box that scrolls sideways; `kinds`: column -> class of its cells."""
    kinds = kinds or {}
    titles = "".join(_head(table, place, kinds, sortable) for place in range(len(table.columns)))
    rows = "".join(
        "<tr>"
        + "".join(_cell(value, kinds.get(title, "")) for title, value in zip(table.columns, row, strict=True))
        + "</tr>\n"
        for row in table.rows
    )
    box = '<div class="scroll tall"><table class="sortable">' if sortable else '<div class="scroll"><table>'
    return f"{box}<thead><tr>{titles}</tr></thead>\n<tbody>{rows}</tbody></table></div>\n"


def _head(table: ScoreTable, place: int, kinds: Mapping[str, str], sortable: bool) -> str:
    """A column's title, above numbers at the right; a button if the table can be sorted."""
    title = table.columns[place]
    numeric = any(isinstance(row[place], (int, float)) for row in table.rows)
    words = f'<button type="button">{text(title)}</button>' if sortable else text(title)
    return f'<th scope="col" class="{"number " if numeric else ""}{kinds.get(title, "")}">{words}</th>'


def _summary(evaluation: Evaluation) -> str:
    body = "".join(
        f"<h3>{text(table.title)}</h3>\n{_table(table, {table.columns[3]: 'main'})}"
        for table in summary_tables(evaluation.results)
    )
    note = comparison_note(evaluation.results)
    body += note and f'<p class="note">{text(note)}</p>\n'
    return f'<section id="summary"><h2>Scores</h2><p>Measured here, in per cent.</p>\n{body}</section>\n'


def _published(evaluation: Evaluation) -> str:
    table = published_table(evaluation.results)
    if table is None:
        return ""
    kinds = dict.fromkeys(table.columns[3:], "published") | {table.columns[2]: "main"}
    return (
        f'<section id="published"><h2>{text(table.title)}</h2>'
        f"<p>Columns in italics are {text(MARK)}: trained on COCO, in per cent, as printed.</p>\n"
        f"{_table(table, kinds)}</section>\n"
    )


def _settings(settings: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{text(key)}</th><td>{text(setting_text(value))}</td></tr>"
        for key, value in settings.items()
    )
    return f'<div class="scroll"><table class="settings"><tbody>{rows}</tbody></table></div>\n'


def _versions(evaluation: Evaluation) -> str:
    return f'<section id="versions"><h2>Versions</h2>\n{_settings(evaluation.versions)}</section>\n'


# --------------------------------------------------------------------------------------------------------------
# One benchmark


def _benchmark(evaluation: Evaluation, benchmark: str, place: int, examples: Sequence[str]) -> str:
    scores = evaluation.results[benchmark]
    body = _tiles(scores)
    if settings := scores.get("settings"):
        body += f"<details><summary>Settings</summary>{_settings(settings)}</details>\n"
    body += _classes(scores["classes"])
    if benchmark in evaluation.confusions:
        body += _confusions(evaluation, benchmark)
    if examples:
        body += '<h3>Best and worst images</h3>\n<div class="examples">' + "".join(examples) + "</div>\n"
    return f'<section id="benchmark-{place}"><h2>{text(benchmark)}</h2>\n{body}</section>\n'


def _tiles(scores: Mapping[str, Any]) -> str:
    """The main numbers, large."""
    wanted = {
        title: score_of(scores, key)
        for task in tasks_of(scores)
        for title, key in list(SCORE_COLUMNS[task].items())[: 3 if task == "semantic" else 1]
    }
    tiles = [("images", f"{scores['num_images']:,}"), ("classes", f"{len(scores['classes']):,}")]
    tiles += [(title, shown(value)) for title, value in wanted.items() if not math.isnan(value)]
    return (
        '<dl class="tiles">'
        + "".join(f"<div><dt>{text(title)}</dt><dd>{text(value)}</dd></div>" for title, value in tiles)
        + "</dl>\n"
    )


def _classes(classes: Sequence[Mapping[str, Any]]) -> str:
    table = class_table(classes, classes)
    columns = ["#", *table.columns]
    rows = [[index, *row] for index, row in enumerate(table.rows)]
    kinds = {"#": "index", **dict.fromkeys(CLASS_COLUMNS, "bar")}
    return (
        f"<h3>{text(table.title)}</h3>\n{class_chart(classes)}"
        '<p class="tools"><input type="search" placeholder="find a class" aria-label="find a class"> '
        "<span>A click on a column's title sorts by it.</span></p>\n"
        + _table(ScoreTable(table.title, columns, rows), kinds, sortable=True)
    )


def _confusions(evaluation: Evaluation, benchmark: str) -> str:
    matrix, names = evaluation.confusions[benchmark], class_names(evaluation.results[benchmark])
    lists = ""
    for title, by in (("Largest shares of a class", "share"), ("Most pixels", "pixels")):
        worst = worst_confusions(matrix, CONFUSIONS_LISTED, by)
        items = "".join(f"<li>{text(confusion.text(names))}</li>" for confusion in worst) or "<li>none</li>"
        lists += f"<div><h4>{title}</h4><ol>{items}</ol></div>"
    pil_image = evaluation.confusion_images[benchmark]
    few_colors = pil_image.quantize(CONFUSION_COLORS, dither=Image.Dither.NONE)
    image = _image(few_colors, encode_image(few_colors, "PNG"), "png", "confusion matrix")
    return (
        f'<h3>What was taken for what</h3>\n<div class="columns">{lists}</div>\n'
        f'<div class="scroll paper">{image}</div>\n'
    )


# --------------------------------------------------------------------------------------------------------------
# Images


def _image(image: Image.Image, content: bytes, kind: str, alt: str) -> str:
    data = base64.b64encode(content).decode()
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img src="data:image/{kind};base64,{data}" {size} alt="{text(alt)}">'


def _example_thumbnails(evaluation: Evaluation) -> dict[str, list[str]]:
    """The figures of each benchmark, at the first of `EXAMPLE_STEPS` that is small enough."""
    figures: dict[str, list[str]] = {}
    for side, quality, count in EXAMPLE_STEPS:
        total, figures = 0, {}
        for benchmark, examples in evaluation.examples.items():
            kept = {
                name: example
                for name, example in numbered(examples).items()
                if int(name.rpartition("_")[2]) <= count
            }
            made = [_figure(name, example, side, quality) for name, example in kept.items()]
            figures[benchmark] = [figure for figure, _ in made]
            total += sum(size for _, size in made)
        if total <= EXAMPLE_BYTES:
            break
    return figures


def _figure(name: str, example: ExampleImage, side: int, quality: int) -> tuple[str, int]:
    """An example as HTML, and the size of its images in bytes."""
    parts, size = "", 0
    titles = ("image", "reference", "prediction")
    for title, pil_image in zip(titles, (example.image, example.reference, example.prediction), strict=True):
        small = pil_image.convert("RGB")
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        content = encode_image(small, "JPEG", quality)
        size += len(content)
        image = _image(small, content, "jpeg", f"{title} of {example.image_id}")
        parts += f"<div>{image}<span>{title}</span></div>"
    group, _, number = name.partition("_")
    caption = (
        f'<figcaption><b class="{group}">{group} {number}</b> mean IoU {shown(float(example.score))} % '
        f"<code>{text(example.image_id)}</code></figcaption>"
    )
    return f"<figure>{caption}<div class='triple'>{parts}</div>{_legend(example)}</figure>\n", size


def _legend(example: ExampleImage) -> str:
    entries = "".join(
        f'<li><i style="background:rgb{color_of(index)}"></i>{text(label)}'
        + ("" if score is None else f" <small>{100 * score:.0f} %</small>")
        + "</li>"
        for index, label, score in example.legend[:MAX_LEGEND_ENTRIES]
    )
    hidden = len(example.legend) - MAX_LEGEND_ENTRIES
    if hidden > 0:
        entries += f"<li>and {hidden} more</li>"
    return f'<ul class="legend">{entries}</ul>' if entries else ""
