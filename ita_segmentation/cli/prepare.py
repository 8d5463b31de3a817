"""Turns a benchmark's official release into a `datasets` data set on disk (docs/datasets.md).

    python run_prepare.py pascal-voc-20 --source VOCdevkit/VOC2012 --output data/pascal-voc-20 --split validation

Images stay as they are, labels become lossless PNGs, and the data set knows its own classes: `load_dataset(OUTPUT)`
reads it, with `streaming=True` too. A run that was interrupted goes on where it was when the command is given again;
one with nothing to do says so. Every file that is missing or malformed is named, and then nothing is published.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ita_segmentation.cli.parser import ConfigArgumentParser, positive_int, run_command
from ita_segmentation.data.benchmarks.registry import FOLDER, RELEASES, open_release
from ita_segmentation.data.benchmarks.release import ReleaseError
from ita_segmentation.data.preparation.prepare import Preparation, PrepareError, prepare
from ita_segmentation.errors import ITAError
from ita_segmentation.files import output_folder

SHOWN_PROBLEMS = 20


def build_parser() -> ConfigArgumentParser:
    parser = ConfigArgumentParser(
        description="Turns a benchmark's official release into a datasets data set on disk."
    )
    parser.add_argument("benchmark", choices=sorted(RELEASES), metavar="BENCHMARK", help=", ".join(RELEASES))
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help="folder of the release")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the data set")
    parser.add_argument(
        "--split", help="train or validation, added to what the output has (default: all there are)"
    )
    parser.add_argument(
        "--num_proc", type=positive_int, default=1, metavar="N", help="processes (default %(default)s)"
    )
    parser.add_argument(
        "--limit", type=positive_int, metavar="N", help="only the first N images of each split"
    )
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help=f"class names of {FOLDER} (its classes.json or classes.txt)",
    )
    return parser


def main() -> NoReturn:
    """The door: the process's arguments in, its exit status out."""
    run_command(prepare_benchmark)


def prepare_benchmark(argv: Sequence[str] | None = None) -> int:
    """Does what the arguments say. Returns 0, or 1 where the release or some of its images cannot be used.

    Raises:
        ITAError: the arguments do not fit, in one line.
    """
    arguments = build_parser().parse_command_line(argv)
    if arguments.classes is not None and arguments.benchmark != FOLDER:
        raise ITAError(f"--classes is for {FOLDER}: {arguments.benchmark} has classes of its own")
    output_folder(arguments.output)
    try:
        release = open_release(arguments.benchmark, arguments.source, arguments.classes)
        if arguments.split not in (None, *release.splits):
            raise ITAError(f"--split: no split {arguments.split!r}, only {', '.join(release.splits)}")
        wanted = Preparation(
            benchmark=arguments.benchmark,
            release=release,
            source=arguments.source,
            output=arguments.output,
            splits=release.splits if arguments.split is None else [arguments.split],
            limit=arguments.limit,
            num_proc=arguments.num_proc,
        )
        outcome = prepare(wanted)
    except (ReleaseError, PrepareError) as error:
        show_error(error)
        return 1
    counts = ", ".join(f"{split}: {count:,} images" for split, count in outcome.num_images.items())
    if not outcome.written:
        print(f"{arguments.output} is up to date ({counts}): nothing to do")
    else:
        print(f"{arguments.output}: {counts}")
    return 0


def show_error(error: ReleaseError | PrepareError) -> None:
    """The error in one line, however long, and below it the first of the images that are to blame."""
    problems = getattr(error, "problems", [])
    lines = [f"run_prepare.py: error: {error}{':' if problems else ''}"]
    lines += [f"  {problem}" for problem in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"  and {len(problems) - SHOWN_PROBLEMS:,} more")
    print("\n".join(lines), file=sys.stderr)
