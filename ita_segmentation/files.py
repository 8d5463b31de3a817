"""Read text files and mappings; write files atomically."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ita_segmentation.errors import ITAError, one_line

MAX_MAPPING_CHARACTERS, MAX_MAPPING_VALUES, MAX_MAPPING_DEPTH = 1_000_000, 100_000, 50


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON file that holds a mapping (JSON is YAML).

    Raises:
        ITAError: It cannot be read, is neither, holds something else, or is too large, too deeply nested or
            too large once its aliases are expanded.
    """
    return parse_mapping(read_text(path), str(path))


def parse_mapping(text: str, source: str) -> dict[str, Any]:
    """Parse a YAML or JSON mapping of bounded size and depth; an empty text is an empty mapping.

    Args:
        text: The YAML or JSON text.
        source: Where it comes from, for error messages.

    Raises:
        ITAError: As for `read_mapping`.
    """
    if len(text) > MAX_MAPPING_CHARACTERS:
        raise ITAError(f"{source} has more than {MAX_MAPPING_CHARACTERS:,} characters")
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}
        _count_values(node, source, {}, 0)
        content = loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:
        raise ITAError(f"{source} is neither YAML nor JSON: {one_line(error, 120)}") from error
    except RecursionError as error:
        raise ITAError(f"{source} is too deeply nested") from error
    finally:
        loader.dispose()
    if not isinstance(content, dict):
        raise ITAError(f"{source} must be a mapping of names to values, not a {type(content).__name__}")
    return content


def _count_values(node: yaml.Node, source: str, counted: dict[int, int], depth: int) -> int:
    """Count the values below a YAML node with every alias expanded. Raises ITAError beyond the limits."""
    if depth > MAX_MAPPING_DEPTH:
        raise ITAError(f"{source} is too deeply nested (more than {MAX_MAPPING_DEPTH} levels)")
    if id(node) not in counted:
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in parts for part in pair]
        counted[id(node)] = 1 + sum(_count_values(part, source, counted, depth + 1) for part in parts)
    if counted[id(node)] > MAX_MAPPING_VALUES:
        raise ITAError(f"{source} has more than {MAX_MAPPING_VALUES:,} values")
    return counted[id(node)]


def read_text(path: Path) -> str:
    """Read a UTF-8 text file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ITAError(f"{path} is not a UTF-8 text file") from error
    except OSError as error:
        raise ITAError(f"cannot read {path}: {error.strerror or error}") from error


def json_bytes(document: Any) -> bytes:
    """Encode a document as JSON in UTF-8."""
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()


def path_text(path: str | os.PathLike[str]) -> str:
    """Return a path as text that UTF-8 can hold; bytes of its name that are not UTF-8 become backslash escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def write_files(contents: Mapping[Path, bytes], one_writer: bool = False) -> None:
    """Write files that belong together: all under temporary names first, then all renamed. Folders are made."""
    with contextlib.ExitStack() as stack:
        for path, content in contents.items():
            temporary = stack.enter_context(atomic_path(path, one_writer))
            with _named(path):
                temporary.write_bytes(content)


@contextlib.contextmanager
def atomic_path(path: Path, one_writer: bool = False) -> Iterator[Path]:
    """Give a temporary path beside `path`, for a file or a folder; it takes the place of `path` when the block ends.

    What stood at `path` stays until then. If the block raises, the temporary file or folder is deleted. The folder
    around it is made.

    Args:
        path: the file or folder to be written.
        one_writer: no two processes ever write `path` at the same time. The temporary name is then always the same,
            and what a killed process left is replaced.

    Raises:
        ITAError: the folder cannot be made, or the result cannot be renamed.
    """
    name = os.fsencode(path.name)
    short = path.name if len(name) <= 200 else hashlib.sha256(name).hexdigest()
    temporary = path.with_name(f".{short}.tmp" if one_writer else f".{short}.{os.getpid()}.tmp")
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
    """Check that `path` can be written into; a folder that is missing is made with the first file."""
    standing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not standing.is_dir():
        raise ITAError(f"the output {path} cannot be made: {standing} is not a folder")
    if not os.access(standing, os.W_OK):
        raise ITAError(f"the output {path} cannot be written: no permission")
    return path
