"""`ita prepare`: convert a benchmark's official release to a `datasets` dataset on disk (docs/datasets.md).

    ita prepare pascal-voc-20 --source VOCdevkit/VOC2012 --output data/pascal-voc-20 --split validation

`load_dataset(OUTPUT)` reads the result. Run again after an interruption, it continues. Every file that is missing or
malformed is named, and then the output stays as it was.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ita_segmentation.cli.parser import ConfigArgumentParser, positive_int
from ita_segmentation.data.benchmarks import FOLDER, SOURCE_DATASETS, open_source_dataset
from ita_segmentation.data.preparation import PrepareConfig, PrepareError, prepare
from ita_segmentation.errors import UsageError
from ita_segmentation.files import output_folder

SHOWN_PROBLEMS = 20


def build_parser() -> ConfigArgumentParser:
    """Build the parser of the command line."""
    parser = ConfigArgumentParser(
        description="Convert a benchmark's official release to a datasets dataset on disk."
    )
    parser.add_argument(
        "benchmark", choices=sorted(SOURCE_DATASETS), metavar="BENCHMARK", help=", ".join(SOURCE_DATASETS)
    )
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help="folder of the release")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the dataset")
    parser.add_argument(
        "--split", help="train or validation; other splits in the output are kept (default: all splits)"
    )
    parser.add_argument(
        "--num_proc",
        type=positive_int,
        default=1,
        metavar="N",
        help="number of processes (default %(default)s)",
    )
    parser.add_argument(
        "--limit", type=positive_int, metavar="N", help="only the first N images of each split"
    )
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help=f"class names of {FOLDER} (default: its classes.json or classes.txt)",
    )
    return parser


def prepare_benchmark(argv: Sequence[str] | None = None) -> int:
    """Prepare the benchmark that the arguments name."""
    arguments = build_parser().parse_command_line(argv)
    if arguments.classes is not None and arguments.benchmark != FOLDER:
        raise UsageError(f"--classes is for {FOLDER}: {arguments.benchmark} has its own classes")
    output_folder(arguments.output)
    dataset = open_source_dataset(arguments.benchmark, arguments.source, arguments.classes)
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
    if not result.written:
        print(f"{arguments.output} is up to date ({counts}): nothing to do")
    else:
        print(f"{arguments.output}: {counts}")
    return 0
