"""Scores a checkpoint on benchmarks: `results.json` for programs and `results.md` for people.

    python run_eval.py --model models/ita-tiny --benchmarks scenes --output scores
    accelerate launch run_eval.py --model models/ita-tiny --benchmarks scenes --output scores

Mean IoU over all classes, over those whose masks were seen in training and over the others, all from one confusion
matrix over the whole set; any number of processes gives the same scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from evaluation_ita.benchmarks import BENCHMARKS
from evaluation_ita.door import (
    DoorError,
    DoorParser,
    load_checkpoint,
    one_line,
    open_door,
    output_folder,
    positive_int,
    set_shortest_side,
)
from evaluation_ita.report import summary_table, write_results


def build_parser() -> DoorParser:
    parser = DoorParser(description="Scores a checkpoint on benchmarks.")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint folder")
    parser.add_argument(
        "--benchmarks", nargs="+", required=True, choices=sorted(BENCHMARKS), help="what to score it on"
    )
    parser.add_argument("--limit", type=positive_int, help="only so many pictures of each benchmark")
    parser.add_argument(
        "--batch_size", type=positive_int, default=4, help="pictures at a time (default %(default)s)"
    )
    parser.add_argument(
        "--size", type=positive_int, help="shortest side fed to the network (the checkpoint's own)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    return parser


def main() -> NoReturn:
    """The door: the process's arguments in, its exit status out."""
    open_door(evaluate)


def evaluate(argv: Sequence[str] | None = None) -> int:
    """Does what the arguments say. Returns 0.

    Raises:
        DoorError: what stops it, in one line.
    """
    arguments = build_parser().parse_door(argv)
    output_folder(arguments.output)

    from accelerate import PartialState

    from evaluation_ita.evaluator import evaluate_semantic

    state = PartialState()
    model, processor = load_checkpoint(arguments.model, str(state.device))
    set_shortest_side(processor, arguments.size)
    results = {}
    for name in dict.fromkeys(arguments.benchmarks):
        with state.main_process_first():
            benchmark = BENCHMARKS[name](arguments.limit)
        try:
            results[name] = evaluate_semantic(
                model, processor, benchmark, arguments.batch_size, arguments.limit, title=name
            )
        except ValueError as error:
            raise DoorError(f"{name}: {one_line(error)}") from error
    if state.is_main_process:
        paths = write_results(arguments.output, str(arguments.model), results)
        print(summary_table(results), end="")
        print(f"Scores in per cent; every class: {paths[1]}")
    return 0


if __name__ == "__main__":
    main()
