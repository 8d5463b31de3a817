"""The report as Markdown (`results.md`), and the tables that are printed on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ita_segmentation.evaluation.reporting.confusion_matrix import worst_confusions
from ita_segmentation.evaluation.reporting.examples import numbered
from ita_segmentation.evaluation.reporting.published_scores import MARK
from ita_segmentation.evaluation.reporting.score_tables import (
    CONFUSIONS_LISTED,
    Evaluation,
    Results,
    class_names,
    class_table,
    comparison_note,
    counted_classes,
    published_table,
    setting_text,
    shown,
    summary_tables,
)


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A GitHub Markdown table; floats are scores in [0, 1] and are shown as percentages with two decimals."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join("| " + " | ".join(_escaped(shown(value)) for value in line) + " |\n" for line in lines)


def summary_table(results: Results) -> str:
    """One Markdown table for each task that was scored, one row a benchmark."""
    return "\n".join(markdown_table(table.columns, table.rows) for table in summary_tables(results))


def markdown_report(evaluation: Evaluation) -> str:
    """The whole report: summary, published scores, and for each benchmark its settings, classes and confusions."""
    model = " ".join(evaluation.model.split()).replace("`", "'")
    text = f"# Results of `{model}`\n\nScores in per cent.\n"
    for table in summary_tables(evaluation.results):
        text += f"\n## {table.title}\n\n" + markdown_table(table.columns, table.rows)
    text += _published(evaluation.results)
    for benchmark in evaluation.results:
        text += _benchmark(evaluation, benchmark)
    versions = ", ".join(f"{name} {version}" for name, version in evaluation.versions.items())
    return text + f"\nVersions: {versions}.\n"


def _published(results: Results) -> str:
    table, note, text = published_table(results), comparison_note(results), ""
    if table is not None:
        text += f"\n## {table.title}: {MARK}\n\nTrained on COCO; in per cent, as printed.\n\n"
        text += markdown_table(table.columns, table.rows)
    return text + (note and f"\n{_escaped(note)}\n")


def _benchmark(evaluation: Evaluation, benchmark: str) -> str:
    scores, folder = evaluation.results[benchmark], evaluation.folders[benchmark]
    text = f"\n## {_escaped(benchmark)}\n"
    if settings := scores.get("settings"):
        rows = [[key, setting_text(value)] for key, value in settings.items()]
        text += "\n### Settings\n\n" + markdown_table(["setting", "value"], rows)
    classes = class_table(scores["classes"], counted_classes(scores["classes"]))
    text += f"\n### {classes.title}\n\n" + markdown_table(classes.columns, classes.rows)
    if left_out := len(scores["classes"]) - len(classes.rows):
        text += f"\nClasses in neither the labels nor the predictions, and without scores: {left_out:,}.\n"
    if benchmark in evaluation.confusions:
        text += "\n### What was taken for what\n" + _confusions(evaluation, benchmark)
    examples = numbered(evaluation.examples.get(benchmark, ()))
    if examples:
        text += "\n### Best and worst images\n"
    for name, example in examples.items():
        caption = f"{name.replace('_', ' ')}: {example.image_id}, mean IoU {shown(float(example.score))}"
        text += f"\n{_escaped(caption)}\n\n![{name}]({folder}/{name}.jpg)\n"
    return text


def _confusions(evaluation: Evaluation, benchmark: str) -> str:
    matrix, names = evaluation.confusions[benchmark], class_names(evaluation.results[benchmark])
    text = ""
    for title, by in (("Largest shares of a class", "share"), ("Most pixels", "pixels")):
        lines = [confusion.text(names) for confusion in worst_confusions(matrix, CONFUSIONS_LISTED, by)]
        text += f"\n{title}:\n\n" + "".join(f"- {_escaped(line)}\n" for line in lines or ["none"])
    return text + f"\n![confusion matrix]({evaluation.folders[benchmark]}/confusion.png)\n"


def _escaped(text: str) -> str:
    """One line that stays in its table cell and is no HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
