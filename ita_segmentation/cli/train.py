"""The `ita train` command."""

import dataclasses
import json
import os
import sys
import textwrap
from collections.abc import Sequence

from transformers import TrainingArguments

from ita_segmentation.cli.parser import CompactHelpFormatter, ConfigArgumentParser
from ita_segmentation.data.training import ITADataArguments
from ita_segmentation.errors import ITAError, UsageError, one_line
from ita_segmentation.files import parse_mapping
from ita_segmentation.training.arguments import COMMON, ITAModelArguments, ITATrainingArguments, check_numbers

DESCRIPTION = """Train or fine-tune ITA on Scenes or on a prepared dataset; the output folder becomes a checkpoint.

  ita train --config recipes/scenes_ita_tiny.yaml --clip CLIP --output_dir runs/tiny
  ita train --config recipes/finetune_folder.yaml --dataset data/mine --output_dir runs/mine
  accelerate launch run_train.py --config recipes/coco_panoptic_ita_convnext_large.yaml --output_dir runs/coco

The command line takes precedence over the --config file. A field of the model's configuration is given as
--model_config.FIELD VALUE."""

Arguments = tuple[ITAModelArguments, ITADataArguments, ITATrainingArguments]


def train(argv: Sequence[str] | None = None) -> int:
    """Train as the arguments (None: the process's own) say. Returns the exit status, or raises ITAError."""
    given = list(sys.argv[1:] if argv is None else argv)
    if "--help_all" in given:
        build_parser(full_help=True).print_help()
        return 0
    arguments = parse_arguments(given)
    from ita_segmentation.training.setup import build_trainer, run_training

    try:
        run_training(*build_trainer(*arguments), arguments)
    except ITAError as error:
        if os.environ.get("RANK", "0") != "0":  # all processes stop, one says why
            return error.exit_status
        raise
    return 0


def build_parser(full_help: bool = False) -> ConfigArgumentParser:
    """Build the parser; with `full_help`, its help describes all of transformers' arguments, too."""
    parser = ConfigArgumentParser(
        (ITAModelArguments, ITADataArguments, ITATrainingArguments),
        usage="%(prog)s [--config FILE] --output_dir DIR [arguments]",
        description=DESCRIPTION,
        formatter_class=CompactHelpFormatter,
        renamed={"--learn_words": "--tune_class_names"},
    )
    parser.add_argument(
        "--help_all", action="store_true", help="describe all of transformers' arguments, too"
    )
    own = vars(ITATrainingArguments)["__annotations__"]
    further = [
        field.name
        for field in dataclasses.fields(TrainingArguments)
        if field.init and field.name not in own and field.name not in COMMON
    ]
    if not full_help:
        parser.shorten_help(hidden=further, shortened=COMMON)
        names = textwrap.fill(", ".join(further), 100)
        parser.epilog = (
            f"Also all other arguments of transformers' TrainingArguments (see --help_all):\n{names}"
        )
    return parser


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Parse the command line over the file that `--config` names. Raises UsageError, or SystemExit as `argparse`."""
    parser = build_parser()
    try:
        words = parser.with_config(_expand_model_config(argv))
        *parsed, _, unknown = parser.parse_args_into_dataclasses(
            args=words, look_for_args_file=False, return_remaining_strings=True
        )
        if unknown:
            raise UsageError(f"unknown argument {unknown[0]!r} (see --help)")
        for one in parsed:
            check_numbers(one)
    except (ValueError, ITAError) as error:
        raise UsageError(one_line(error)) from error
    model, data, training = parsed
    return model, data, training


def _expand_model_config(argv: Sequence[str]) -> list[str]:
    """Replace `--model_config.FIELD VALUE` (or `=VALUE`) by `--model_config='{"FIELD": VALUE}'`."""
    expanded: list[str] = []
    words = iter(argv)
    for word in words:
        if not word.startswith("--model_config."):
            expanded.append(word)
            continue
        name, equals, text = word.removeprefix("--model_config.").partition("=")
        if not equals:
            text = next(words, "")
        value = parse_mapping(f"{json.dumps(name)}: {text}", word)[name]
        expanded.append(f"--model_config={json.dumps({name: value})}")
    return expanded
