"""Read text files and mappings; write files atomically."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
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
    """Write files that belong together: all under temporary names first, then all renamed. Folders are made.

    Raises:
        ITAError: one cannot be written; none is left half-written and no temporary file stays.
    """
    with contextlib.ExitStack() as stack:
        for path, content in contents.items():
            temporary = stack.enter_context(atomic_path(path))
            with _named(path):
                temporary.write_bytes(content)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, for a file or a folder; it takes the place of `path` when the block ends.

    What stood at `path` stays until then. If the block raises, the temporary file or folder is deleted. The folder
    around it is made.

    Raises:
        ITAError: the folder cannot be made, or the result cannot be renamed.
    """
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")
    try:
        with _named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _delete(temporary)
        yield temporary
        with _named(path):
            if temporary.is_dir() and path.is_dir():
                _delete(path)
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            _delete(temporary)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn an `OSError` into an `ITAError` that names the file."""
    try:
        yield
    except OSError as error:
        raise ITAError(f"cannot write {path}: {error.strerror or error}") from error


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
