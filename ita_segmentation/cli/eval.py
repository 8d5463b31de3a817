"""Scores a checkpoint on benchmarks: tables for people, `results.json` for programs, a report to look at.

    python run_eval.py --model models/ita-tiny --benchmarks scenes --output scores
    accelerate launch run_eval.py --model DIR --benchmarks ade20k-150 pascal-voc-20 --data_dir data --output scores

Data sets are what `run_prepare.py` made. Mean IoU, panoptic quality and mask AP, as far as labels and model allow;
any number of processes gives the same scores, and the same command goes on where an interrupted one was.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ita_segmentation.cli.parser import run_command
from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.evaluation.options import (
    Candidate,
    build_parser,
    check_options,
    read_words,
    vocabulary_files,
)
from ita_segmentation.files import output_folder


def main() -> NoReturn:
    """The door: the process's arguments in, its exit status out."""
    run_command(evaluate)


def evaluate(argv: Sequence[str] | None = None) -> int:
    """Does what the arguments say. Returns 0.

    Raises:
        ITAError: what stops it, in one line.
    """
    options = build_parser().parse_command_line(argv)
    check_options(options)
    output_folder(options.output)
    names = list(dict.fromkeys(options.benchmarks))
    if len({_file_name(name) for name in names}) < len(names):
        raise ITAError("two benchmarks have the same name; score them in two runs")
    files = vocabulary_files(options.vocabulary, names)

    import torch
    from accelerate import Accelerator

    from ita_segmentation.evaluation.benchmarks import load_benchmark
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
    words = {
        name: read_words(files[name], benchmark.classes) if name in files else benchmark.classes
        for name, benchmark in benchmarks.items()
    }
    candidate = Candidate(options, accelerator)
    if accelerator.is_main_process:
        for name, benchmark in benchmarks.items():
            if options.split is None and benchmark.split != "validation":
                print(f"{name} has no validation split: its {benchmark.split} is scored", file=sys.stderr)
    runs = [_Run(candidate, name, benchmarks[name], words[name], files.get(name)) for name in names]
    for run in runs:
        run.work()
    if accelerator.is_main_process:
        results = {run.name: run.results for run in runs}
        confusions = {run.name: run.confusion for run in runs if run.confusion is not None}
        paths = write_results(
            options.output, str(options.model), results, confusions, {run.name: run.examples for run in runs}
        )
        write_model_index(options.output / "model_index.yaml", results, str(options.model))
        if options.update_model_card:
            update_model_card(candidate.path / "README.md", results)
        for run in runs:
            run.progress.forget()
        print(summary_table(results), end="")
        print(f"Scores in per cent; every class: {paths[1]}")
    accelerator.wait_for_everyone()
    return 0


class _Run:
    """One benchmark of the command."""

    def __init__(
        self,
        candidate: Candidate,
        name: str,
        benchmark: Any,
        words: Sequence[Sequence[str]],
        vocabulary_file: Path | None,
    ) -> None:
        from ita_segmentation.evaluation.progress import Progress, fingerprint

        options: argparse.Namespace = candidate.options
        self.candidate, self.name, self.benchmark, self.words = candidate, name, benchmark, words
        self.predictor = candidate.predictor(benchmark, words)
        possible = benchmark.tasks & self.predictor.tasks
        self.tasks = possible if options.tasks is None else frozenset(options.tasks)
        for task in sorted(self.tasks - possible):
            who = "model" if task in benchmark.tasks else "labels"
            raise ITAError(f"{name}: the {who} cannot be scored for the task {task}")
        self.settings = {
            "split": benchmark.split,
            "limit": options.limit,
            **candidate.settings(),
            "vocabulary": "the data set's" if vocabulary_file is None else str(vocabulary_file),
        }
        key = [
            candidate.identity(),
            benchmark.identity,
            self.settings,
            words,
            sorted(self.tasks),
            _versions(),
        ]
        folder = options.output / ".progress" / f"{_file_name(name)}-{fingerprint({'evaluation': key})}"
        self.progress = Progress(folder, options.save_seconds)
        self.results: dict[str, Any] = {}
        self.confusion: np.ndarray | None = None
        self.examples: list[Any] = []

    def work(self) -> None:
        """Scores it; the main process has the results then."""
        from ita_segmentation.evaluation.evaluator import Workload, evaluate_benchmark
        from ita_segmentation.evaluation.reporting.worst_and_best import worst_and_best

        options, accelerator = self.candidate.options, self.candidate.accelerator
        if options.restart and accelerator.is_main_process:
            self.progress.forget()
        accelerator.wait_for_everyone()
        started = time.monotonic()
        workload = Workload(options.batch_size, options.limit, options.num_workers)
        scores = evaluate_benchmark(
            self.predictor, self.benchmark, self.tasks, workload, self.progress, self.name
        )
        if scores is None:
            return
        seen = self.benchmark.seen or self.predictor.seen
        names = [names[0] for names in self.words]
        self.results = scores.results(names, seen, self.benchmark.is_thing)
        self.results["settings"] = self.settings | {
            "notes": list(getattr(self.predictor, "notes", ())),
            "seconds": round(time.monotonic() - started, 1),
            "processes": accelerator.num_processes,
            "device": accelerator.device.type,
            "date": date.today().isoformat(),
            **_versions(),
        }
        if "semantic" in self.tasks:
            self.confusion = scores.metrics["semantic"].matrix
            self.examples = worst_and_best(self.predictor, self.benchmark, scores, options.num_examples)


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _file_name(name: str) -> str:
    return Path(name).name or "benchmark"
