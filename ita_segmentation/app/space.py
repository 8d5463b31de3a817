"""Write the folder of a Hugging Face Space: the page, its code and a checkpoint, complete in itself."""

from __future__ import annotations

import shutil
from importlib.metadata import requires
from pathlib import Path

from ita_segmentation.checkpoints import WEIGHT_FILES
from ita_segmentation.errors import ITAError
from ita_segmentation.files import atomic_path

TEMPLATES = Path(__file__).parent / "space_files"
PACKAGES = ("modeling_ita", "ita_segmentation")
UNNEEDED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "*.pyi")


def write_space(output: Path, checkpoint: Path, root: Path, model_name: str | None = None) -> None:
    """Write a Space."""
    from gradio import __version__ as gradio_version

    has_weights = any((checkpoint / name).is_file() for name in WEIGHT_FILES)
    if not (checkpoint / "config.json").is_file() or not has_weights:
        raise ITAError(f"{checkpoint} is not a checkpoint folder: it has no config.json or no weights")
    if output.exists() and any(output.iterdir()):
        raise ITAError(f"{output} is not empty: a Space is written to a new folder")
    with atomic_path(output) as space:
        try:
            shutil.copytree(checkpoint, space / "model", ignore=UNNEEDED)
            for name in PACKAGES:
                shutil.copytree(root / name, space / name, ignore=UNNEEDED)
            if (root / "examples").is_dir() and not (checkpoint / "examples").is_dir():
                shutil.copytree(root / "examples", space / "examples", ignore=UNNEEDED)
            card = (TEMPLATES / "README.md").read_text(encoding="utf-8")
            app = (TEMPLATES / "app.py").read_text(encoding="utf-8")
            if model_name:
                app = app.replace('"model", "--host"', f'"model", "--model_name", {model_name!r}, "--host"')
            texts = {
                "README.md": card.replace("GRADIO_VERSION", gradio_version),
                "app.py": app,
                "requirements.txt": "\n".join(_requirements()) + "\n",
            }
            for name, text in texts.items():
                (space / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ITAError(f"cannot write {error.filename or output}: {error.strerror or error}") from error


def _requirements() -> list[str]:
    """What this package needs, as it was installed, and what the page needs beside Gradio, which a Space brings."""
    needed = [line for line in requires("ita-segmentation") or () if ";" not in line]
    return [*needed, "pycocotools>=2.0.8"]
