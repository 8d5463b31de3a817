"""Options that mean the same in every command."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ita_segmentation.checkpoints import DTYPE_HELP, DTYPES, MODEL_HELP
from ita_segmentation.class_names import read_vocabulary
from ita_segmentation.errors import UsageError, one_line


def positive_int(text: str) -> int:
    """Argument type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def fraction(text: str) -> float:
    """Argument type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


def refuse_any(problems: Mapping[str, object]) -> None:
    """Raise the first message that applies, as a UsageError."""
    for message, applies in problems.items():
        if applies:
            raise UsageError(message)


def add_model(group: Any, more: str = "") -> None:
    """Add `--model`."""
    group.add_argument("--model", required=True, metavar="DIR_OR_ID", help=MODEL_HELP + more)


def add_output(group: Any, help_text: str = "folder for the results") -> None:
    """Add `--output`."""
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help=help_text)


def add_dtype(group: Any) -> None:
    """Add `--dtype`."""
    group.add_argument("--dtype", choices=DTYPES, default="float32", metavar="DTYPE", help=DTYPE_HELP)


def add_device(group: Any) -> None:
    """Add `--device`."""
    group.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")


def add_vocabulary(group: Any, help_text: str = "classes") -> None:
    """Add `--vocabulary`, a file of class names."""
    shown = f"{help_text}: JSON, or lines id:name,synonym,..."
    group.add_argument("--vocabulary", type=Path, metavar="FILE", help=shown)


def add_classes(group: Any) -> None:
    """Add `--classes`, class names as text, and `--vocabulary`, a file of them; `chosen_classes` reads both."""
    names = group.add_mutually_exclusive_group()
    names.add_argument("--classes", help='such as "cat, sofa|couch, wall" (default: the checkpoint\'s own)')
    add_vocabulary(names)


def chosen_classes(arguments: argparse.Namespace) -> list[list[str]] | None:
    """Read the classes that `--classes` or `--vocabulary` names; None for the checkpoint's own."""
    if arguments.vocabulary is not None:
        return read_vocabulary(arguments.vocabulary)
    return None if arguments.classes is None else parse_names(arguments.classes, "--classes")


def parse_names(text: str, option: str) -> list[list[str]]:
    """Parse "cat, sofa|couch"; raises UsageError."""
    from modeling_ita.text import parse_classes

    try:
        return parse_classes(text)
    except ValueError as error:
        raise UsageError(f"{option}: {one_line(error)}") from error
