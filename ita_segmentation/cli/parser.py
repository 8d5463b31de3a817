"""What all commands share: an argument parser with `--config`, one-line errors and exit statuses.

The parser is `argparse`'s, so that `--help` imports nothing else; it becomes transformers' `HfArgumentParser`, too,
where arguments are dataclasses, as those of training are.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from ita_segmentation.errors import ITAError, UsageError, one_line
from ita_segmentation.files import read_mapping

INTERRUPTED = 130

EXTRAS = {
    "accelerate": "eval",
    "av": "video",
    "cvat_sdk": "cvat",
    "datasets": "eval",
    "evaluate": "train",
    "gradio": "app",
    "jinja2": "eval",
    "label_studio_sdk": "label-studio",
    "matplotlib": "eval",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "openmoji": "demo",
    "peft": "lora",
    "pyarrow": "eval",
    "pycocotools": "integrations",
    "scipy": "train",
    "supervision": "integrations",
    "tensorboard": "train",
    "torchmetrics": "eval",
}
"""The extra of this package that installs an optional import."""


def run_command(
    work: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None
) -> NoReturn:
    """Run `work(argv)` and exit: 0 on success, 1 on failure, 2 on wrong usage, 130 on an interrupt.

    An `ITAError` and a missing optional package become one line on stderr.

    Args:
        work: takes the arguments (None: those of the process) and returns the exit status (None: 0).
        argv: arguments in place of the process's own.
    """
    program = Path(sys.argv[0]).name
    try:
        sys.exit(work(argv) or 0)
    except ITAError as error:
        sys.stderr.write(f"{program}: error: {one_line(error)}\n")
        sys.exit(error.exit_status)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        extra = f"pip install 'ita-segmentation[{_extra_of(package, program)}]'"
        sys.stderr.write(f"{program}: error: this needs the package {package}: {extra}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: interrupted\n")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of stdout, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _extra_of(package: str, program: str) -> str:
    """Name the extra that holds a package: the command's own, if there is one with this package."""
    command = program.rpartition(" ")[2]
    try:
        requirements = metadata.requires("ita-segmentation") or []
    except metadata.PackageNotFoundError:  # a clone that is not installed
        requirements = []
    own = re.compile(rf"{package.replace('_', '-')}\b.*extra == ['\"]{re.escape(command)}['\"]")
    return command if any(map(own.match, requirements)) else EXTRAS[package]


class CompactHelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows one spelling of each option, and its default."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        spellings = [option for option in action.option_strings if "-" not in option.lstrip("-")]
        metavar = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(spellings[: 1 + (len(spellings[0]) == 2)])} {metavar}".strip()

    def _get_help_string(self, action: argparse.Action) -> str:
        has_default = action.default not in (None, [], argparse.SUPPRESS, False)
        return (action.help or "") + (" (default: %(default)s)" if has_default else "")


class ConfigArgumentParser(argparse.ArgumentParser):
    """An argument parser with `--config FILE` (YAML or JSON of the same arguments) and one-line errors.

    Command-line arguments take precedence over those in the file. Old names of options, `renamed` (old to new, such as
    {"--old": "--new"}), are taken in both and answered by a FutureWarning.
    """

    def __new__(cls, dataclass_types: Any = None, **kwargs: Any) -> ConfigArgumentParser:
        """Add the base class that imports transformers only where it is needed."""
        if dataclass_types is None:
            return super().__new__(cls)
        from transformers import HfArgumentParser

        return super().__new__(type(cls.__name__, (cls, HfArgumentParser), {}))

    def __init__(self, dataclass_types: Any = None, renamed: Mapping[str, str] | None = None, **kwargs: Any):
        self.renamed = renamed or {}
        kwargs.setdefault("formatter_class", argparse.HelpFormatter)
        kwargs.setdefault("usage", "%(prog)s [arguments]")
        if dataclass_types is not None:
            kwargs["dataclass_types"] = dataclass_types
        super().__init__(allow_abbrev=False, **kwargs)
        help_text = "YAML or JSON file of these arguments; the command line takes precedence"
        self.add_argument("--config", type=Path, metavar="FILE", default=argparse.SUPPRESS, help=help_text)

    def shorten_help(self, hidden: Collection[str], shortened: Collection[str]) -> None:
        """Shorten `--help`."""
        for action in self._actions:
            if action.dest in hidden or f"--no_{action.dest}" in action.option_strings:
                action.help = argparse.SUPPRESS
            elif action.dest in shortened:
                action.help = one_line(action.help).partition(". ")[0].removesuffix(".")

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line on stderr."""
        self.exit(2, f"{self.prog}: error: {one_line(message)} (see --help)\n")

    def parse_command_line(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse the command line over the file that `--config` names."""
        return self.parse_args(self.with_config(argv))

    def parse_args_into_dataclasses(self, *arguments: Any, **options: Any) -> tuple[Any, ...]:
        """Parse arguments as `HfArgumentParser` does; for parsers of dataclasses."""
        return super().parse_args_into_dataclasses(*arguments, **options)  # type: ignore[misc]

    def with_config(self, argv: Sequence[str] | None = None) -> list[str]:
        """Put the arguments of the `--config` file before those of the command line, as strings."""
        given = [self._current_name(word) for word in (sys.argv[1:] if argv is None else argv)]
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config", type=Path)
        config = finder.parse_known_args(given)[0].config
        return (self._arguments_of(config) if config else []) + given

    def _current_name(self, word: str) -> str:
        """Replace the old name of an option at the beginning of a word, with a warning."""
        option, equals, value = word.partition("=")
        new = self.renamed.get(option.replace("-", "_").replace("__", "--", 1))
        if new is None:
            return word
        warnings.warn(f"{option} is deprecated: use {new}", FutureWarning, stacklevel=2)
        return new + equals + value

    def _arguments_of(self, path: Path) -> list[str]:
        """Read the file's content as command-line arguments, so that it is checked like them."""
        try:
            values = read_mapping(path)
        except ITAError as error:
            raise UsageError(str(error)) from error
        actions = {
            option.lstrip("-").replace("-", "_"): action
            for action in self._actions
            for option in action.option_strings
        }
        arguments: list[str] = []
        for key, value in values.items():
            name = self._current_name(f"--{key}").removeprefix("--")
            action = actions.get(name.replace("-", "_"))
            if action is None or action.dest in ("config", "help"):
                raise UsageError(f"{path}: unknown argument {key!r}")
            arguments += _as_arguments(path, action, value)
        return arguments


def _as_arguments(path: Path, action: argparse.Action, value: Any) -> list[str]:
    option = action.option_strings[0]
    if value is None:
        return []
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise UsageError(f"{path}: {action.dest!r} must be true or false, got {value!r}")
        if value:
            return [option]
        return [action.option_strings[1]] if isinstance(action, argparse.BooleanOptionalAction) else []
    if isinstance(value, dict):
        return [f"{option}={json.dumps(value)}"]
    several = action.nargs in ("+", "*")
    values = value if isinstance(value, list) and several else [value]
    if any(isinstance(item, (list, dict)) for item in values):
        raise UsageError(
            f"{path}: {action.dest!r} takes {'plain values' if several else 'one value'}, got {value!r}"
        )
    return [option, *map(str, values)] if several else [f"{option}={value}"]
