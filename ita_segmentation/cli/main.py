"""The `ita` command: `ita COMMAND [arguments]`."""

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from ita_segmentation import __version__
from ita_segmentation.cli.parser import run_command
from ita_segmentation.errors import UsageError

COMMANDS = {
    "predict": "segment images, videos or a dataset",
    "app": "serve the web page",
    "train": "train or fine-tune a model",
    "eval": "score a model on benchmarks",
    "prepare": "convert a benchmark's official release to a dataset on disk",
    "convert": "download and convert a published checkpoint",
    "models": "list the published checkpoints",
    "export": "export a model to ONNX or torch.export",
    "train-clip": "train the small CLIP of the Scenes dataset",
}

FUNCTIONS = {"app": "serve", "eval": "evaluate", "prepare": "prepare_benchmark"}
"""The function of a command's module, where it is not called like the command."""

USAGE = "usage: ita COMMAND [arguments]    (ita COMMAND --help lists them)\n\n" + "\n".join(
    f"  {name:<12}{text}" for name, text in COMMANDS.items()
)


def main() -> NoReturn:
    """Run the command that the first argument names, with the rest of the arguments.

    Exits with status 0, 1 (failure), 2 (usage) or 130 (interrupted).
    """
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in COMMANDS:
        sys.argv[0] = "ita"
        run_command(lambda argv: _without_command(name))
    sys.argv = [f"ita {name}", *sys.argv[2:]]
    run_by_name(name)


def run_by_name(name: str) -> NoReturn:
    """Run a command of `COMMANDS` with the process's arguments; exits as `main`."""
    module = name.replace("-", "_")

    def work(argv: Sequence[str] | None) -> int | None:
        # Importing is part of the command: what is missing or interrupted then is said as at any other time.
        command = importlib.import_module(f"ita_segmentation.cli.{module}")
        return getattr(command, FUNCTIONS.get(name, module))(argv)

    run_command(work)


def _without_command(name: str) -> None:
    if name in ("-h", "--help", "help"):
        print(USAGE)
    elif name in ("-V", "--version"):
        print(f"ita {__version__}")
    else:
        raise UsageError(f"no such command: {name!r} (one of {', '.join(COMMANDS)})")
