"""`ita prepare`: convert a benchmark's official release to a `datasets` dataset on disk (docs/datasets.md).

    ita prepare pascal-voc-20 --source VOCdevkit/VOC2012 --output data/pascal-voc-20 --split validation

`load_dataset(OUTPUT)` reads the result. Run again after an interruption, it continues. Every file that is missing or
malformed is named, and then the output stays as it was.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ita_segmentation.cli.options import add_output, positive_int
from ita_segmentation.cli.parser import ConfigArgumentParser
from ita_segmentation.data.benchmarks import FOLDER, SOURCE_DATASETS, open_source_dataset
from ita_segmentation.data.preparation import PrepareConfig, PrepareError, prepare
from ita_segmentation.errors import UsageError
from ita_segmentation.files import output_folder

SHOWN_PROBLEMS = 20


def build_parser() -> ConfigArgumentParser:
    """Build the parser of the command line."""
    parser = ConfigArgumentParser(
        description="Convert a benchmark's official release to a datasets dataset on disk.",
        renamed={"--classes": "--vocabulary"},
    )
    add, benchmarks = parser.add_argument, ", ".join(SOURCE_DATASETS)
    add("benchmark", choices=sorted(SOURCE_DATASETS), metavar="BENCHMARK", help=benchmarks)
    add("--source", type=Path, required=True, metavar="DIR", help="folder of the release")
    add_output(parser, "folder of the dataset")
    add("--split", help="train or validation; other splits in the output are kept (default: all splits)")
    add("--num_proc", type=positive_int, default=1, metavar="N", help="processes (default %(default)s)")
    add("--limit", type=positive_int, metavar="N", help="only the first N images of each split")
    text = f"class names of {FOLDER} (default: its classes.json or classes.txt)"
    add("--vocabulary", type=Path, metavar="FILE", help=text)
    return parser


def prepare_benchmark(argv: Sequence[str] | None = None) -> int:
    """Prepare the benchmark that the arguments name."""
    arguments = build_parser().parse_command_line(argv)
    if arguments.vocabulary is not None and arguments.benchmark != FOLDER:
        raise UsageError(f"--vocabulary is for {FOLDER}: {arguments.benchmark} has its own classes")
    output_folder(arguments.output)
    dataset = open_source_dataset(arguments.benchmark, arguments.source, arguments.vocabulary)
    if arguments.split not in (None, *dataset.splits):
        raise UsageError(f"--split: no split {arguments.split!r}, only {', '.join(dataset.splits)}")
    config = PrepareConfig(
        benchmark=arguments.benchmark,
        dataset=dataset,
        source=arguments.source,
        output=arguments.output,
        splits=dataset.splits if arguments.split is None else [arguments.split],
        limit=arguments.limit,
        num_proc=arguments.num_proc,
    )
    try:
        result = prepare(config)
    except PrepareError as error:
        more = len(error.problems) - SHOWN_PROBLEMS
        lines = error.problems[:SHOWN_PROBLEMS] + ([f"and {more:,} more"] if more > 0 else [])
        sys.stderr.write("".join(f"  {line}\n" for line in lines))
        raise
    counts = ", ".join(f"{split}: {count:,} images" for split, count in result.num_images.items())
    done = f"{arguments.output}: {counts}"
    print(done if result.written else f"{arguments.output} is up to date ({counts}): nothing to do")
    return 0
