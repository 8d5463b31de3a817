"""The folder of a Space: the page, the code it needs, and the checkpoint, so that it needs nothing else."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from ita_segmentation.checkpoints import WEIGHT_FILES
from ita_segmentation.errors import ITAError

TEMPLATES = Path(__file__).parent / "space_files"
PACKAGES = ("modeling_ita", "ita_segmentation")
UNNEEDED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "*.pyi")


def write_space(output: Path, checkpoint: Path, root: Path, model_name: str | None = None) -> None:
    """Writes a Space.

    Args:
        output: a folder that does not exist yet or is empty; it is complete afterwards, or as it was.
        checkpoint: folder of the checkpoint; it becomes `output / "model"`.
        root: folder in which the rooms and doors of this package are.
        model_name: what the page's Python lines call the checkpoint; without, `model`.

    Raises:
        ITAError: if the checkpoint is none, the output is not empty, or a file cannot be written.
    """
    from gradio import __version__ as gradio_version

    if not (checkpoint / "config.json").is_file() or not any(
        (checkpoint / name).is_file() for name in WEIGHT_FILES
    ):
        raise ITAError(f"{checkpoint} is not a checkpoint folder: it has no config.json or no weights")
    if output.exists() and any(output.iterdir()):
        raise ITAError(f"{output} is not empty: a Space is written to a new folder")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
            space = Path(folder) / "space_files"
            shutil.copytree(checkpoint, space / "model", ignore=UNNEEDED)
            for name in PACKAGES:
                source = root / name
                if source.is_dir():
                    shutil.copytree(source, space / name, ignore=UNNEEDED)
                else:
                    shutil.copy2(source, space / name)
            if (root / "examples").is_dir() and not (checkpoint / "examples").is_dir():
                shutil.copytree(root / "examples", space / "examples", ignore=UNNEEDED)
            for template in ("README.md", "app.py", "requirements.txt"):
                text = (TEMPLATES / template).read_text(encoding="utf-8")
                text = text.replace("GRADIO_VERSION", gradio_version)
                if template == "app.py" and model_name:
                    text = text.replace(
                        '"model", "--host"', f'"model", "--model_name", {model_name!r}, "--host"'
                    )
                (space / template).write_text(text, encoding="utf-8")
            if output.exists():
                output.rmdir()
            space.rename(output)
    except OSError as error:
        raise ITAError(f"cannot write {error.filename or output}: {error.strerror or error}") from error
