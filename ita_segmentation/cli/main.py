"""The `ita` command: `ita COMMAND [arguments]`."""

import importlib
import sys
from typing import NoReturn

from ita_segmentation import __version__

COMMANDS = {
    "predict": "segment images, folders, videos or a dataset",
    "train": "train or fine-tune a model",
    "eval": "score a model on benchmarks",
    "prepare": "convert a benchmark's official release to a dataset on disk",
    "convert": "download and convert a published checkpoint",
    "models": "list the published checkpoints",
    "export": "export a model to ONNX or torch.export",
    "app": "serve the web page",
    "train-clip": "train the small CLIP of the Scenes dataset",
}

USAGE = "usage: ita COMMAND [arguments]    (ita COMMAND --help lists them)\n\n" + "\n".join(
    f"  {name:<12}{text}" for name, text in COMMANDS.items()
)


def main() -> NoReturn:
    """Run the command that the first argument names, with the rest of the arguments.

    Exits with status 0, 1 (failure), 2 (usage) or 130 (interrupted).
    """
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help", "help"):
        print(USAGE)
        sys.exit(0)
    if name in ("-V", "--version"):
        print(f"ita {__version__}")
        sys.exit(0)
    if name not in COMMANDS:
        sys.exit(_usage_error(name))
    sys.argv = [f"ita {name}", *sys.argv[2:]]
    importlib.import_module(f"ita_segmentation.cli.{name.replace('-', '_')}").main()
    sys.exit(0)


def _usage_error(name: str) -> int:
    sys.stderr.write(f"ita: error: no such command: {name!r} (one of {', '.join(COMMANDS)})\n")
    return 2
