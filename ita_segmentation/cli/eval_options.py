"""The arguments of `ita eval`, and the model that they describe."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ita_segmentation.checkpoints import load_checkpoint, resolve_checkpoint, set_shortest_side
from ita_segmentation.class_names import read_vocabulary
from ita_segmentation.cli.options import add_dtype, add_model, add_output, fraction, positive_int, refuse_any
from ita_segmentation.cli.parser import ConfigArgumentParser
from ita_segmentation.errors import ITAError, UsageError, one_line
from ita_segmentation.evaluation.benchmarks import Benchmark
from ita_segmentation.evaluation.predictors import EVALUATION_TASKS, Predictor
from ita_segmentation.files import read_text

TTA_SCALES = (0.75, 1.0, 1.25)
WINDOW = 640


def build_parser() -> ConfigArgumentParser:
    """Return the parser of `ita eval`."""
    parser = ConfigArgumentParser(
        description="Score a checkpoint on benchmarks.", renamed={"--num_examples": "--num_report_images"}
    )
    add = parser.add_argument
    add_model(parser, "; also of other transformers models")
    add("--benchmarks", nargs="+", required=True, metavar="NAME", help="`scenes`, or datasets in --data_dir")
    add("--data_dir", type=Path, metavar="DIR", help="folder of the datasets that `ita prepare` wrote")
    add_output(parser)
    add("--tasks", nargs="+", choices=EVALUATION_TASKS, help="what to score (default: all that is possible)")
    add("--split", help="split of the datasets (default: validation)")
    add("--limit", type=positive_int, metavar="N", help="score only the first N images of each benchmark")

    add = parser.add_argument_group("input size and test-time augmentation").add_argument
    add("--size", type=positive_int, help="shortest side of the network's input (default: the checkpoint's)")
    add("--longest_side", type=positive_int, help="limit of the longest side (default: scaled with --size)")
    text = f"average windows of this side in the network's input (default side: {WINDOW})"
    add("--sliding_window", nargs="?", type=positive_int, const=WINDOW, metavar="SIDE", help=text)
    add("--stride", type=positive_int, help="distance of the windows (default: two thirds of their side)")
    add("--tta", action="store_true", help="score several scales, each also mirrored")
    add("--tta_scales", nargs="+", type=float, metavar="S", help=f"those scales (default: {TTA_SCALES})")

    add = parser.add_argument_group("class names").add_argument
    text = "class names: JSON, or lines id:name,synonym,...; with several benchmarks NAME=FILE"
    add("--vocabulary", nargs="+", metavar="FILE", help=text)
    add("--templates", metavar="FILE", help="text file, one prompt with {} a line; `none` for plain names")
    text = "baselines: score classes without a label as never predicted"
    add("--allow_missing_classes", action="store_true", help=text)

    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--batch_size", type=positive_int, default=1, help="images at a time (default: %(default)s)")
    add("--num_workers", type=positive_int, default=2, help="threads that decode (default: %(default)s)")
    add_dtype(group)
    add("--mixed_precision", choices=("no", "bf16", "fp16"), help="default: accelerate's setting")
    add("--panoptic_threshold", type=fraction, default=0.0, help="least segment score (default: %(default)s)")
    text = "best and worst images that the report shows (default: %(default)s each)"
    add("--num_report_images", type=int, default=4, help=text)
    add("--save_seconds", type=float, default=30.0, help="interval of saving counts (default: %(default)s)")
    add("--restart", action="store_true", help="delete what an interrupted run has counted")
    add("--update_model_card", action="store_true", help="write the scores into the checkpoint's README.md")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Refuse options that contradict each other."""
    augmented = options.tta or options.sliding_window is not None
    problems: dict[str, object] = {
        "--stride needs --sliding_window": options.stride is not None and options.sliding_window is None,
        f"--stride {options.stride} is above --sliding_window {options.sliding_window}": (
            None not in (options.stride, options.sliding_window) and options.stride > options.sliding_window
        ),
        "--tta_scales needs --tta": options.tta_scales is not None and not options.tta,
        "--sliding_window and --tta score the semantic task only": (
            augmented and set(options.tasks or ()) - {"semantic"}
        ),
        "--longest_side needs --size": options.longest_side is not None and options.size is None,
        f"--longest_side {options.longest_side} is below --size {options.size}": (
            None not in (options.longest_side, options.size) and options.longest_side < options.size
        ),
        f"--save_seconds must be 0 or more, got {options.save_seconds}": (
            not math.isfinite(options.save_seconds) or options.save_seconds < 0
        ),
        f"--num_report_images must be 0 or more, got {options.num_report_images}": options.num_report_images
        < 0,
    }
    refuse_any(problems)


def vocabulary_files(given: Sequence[str] | None, benchmarks: Sequence[str]) -> dict[str, Path]:
    """Return the vocabulary file of each benchmark that `--vocabulary` gives one."""
    if not given:
        return {}
    pairs = [entry.partition("=") for entry in given]
    if len(given) == 1 and len(benchmarks) == 1 and (not pairs[0][1] or Path(given[0]).exists()):
        return {benchmarks[0]: Path(given[0])}
    files: dict[str, Path] = {}
    for entry, (name, equals, file) in zip(given, pairs, strict=True):
        if equals and name not in benchmarks:
            raise UsageError(
                f"--vocabulary {entry}: {name} is none of the benchmarks {', '.join(benchmarks)}"
            )
        if not equals:
            raise UsageError(f"--vocabulary {entry}: with several benchmarks, give NAME=FILE for each")
        if name in files:
            raise UsageError(f"--vocabulary names two files for {name}")
        files[name] = Path(file)
    return files


def read_class_names(path: Path, classes: Sequence[Sequence[str]]) -> list[list[str]]:
    """Read a vocabulary file for the classes of a benchmark, in their order."""
    from modeling_ita.text import normal_form

    given = read_vocabulary(path)
    if len(given) != len(classes):
        raise ITAError(f"the vocabulary file {path} has {len(given)} classes, the benchmark {len(classes)}")
    index_of = {normal_form(names[0]): index for index, names in enumerate(classes)}
    for index, (names, own) in enumerate(zip(given, classes, strict=True)):
        forms = {normal_form(name) for name in names}
        other = index_of.get(normal_form(names[0]), index)
        if other != index and not forms & {normal_form(name) for name in own}:
            raise ITAError(
                f"the vocabulary file {path} is in another order: its class {index} is {names[0]!r}, "
                f"the benchmark's is {own[0]!r}"
            )
    return given


def read_templates(given: str | None) -> list[str] | None:
    """Read prompt templates, one a line; None for the checkpoint's own."""
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


class ModelUnderTest:
    """The model that is scored, loaded once for all benchmarks."""

    def __init__(self, options: argparse.Namespace, accelerator: Any) -> None:
        from ita_segmentation.evaluation.baselines.loading import is_baseline

        self.options, self.accelerator = options, accelerator
        self.is_baseline = is_baseline(Path(options.model))
        self.path = Path(options.model) if self.is_baseline else resolve_checkpoint(options.model)
        self.templates = read_templates(options.templates)
        if self.is_baseline and (options.sliding_window or options.tta or options.templates):
            raise UsageError("--sliding_window, --tta and --templates are for ITA checkpoints")
        if not self.is_baseline:
            self.model, self.processor = load_checkpoint(self.path, str(accelerator.device), options.dtype)
            set_shortest_side(self.processor, options.size)
            if options.longest_side is not None:
                size = type(self.processor.size)
                self.processor.size = size(shortest_edge=options.size, longest_edge=options.longest_side)

    def predictor(self, benchmark: Benchmark, classes: Sequence[Sequence[str]]) -> Predictor:
        """Return the model with these names of a benchmark's classes."""
        options = self.options
        if self.is_baseline:
            import torch

            from ita_segmentation.evaluation.baselines.loading import load_baseline

            return load_baseline(
                self.path,
                classes,
                benchmark.is_thing,
                str(self.accelerator.device),
                {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision),
                options.size,
                allow_missing=options.allow_missing_classes,
            )
        from ita_segmentation.evaluation.ita_predictor import ITAPredictor
        from ita_segmentation.evaluation.tta import TestTimeAugmentation

        window = options.sliding_window
        try:
            return ITAPredictor(
                self.model,
                self.processor,
                classes,
                benchmark.is_thing,
                templates=self.templates,
                augmentation=TestTimeAugmentation(
                    scales=tuple(options.tta_scales or TTA_SCALES) if options.tta else (1.0,),
                    flip=options.tta,
                    window=window,
                    stride=options.stride or (None if window is None else max(1, 2 * window // 3)),
                ),
                panoptic_threshold=options.panoptic_threshold,
                crops_at_once=options.batch_size,
                autocast=self.accelerator.autocast,
            )
        except ValueError as error:
            raise ITAError(one_line(error)) from error

    def settings(self) -> dict[str, Any]:
        """Return what decides the scores besides the dataset, as JSON can hold it."""
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
            "dtype": "float32" if self.is_baseline else str(self.model.dtype).removeprefix("torch."),
            "panoptic_threshold": options.panoptic_threshold,
            "templates": self.templates or "checkpoint",
            "allow_missing_classes": options.allow_missing_classes,
        }

    def identity(self) -> list[Any]:
        """Return what distinguishes this checkpoint from others, for interrupted runs: its files and their times."""
        files = sorted(path for path in self.path.glob("*") if path.is_file() and path.suffix != ".md")
        stats = [(path.name, path.stat()) for path in files]
        return [str(self.path.resolve()), [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]]
