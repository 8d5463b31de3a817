"""Everything that an evaluation writes: scores for programs and for people, tables, images, one HTML page.

    results.json            all numbers
    results.md              tables beside published scores, classes, confusions
    report.html             the same with charts and images, in one self-contained file
    BENCHMARK/              per_class.csv, confusion.npz and .png, best_1.jpg, worst_1.jpg, ...

A score that was not measured (NaN) is null in JSON, empty in CSV and a dash in tables; it is never written as a number.
"""

import base64
import contextlib
import csv
import io
import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from ita_segmentation.evaluation.reporting import score_tables
from ita_segmentation.evaluation.reporting.examples import ExampleImage, jpeg_of, numbered, side_by_side
from ita_segmentation.evaluation.reporting.figures import (
    class_figure,
    confusion_figure,
    png_of,
    worst_confusions,
)
from ita_segmentation.files import write_files
from ita_segmentation.visualization import MAX_LEGEND_ENTRIES, color_of

PACKAGES = ("ita-segmentation", "torch", "transformers", "open_clip_torch", "timm") + (
    ("numpy", "pillow", "datasets")
)
JPEG_QUALITY = 88
THUMBNAIL_SIDE, THUMBNAIL_QUALITY, MAX_THUMBNAILS = 340, 75, 12  # in the HTML page; number of each group
CONFUSIONS_LISTED = 10


def write_results(
    output: Path,
    model: str,
    results: score_tables.Results,
    confusions: Mapping[str, np.ndarray] | None = None,
    examples: Mapping[str, Sequence[ExampleImage]] | None = None,
) -> tuple[Path, Path]:
    """Write all files under `output`, either all of them or none; return the paths of `results.json` and `results.md`.

    Args:
        output: a folder, created if missing.
        model: what was evaluated, as given by the user.
        results: benchmark -> scores, see `score_tables`.
        confusions: benchmark -> (K, K) pixel counts, of those that have them.
        examples: benchmark -> its best and worst images, in the order in which they are shown.

    Raises:
        ITAError: a file cannot be written.
    """
    confusions, examples = confusions or {}, examples or {}
    versions = versions_used()
    document = {"model": model, "benchmarks": plain_values(results), "versions": versions}
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # JSON can escape a lone surrogate of a file name; in the other files it becomes a question mark.
    contents = {"results.json": text.encode("utf-8", "backslashreplace")}
    folders = folder_names(list(results))
    sections = []
    for name, scores in results.items():
        matrix = confusions.get(name)
        matrix = matrix if matrix is not None and matrix.any() else None
        files = _benchmark_files(scores, matrix, examples.get(name, ()))
        contents |= {f"{folders[name]}/{file}": content for file, content in files.items()}
        sections.append(_section(name, folders[name], scores, matrix, examples.get(name, ()), files))
    notes = [score_tables.MIOU_NOTE] if any("miou" in scores for scores in results.values()) else []
    notes.append(score_tables.comparison_note(results))
    page = {
        "model": model,
        "tables": score_tables.summary_tables(results),
        "published": score_tables.published_table(results),
        "published_mark": score_tables.MARK,
        "notes": list(filter(None, notes)),
        "benchmarks": sections,
        "versions": versions,
    }
    for file in ("results.md", "report.html"):
        contents[file] = _template(f"{file}.jinja").render(page).encode("utf-8", "replace")
    write_files({output / file: content for file, content in contents.items()})
    return output / "results.json", output / "results.md"


def summary_table(results: score_tables.Results) -> str:
    """Format one Markdown table for each task that was scored, one row a benchmark."""
    return "\n".join(
        markdown_table(table.columns, table.rows) for table in score_tables.summary_tables(results)
    )


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format a GitHub Markdown table; floats are scores in [0, 1], shown as percent with two decimals."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(
        "| " + " | ".join(_markdown(score_tables.cell_text(value)) for value in line) + " |\n"
        for line in lines
    )


def plain_values(value: Any) -> Any:
    """Convert to what JSON can hold: arrays to lists, NaN and infinity to None, unknown objects to text."""
    if isinstance(value, Mapping):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return plain_values(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain_values(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int)) else str(value)


def folder_names(benchmarks: Sequence[str]) -> dict[str, str]:
    """Return a folder name for each benchmark, without what a file system may refuse; no two are equal."""
    folders: dict[str, str] = {}
    for benchmark in benchmarks:
        safe = re.sub(r"[^A-Za-z0-9_.-]+", "_", benchmark).strip("._")[:100] or "benchmark"
        folder, number = safe, 2
        while folder.lower() in {taken.lower() for taken in folders.values()}:
            folder, number = f"{safe}_{number}", number + 1
        folders[benchmark] = folder
    return folders


def versions_used() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that decide the numbers."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def per_class_csv(classes: Sequence[Mapping[str, Any]]) -> str:
    """Format all classes in the order of their indices; scores as fractions, empty where there is none."""
    keys = [key for key in score_tables.CLASS_TITLES.values() if any(key in entry for entry in classes)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = ["name", "seen", "is_thing", *keys]
    writer.writerow(["index", *keys])
    for index, entry in enumerate(classes):
        writer.writerow([index, *(plain_values(entry.get(key)) for key in keys)])
    return text.getvalue()


def _benchmark_files(
    scores: Mapping[str, Any], matrix: np.ndarray | None, examples: Sequence[ExampleImage]
) -> dict[str, bytes]:
    """Make the files of one benchmark, by their names in its folder."""
    files = {"per_class.csv": per_class_csv(scores["classes"]).encode("utf-8", "replace")}
    if matrix is not None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, confusion=matrix)
        names = [str(entry["name"]) for entry in scores["classes"]]
        files["confusion.npz"] = buffer.getvalue()
        files["confusion.png"] = png_of(confusion_figure(matrix, names))
    for name, example in numbered(examples).items():
        files[f"{name}.jpg"] = jpeg_of(side_by_side(example), JPEG_QUALITY)
    return files


def _section(
    name: str,
    folder: str,
    scores: Mapping[str, Any],
    matrix: np.ndarray | None,
    examples: Sequence[ExampleImage],
    files: Mapping[str, bytes],
) -> dict[str, Any]:
    """Collect what the templates show of one benchmark."""
    classes = scores["classes"]
    names = [str(entry["name"]) for entry in classes]
    ranked = score_tables.class_table(classes, score_tables.counted_classes(classes))
    table, chart = score_tables.class_table(classes, classes), class_figure(scores)
    table = score_tables.ScoreTable(
        table.title, ["#", *table.columns], [[i, *row] for i, row in enumerate(table.rows)]
    )
    tiles = [
        ("images", score_tables.cell_text(int(scores["num_images"]))),
        ("classes", score_tables.cell_text(len(classes))),
    ]
    for task in score_tables.tasks_of(scores):
        headlines = list(score_tables.SCORE_COLUMNS[task].items())[: 3 if task == "semantic" else 1]
        values = {title: score_tables.score_of(scores, key) for title, key in headlines}
        tiles += [
            (title, score_tables.cell_text(value)) for title, value in values.items() if not math.isnan(value)
        ]
    confusions = {}
    if matrix is not None:
        for title, by in (("Largest shares of a class", "share"), ("Most pixels", "pixels")):
            found = worst_confusions(matrix, CONFUSIONS_LISTED, by)
            confusions[title] = [confusion.text(names) for confusion in found] or ["none"]
    return {
        "name": name,
        "folder": folder,
        "tiles": tiles,
        "settings": {
            key: score_tables.setting_text(value) for key, value in (scores.get("settings") or {}).items()
        },
        "classes": table,
        "ranked": ranked,
        "num_without_scores": len(classes) - len(ranked.rows),
        "chart": None if chart is None else _data_url(png_of(chart), "png"),
        "confusions": confusions,
        "confusion_image": _data_url(files["confusion.png"], "png") if matrix is not None else None,
        "examples": [_example(key, example) for key, example in numbered(examples).items()],
    }


def _example(key: str, example: ExampleImage) -> dict[str, Any]:
    group, _, number = key.partition("_")
    images = {"image": example.image, "reference": example.reference, "prediction": example.prediction}
    shown = images if int(number) <= MAX_THUMBNAILS else {}
    return {
        "key": key,
        "group": group,
        "number": number,
        "image_id": example.image_id,
        "score": score_tables.cell_text(float(example.score)),
        "thumbnails": {
            title: _data_url(jpeg_of(image, THUMBNAIL_QUALITY, THUMBNAIL_SIDE), "jpeg")
            for title, image in shown.items()
        },
        "legend": [
            (f"rgb{color_of(index)}", label, "" if score is None else f"{100 * score:.0f} %")
            for index, label, score in example.legend[:MAX_LEGEND_ENTRIES]
        ],
        "num_hidden": max(0, len(example.legend) - MAX_LEGEND_ENTRIES),
    }


def _data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=name.endswith(".html.jinja"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "cell": score_tables.cell_text,
        "line": lambda value: " ".join(str(value).split()),
        "markdown": _markdown,
        "markdown_table": lambda table: markdown_table(table.columns, table.rows),
    }
    environment.globals |= {"ScoreTable": score_tables.ScoreTable, "zip": zip}
    return environment.get_template(name)


def _markdown(text: Any) -> str:
    """Format one line that stays in its table cell and contains no HTML."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
