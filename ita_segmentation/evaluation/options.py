"""What `run_eval.py` can be asked for: its arguments, and the predictor that they describe."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ita_segmentation.checkpoints import MODEL_HELP, load_checkpoint, resolve_checkpoint, set_shortest_side
from ita_segmentation.class_names import read_vocabulary
from ita_segmentation.cli.parser import ConfigArgumentParser, fraction, positive_int
from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.evaluation.benchmarks import Benchmark
from ita_segmentation.evaluation.predictors import TASKS, Predictor
from ita_segmentation.files import read_text

TTA_SCALES = (0.75, 1.0, 1.25)
WINDOW = 640
OWN = "the checkpoint's own"


def build_parser() -> ConfigArgumentParser:
    """The arguments of `run_eval.py`."""
    parser = ConfigArgumentParser(description="Scores a checkpoint on benchmarks.")
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="DIR_OR_ID",
        help=f"{MODEL_HELP}; ITA, or another transformers model",
    )
    add("--benchmarks", nargs="+", required=True, metavar="NAME", help="`scenes`, or data sets in --data_dir")
    add("--data_dir", type=Path, metavar="DIR", help="where run_prepare.py put the data sets")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    add("--tasks", nargs="+", choices=TASKS, help="what to score (all that labels and model allow)")
    add("--split", help="split of the data sets (the one for validation)")
    add("--limit", type=positive_int, help="only so many images of each benchmark")
    add("--batch_size", type=positive_int, default=1, help="images at a time (default %(default)s)")
    add("--num_workers", type=positive_int, default=2, help="threads that decode (default %(default)s)")

    group = parser.add_argument_group("how images are seen")
    add = group.add_argument
    add("--size", type=positive_int, help=f"shortest side fed to the network ({OWN})")
    add("--longest_side", type=positive_int, help="limit of the longest side (grows with --size)")
    window_help = f"semantic scores from windows of this side in the network's input (default {WINDOW})"
    add("--sliding_window", nargs="?", type=positive_int, const=WINDOW, metavar="SIDE", help=window_help)
    add("--stride", type=positive_int, help="distance of the windows (two thirds of their side)")
    add("--tta", action="store_true", help="semantic scores from several scales, each also mirrored")
    add("--tta_scales", nargs="+", type=float, metavar="S", help=f"those scales (default {TTA_SCALES})")
    add("--mixed_precision", choices=("no", "bf16", "fp16"), help="what accelerate was told, by default")
    add("--panoptic_threshold", type=fraction, default=0.0, help="least segment score (default %(default)s)")

    group = parser.add_argument_group("words")
    add = group.add_argument
    vocabulary_help = (
        "names of the classes, JSON or `id:name,synonym` lines; with several benchmarks NAME=FILE"
    )
    add("--vocabulary", nargs="+", metavar="FILE", help=vocabulary_help)
    templates_help = f"text file, one prompt with a {{}} a line, or `none` for bare names ({OWN})"
    add("--templates", metavar="FILE", help=templates_help)
    missing_help = "baselines: classes that the model has no label for are scored as never predicted"
    add("--allow_missing_classes", action="store_true", help=missing_help)

    group = parser.add_argument_group("the run")
    add = group.add_argument
    add("--save_seconds", type=float, default=30.0, help="how often counts are kept (default %(default)s)")
    add("--restart", action="store_true", help="forget what an interrupted run had counted")
    add("--num_examples", type=int, default=4, help="best and worst images shown (default %(default)s each)")
    add("--update_model_card", action="store_true", help="put the scores into the checkpoint's README.md")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Looks for options that contradict each other.

    Raises:
        ITAError: the first of them.
    """
    by_views = options.tta or options.sliding_window is not None
    if options.stride is not None and options.sliding_window is None:
        raise ITAError("--stride needs --sliding_window")
    if options.stride is not None and options.stride > options.sliding_window:
        raise ITAError(f"--stride {options.stride} is above --sliding_window {options.sliding_window}")
    if options.tta_scales is not None and not options.tta:
        raise ITAError("--tta_scales needs --tta")
    if by_views and set(options.tasks or ()) - {"semantic"}:
        raise ITAError("--sliding_window and --tta score the semantic task only")
    if options.longest_side is not None and options.size is None:
        raise ITAError("--longest_side needs --size")
    if options.longest_side is not None and options.longest_side < options.size:
        raise ITAError(f"--longest_side {options.longest_side} is below --size {options.size}")
    if not (math.isfinite(options.save_seconds) and options.save_seconds >= 0):
        raise ITAError(f"--save_seconds must be 0 or more, got {options.save_seconds}")
    if options.num_examples < 0:
        raise ITAError(f"--num_examples must be 0 or more, got {options.num_examples}")


# ------------------------------------------------------------------------------------------------------------
# Words


def vocabulary_files(given: Sequence[str] | None, benchmarks: Sequence[str]) -> dict[str, Path]:
    """Benchmark -> the vocabulary file that `--vocabulary` gives it.

    Raises:
        ITAError: it is not clear which file is for which benchmark.
    """
    if not given:
        return {}
    pairs = [entry.partition("=") for entry in given]
    if len(given) == 1 and len(benchmarks) == 1 and (not pairs[0][1] or Path(given[0]).exists()):
        return {benchmarks[0]: Path(given[0])}
    files = {}
    for entry, (name, equals, file) in zip(given, pairs, strict=True):
        if equals and name not in benchmarks:
            raise ITAError(f"--vocabulary {entry}: {name} is none of the benchmarks {', '.join(benchmarks)}")
        if not equals:
            raise ITAError(f"--vocabulary {entry}: with several benchmarks, say NAME=FILE for each")
        if name in files:
            raise ITAError(f"--vocabulary names two files for {name}")
        files[name] = Path(file)
    return files


def read_words(path: Path, classes: Sequence[Sequence[str]]) -> list[list[str]]:
    """A vocabulary file for the classes of a benchmark, in their order.

    Raises:
        ITAError: it has another number of classes, or names them in another order.
    """
    words = read_vocabulary(path)
    if len(words) != len(classes):
        raise ITAError(f"the vocabulary file {path} has {len(words)} classes, the benchmark {len(classes)}")
    place = {name.casefold(): index for index, names in enumerate(classes) for name in names[:1]}
    for index, (given, own) in enumerate(zip(words, classes, strict=True)):
        known = {name.casefold() for name in own}
        elsewhere = [place[name.casefold()] for name in given[:1] if name.casefold() in place]
        if elsewhere and elsewhere[0] != index and not known & {name.casefold() for name in given}:
            raise ITAError(
                f"the vocabulary file {path} is in another order: its class {index} is {given[0]!r}, "
                f"the benchmark's is {own[0]!r}"
            )
    return words


def read_templates(given: str | None) -> list[str] | None:
    """Prompt templates of a text file, one a line; None for the checkpoint's own.

    Raises:
        ITAError: there is none in it, or one has no place for the name.
    """
    if given is None:
        return None
    if given == "none":
        return ["{}"]
    lines = [line.strip() for line in read_text(Path(given)).splitlines() if line.strip()]
    if not lines:
        raise ITAError(f"the templates file {given} is empty")
    for line in lines:
        if line.count("{}") != 1:
            raise ITAError(f"the templates file {given}: a template has {{}} once, got {line!r}")
    return lines


# ------------------------------------------------------------------------------------------------------------
# Models


class Candidate:
    """The model that is scored, loaded once for all benchmarks.

    Args:
        options: of `build_parser`.
        accelerator: of accelerate; says device and precision.

    Raises:
        ITAError: the checkpoint cannot be loaded.
    """

    def __init__(self, options: argparse.Namespace, accelerator: Any) -> None:
        from ita_segmentation.evaluation.baselines.predictors import is_baseline

        self.options, self.accelerator = options, accelerator
        self.is_baseline = is_baseline(Path(options.model))
        self.path = Path(options.model) if self.is_baseline else resolve_checkpoint(options.model)
        self.templates = read_templates(options.templates)
        if self.is_baseline and (options.sliding_window or options.tta or options.templates):
            raise ITAError("--sliding_window, --tta and --templates are for ITA checkpoints")
        if not self.is_baseline:
            self.model, self.processor = load_checkpoint(self.path, str(accelerator.device))
            set_shortest_side(self.processor, options.size)
            if options.longest_side is not None:
                size = type(self.processor.size)
                self.processor.size = size(shortest_edge=options.size, longest_edge=options.longest_side)

    def predictor(self, benchmark: Benchmark, words: Sequence[Sequence[str]]) -> Predictor:
        """The model with the words of a benchmark.

        Raises:
            ITAError: they do not fit each other.
        """
        options = self.options
        if self.is_baseline:
            import torch

            from ita_segmentation.evaluation.baselines.predictors import load_baseline

            return load_baseline(
                self.path,
                words,
                benchmark.is_thing,
                str(self.accelerator.device),
                {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision),
                options.size,
                allow_missing=options.allow_missing_classes,
            )
        from ita_segmentation.evaluation.ita_predictor import ITAPredictor
        from ita_segmentation.evaluation.tta import ViewPlan

        window = options.sliding_window
        try:
            return ITAPredictor(
                self.model,
                self.processor,
                words,
                benchmark.is_thing,
                templates=self.templates,
                plan=ViewPlan(
                    scales=tuple(options.tta_scales or TTA_SCALES) if options.tta else (1.0,),
                    flip=options.tta,
                    window=window,
                    stride=options.stride or (None if window is None else max(1, 2 * window // 3)),
                ),
                panoptic_threshold=options.panoptic_threshold,
                views_at_once=options.batch_size,
                autocast=self.accelerator.autocast,
            )
        except ValueError as error:
            raise ITAError(one_line(error)) from error

    def settings(self) -> dict[str, Any]:
        """What decides the scores beside the data set, as JSON can hold it."""
        options = self.options
        size = {} if self.is_baseline else dict(self.processor.size)
        return {
            "batch_size": options.batch_size,
            "shortest_side": size.get("shortest_edge", options.size),
            "longest_side": size.get("longest_edge", options.longest_side),
            "sliding_window": options.sliding_window,
            "stride": options.stride,
            "tta": list(options.tta_scales or TTA_SCALES) if options.tta else None,
            "precision": self.accelerator.mixed_precision,
            "panoptic_threshold": options.panoptic_threshold,
            "templates": self.templates or "checkpoint",
            "allow_missing_classes": options.allow_missing_classes,
        }

    def identity(self) -> list[Any]:
        """What tells this checkpoint from another, for interrupted runs: its files, their sizes and times."""
        files = sorted(path for path in self.path.glob("*") if path.is_file() and path.suffix != ".md")
        stats = [(path.name, path.stat()) for path in files]
        return [str(self.path.resolve()), [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]]
