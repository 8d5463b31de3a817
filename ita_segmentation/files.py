"""Read text files and mappings; write files atomically."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ita_segmentation.errors import ITAError, one_line


def read_mapping(path: Path) -> dict[str, Any]:
    """Reads a YAML or JSON file that holds a mapping (JSON is YAML).

    Raises:
        ITAError: if it cannot be read, is neither, or holds something else.
    """
    text = read_text(path)
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ITAError(f"{path} is neither YAML nor JSON: {one_line(error, 120)}") from error
    if not isinstance(content, dict):
        raise ITAError(f"{path} must hold arguments and their values")
    return content


def read_text(path: Path) -> str:
    """A UTF-8 text file.

    Raises:
        ITAError: if there is none, or it is not text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ITAError(f"{path} is not a UTF-8 text file") from error
    except OSError as error:
        raise ITAError(f"cannot read {path}: {error.strerror or error}") from error


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Writes files that belong together: all under temporary names first, then all renamed; folders are made.

    Raises:
        ITAError: if one cannot be written; none is left half-written and no temporary file stays.
    """
    temporary: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary[path] = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            temporary[path].write_bytes(content)
        for path, written in temporary.items():
            os.replace(written, path)
    except OSError as error:
        raise ITAError(f"cannot write {error.filename or path}: {error.strerror or error}") from error
    finally:
        for written in temporary.values():
            with contextlib.suppress(OSError):
                written.unlink(missing_ok=True)


def output_folder(path: Path) -> Path:
    """Makes sure that `path` can be written into; a folder that is missing is made when the first file comes.

    Raises:
        ITAError: if something else stands there, or it is not writable.
    """
    standing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not standing.is_dir():
        raise ITAError(f"the output {path} cannot be made: {standing} is not a folder")
    if not os.access(standing, os.W_OK):
        raise ITAError(f"the output {path} cannot be written: no permission")
    return path
