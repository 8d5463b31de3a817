"""What all commands share: an argument parser with `--config`, one-line errors and exit statuses."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.files import read_mapping


def run_command(work: Callable[[Sequence[str] | None], int | None]) -> NoReturn:
    """Runs `work(argv)` on the command line's arguments (None: the process's own) and exits with its status.

    `ITAError` becomes one line on stderr and status 1, an interrupt status 130.
    """
    try:
        sys.exit(work(None) or 0)
    except ITAError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: interrupted\n")
        sys.exit(130)


class ConfigArgumentParser(argparse.ArgumentParser):
    """An argument parser with `--config FILE` (YAML or JSON of the same arguments) and one-line errors.

    What stands on the command line goes before what stands in the file.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)
        help_text = "YAML or JSON file of these arguments; the command line goes before it"
        self.add_argument("--config", type=Path, metavar="FILE", default=argparse.SUPPRESS, help=help_text)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)} (see --help)\n")

    def parse_command_line(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The arguments of the command line (`argv`, or the process's own) over those of `--config`.

        Raises:
            ITAError: if the file cannot be read or names an argument that does not exist. Everything else that is
                wrong ends the process with status 2, as argparse does.
        """
        given = list(sys.argv[1:] if argv is None else argv)
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config", type=Path)
        config = finder.parse_known_args(given)[0].config
        return self.parse_args((self._arguments_of(config) if config else []) + given)

    def _arguments_of(self, path: Path) -> list[str]:
        """The file's content as command line arguments, so that it is checked like them."""
        actions = {action.dest: action for action in self._actions if action.option_strings}
        arguments: list[str] = []
        for key, value in read_mapping(path).items():
            action = actions.get(str(key).replace("-", "_"))
            if action is None or action.dest in ("config", "help"):
                raise ITAError(f"{path}: unknown argument {key!r}")
            arguments += _as_arguments(path, action, value)
        return arguments


def _as_arguments(path: Path, action: argparse.Action, value: Any) -> list[str]:
    option = action.option_strings[0]
    if value is None:
        return []
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise ITAError(f"{path}: {action.dest!r} must be true or false, got {value!r}")
        if value:
            return [option]
        return [action.option_strings[1]] if len(action.option_strings) > 1 else []
    several = action.nargs in ("+", "*")
    values = value if isinstance(value, list) and several else [value]
    if any(isinstance(item, (list, dict, bool)) for item in values):
        raise ITAError(
            f"{path}: {action.dest!r} takes {'plain values' if several else 'one value'}, got {value!r}"
        )
    return [option, *map(str, values)] if several else [f"{option}={value}"]


def positive_int(text: str) -> int:
    """An argument type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def fraction(text: str) -> float:
    """An argument type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value
