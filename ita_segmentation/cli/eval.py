"""Score a checkpoint on benchmarks: tables, `results.json`, and an HTML report.

    ita eval --model models/ita-tiny --benchmarks scenes --output scores
    accelerate launch run_eval.py --model DIR --benchmarks ade20k-150 pascal-voc-20 --data_dir data --output scores

Datasets are those that `ita prepare` wrote. Mean IoU, panoptic quality and mask AP are computed as far as labels and
model allow; any number of processes gives the same scores, and the same command resumes an interrupted run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from ita_segmentation.cli.eval_options import (
    ModelUnderTest,
    build_parser,
    check_options,
    read_class_names,
    vocabulary_files,
)
from ita_segmentation.errors import ITAError, UsageError, one_line
from ita_segmentation.evaluation.benchmarks import Benchmark, load_benchmark
from ita_segmentation.files import output_folder


def evaluate(argv: Sequence[str] | None = None) -> int:
    """Score a checkpoint as the arguments say."""
    options = build_parser().parse_command_line(argv)
    check_options(options)
    output_folder(options.output)
    names = list(dict.fromkeys(options.benchmarks))
    if len({_file_name(name) for name in names}) < len(names):
        raise UsageError("two benchmarks have the same name; score them in two runs")
    files = vocabulary_files(options.vocabulary, names)

    import torch
    from accelerate import Accelerator

    from ita_segmentation.evaluation.reporting.report import summary_table, write_results
    from ita_segmentation.hub.model_index import update_model_card, write_model_index

    try:
        # Without being told so, processes that find no accelerator do not find each other either.
        on_cpu = not torch.accelerator.is_available()
        accelerator = Accelerator(cpu=on_cpu, mixed_precision=options.mixed_precision)
    except ValueError as error:
        raise ITAError(one_line(error)) from error
    with accelerator.main_process_first():
        benchmarks = {
            name: load_benchmark(name, options.data_dir, options.split, options.limit) for name in names
        }
    classes = {
        name: read_class_names(files[name], benchmark.classes) if name in files else benchmark.classes
        for name, benchmark in benchmarks.items()
    }
    model = ModelUnderTest(options, accelerator)
    if accelerator.is_main_process:
        for name, benchmark in benchmarks.items():
            if options.split is None and benchmark.split != "validation":
                sys.stderr.write(f"{name} has no validation split: its {benchmark.split} is scored\n")
    runs = [_Run(model, name, benchmarks[name], classes[name], files.get(name)) for name in names]
    for run in runs:
        run.score()
    if accelerator.is_main_process:
        results = {run.name: run.results for run in runs}
        confusions = {run.name: run.confusion for run in runs if run.confusion is not None}
        examples = {run.name: run.examples for run in runs}
        paths = write_results(options.output, str(options.model), results, confusions, examples)
        write_model_index(options.output / "model_index.yaml", results, str(options.model))
        if options.update_model_card:
            update_model_card(model.path / "README.md", results)
        for run in runs:
            run.store.delete()
        print(summary_table(results), end="")
        print(f"Scores in percent; every class: {paths[1]}")
    accelerator.wait_for_everyone()
    return 0


class _Run:
    """One benchmark of the command."""

    def __init__(
        self,
        model: ModelUnderTest,
        name: str,
        benchmark: Benchmark,
        classes: Sequence[Sequence[str]],
        vocabulary_file: Path | None,
    ) -> None:
        from ita_segmentation.evaluation.evaluator import EvalConfig
        from ita_segmentation.evaluation.resume import ResumeStore

        options = model.options
        self.model, self.name, self.benchmark, self.classes = model, name, benchmark, classes
        self.predictor = model.predictor(benchmark, classes)
        possible = benchmark.tasks & self.predictor.tasks
        tasks = possible if options.tasks is None else frozenset(options.tasks)
        for task in sorted(tasks - possible):
            who = "model" if task in benchmark.tasks else "labels"
            raise ITAError(f"{name}: the {who} cannot be scored for the task {task}")
        self.config = EvalConfig(tasks, options.batch_size, options.limit, options.num_workers)
        self.settings = {
            "split": benchmark.split,
            "limit": options.limit,
            **model.settings(),
            "vocabulary": "the dataset's" if vocabulary_file is None else str(vocabulary_file),
        }
        description = {
            "model": model.identity(),
            "dataset": benchmark.identity,
            "class names": classes,
            "tasks": sorted(tasks),
            **self.settings,
            **_versions(),
        }
        folder = options.output / ".progress" / _file_name(name)
        self.store = ResumeStore(folder, description, options.save_seconds)
        self.results: dict[str, Any] = {}
        self.confusion: np.ndarray | None = None
        self.examples: list[Any] = []

    def score(self) -> None:
        """Score the benchmark."""
        from ita_segmentation.evaluation.evaluator import evaluate_benchmark
        from ita_segmentation.evaluation.reporting.examples import worst_and_best

        options, accelerator = self.model.options, self.model.accelerator
        if options.restart and accelerator.is_main_process:
            self.store.delete()
        accelerator.wait_for_everyone()
        started = time.monotonic()
        scores = evaluate_benchmark(self.predictor, self.benchmark, self.config, self.store, self.name)
        if scores is None:
            return
        seen = self.benchmark.seen or self.predictor.seen
        names = [names[0] for names in self.classes]
        self.results = scores.results(names, seen, self.benchmark.is_thing)
        self.results["settings"] = self.settings | {
            "notes": list(self.predictor.notes),
            "seconds": round(time.monotonic() - started, 1),
            "processes": accelerator.num_processes,
            "device": accelerator.device.type,
            "date": date.today().isoformat(),
            **_versions(),
        }
        if "semantic" in self.config.tasks:
            self.confusion = scores.confusion.matrix.numpy()
            self.examples = worst_and_best(self.predictor, self.benchmark, scores, options.num_report_images)


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _file_name(name: str) -> str:
    return Path(name).name or "benchmark"
