"""Everything that an evaluation writes: scores for programs and for people, tables, images, one HTML page.

    results.json            all numbers
    results.md              tables beside published scores, classes, confusions
    report.html             the same to click through, with images, in one file
    BENCHMARK/              per_class.csv, confusion.npz and .png, best_1.jpg, worst_1.jpg, ...

A score that was not measured (nan) is null in JSON, empty in CSV and a dash in tables; it is never written as a number.
"""

from __future__ import annotations

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

import numpy as np

from ita_segmentation.evaluation.reporting.confusion_matrix import confusion_image
from ita_segmentation.evaluation.reporting.examples import (
    ExampleImage,
    encode_image,
    numbered,
    side_by_side,
)
from ita_segmentation.evaluation.reporting.html_report import html_report
from ita_segmentation.evaluation.reporting.markdown_report import (
    markdown_report,
    markdown_table,
    summary_table,
)
from ita_segmentation.evaluation.reporting.score_tables import (
    CLASS_COLUMNS,
    Evaluation,
    Results,
    class_names,
)
from ita_segmentation.files import write_files

__all__ = ["ExampleImage", "markdown_table", "summary_table", "write_results"]

PACKAGES = (
    "ita-segmentation",
    "torch",
    "transformers",
    "open_clip_torch",
    "timm",
    "numpy",
    "pillow",
    "datasets",
)
JPEG_QUALITY = 88


def write_results(
    output: Path,
    model: str,
    results: Results,
    confusions: Mapping[str, np.ndarray] | None = None,
    examples: Mapping[str, Sequence[ExampleImage]] | None = None,
) -> tuple[Path, Path]:
    """Writes all files under `output` (made if missing), whole or not at all.

    Args:
        model: what was evaluated, as given by the user.
        results: benchmark -> scores, see `ita_segmentation.evaluation.reporting.score_tables`.
        confusions: benchmark -> `ConfusionMatrix.matrix`, of those that have one.
        examples: benchmark -> its best and worst images, in the order in which they are shown.

    Returns:
        the paths of `results.json` and `results.md`.

    Raises:
        ITAError: if a file cannot be written.
    """
    confusions = {name: matrix for name, matrix in (confusions or {}).items() if np.any(matrix)}
    evaluation = Evaluation(
        model=model,
        results=results,
        confusions=confusions,
        confusion_images={
            name: confusion_image(matrix, class_names(results[name])) for name, matrix in confusions.items()
        },
        examples=examples or {},
        folders=folder_names(list(results)),
        versions=versions_used(),
    )
    contents = _overall_files(evaluation)
    for benchmark in results:
        contents |= _benchmark_files(evaluation, benchmark)
    write_files({output / name: content for name, content in contents.items()})
    return output / "results.json", output / "results.md"


def _overall_files(evaluation: Evaluation) -> dict[str, bytes]:
    """The files of the whole evaluation, by their names."""
    model, results = evaluation.model, evaluation.results
    document = {"model": model, "benchmarks": _plain(results), "versions": evaluation.versions}
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return {
        "results.json": text.encode("utf-8", "backslashreplace"),  # JSON's own escape for a lone surrogate
        "results.md": _encode(markdown_report(evaluation)),
        "report.html": _encode(html_report(evaluation)),
    }


def _benchmark_files(evaluation: Evaluation, benchmark: str) -> dict[str, bytes]:
    """The files of one benchmark, by their names under the output folder."""
    files = {"per_class.csv": _encode(per_class_csv(evaluation.results[benchmark]["classes"]))}
    if benchmark in evaluation.confusions:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, confusion=evaluation.confusions[benchmark])
        files["confusion.npz"] = buffer.getvalue()
        files["confusion.png"] = encode_image(evaluation.confusion_images[benchmark], "PNG")
    for name, example in numbered(evaluation.examples.get(benchmark, ())).items():
        files[f"{name}.jpg"] = encode_image(side_by_side(example), "JPEG", JPEG_QUALITY)
    return {f"{evaluation.folders[benchmark]}/{name}": content for name, content in files.items()}


def per_class_csv(classes: Sequence[Mapping[str, Any]]) -> str:
    """All classes in the order of their indices; scores as fractions, nothing where there is none."""
    keys = [key for key in CLASS_COLUMNS.values() if any(key in entry for entry in classes)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", "name", "seen", "is_thing", *keys])
    for index, entry in enumerate(classes):
        values = [_plain(entry.get(key)) for key in ("name", "seen", "is_thing", *keys)]
        writer.writerow([index, *("" if value is None else value for value in values)])
    return text.getvalue()


def folder_names(benchmarks: Sequence[str]) -> dict[str, str]:
    """A folder name for each benchmark: its name, without what a file system may refuse; no two alike."""
    folders: dict[str, str] = {}
    for benchmark in benchmarks:
        plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", benchmark).strip("._")[:100] or "benchmark"
        folder, number = plain, 2
        while folder.lower() in {taken.lower() for taken in folders.values()}:
            folder, number = f"{plain}_{number}", number + 1
        folders[benchmark] = folder
    return folders


def versions_used() -> dict[str, str]:
    """Versions of Python and of the packages that decide on the numbers, of those that are installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _encode(text: str) -> bytes:
    """UTF-8; what cannot be written in it (a lone surrogate of a file name) becomes a question mark."""
    return text.encode("utf-8", "replace")


def _plain(value: Any) -> Any:
    """What JSON can hold: arrays as lists, nan and infinity as None, what it does not know as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    return value if value is None else str(value)
