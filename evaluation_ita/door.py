"""What the doors (`run_*.py`) have in common: arguments, one-line errors, whole files, pictures, checkpoints.

A door raises `DoorError` for anything the user can put right; `open_door` turns it into one line on stderr and a
non-zero exit status. Results are written under a temporary name and renamed, so that no half of one is ever seen.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from PIL import Image

PICTURE_SUFFIXES = (
    *(".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
# What Pillow's decoders raise on files that are cut off or made of something else.
BROKEN_PICTURE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
)


class DoorError(Exception):
    """Something the user can put right, said in one line."""


def open_door(work: Callable[[Sequence[str] | None], int | None]) -> NoReturn:
    """Runs `work(argv)` on the command line's arguments (None: the process's own) and exits with its status.

    `DoorError` becomes one line on stderr and status 1, an interrupt status 130.
    """
    try:
        sys.exit(work(None) or 0)
    except DoorError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: interrupted\n")
        sys.exit(130)


def one_line(error: object, limit: int = 400) -> str:
    """The message of an error, or its type, as a single line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


# --------------------------------------------------------------------------------------------------------------
# Arguments


class DoorParser(argparse.ArgumentParser):
    """An argument parser with `--config FILE` (YAML or JSON of the same arguments) and one-line errors.

    What stands on the command line goes before what stands in the file.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)
        help_text = "YAML or JSON file of these arguments; the command line goes before it"
        self.add_argument("--config", type=Path, metavar="FILE", default=argparse.SUPPRESS, help=help_text)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)} (see --help)\n")

    def parse_door(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The arguments of the command line (`argv`, or the process's own) over those of `--config`.

        Raises:
            DoorError: if the file cannot be read or names an argument that does not exist. Everything else that is
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
                raise DoorError(f"{path}: unknown argument {key!r}")
            arguments += _as_arguments(path, action, value)
        return arguments


def _as_arguments(path: Path, action: argparse.Action, value: Any) -> list[str]:
    option = action.option_strings[0]
    if value is None:
        return []
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise DoorError(f"{path}: {action.dest!r} must be true or false, got {value!r}")
        if value:
            return [option]
        return [action.option_strings[1]] if len(action.option_strings) > 1 else []
    several = action.nargs in ("+", "*")
    values = value if isinstance(value, list) and several else [value]
    if any(isinstance(item, (list, dict, bool)) for item in values):
        raise DoorError(
            f"{path}: {action.dest!r} takes {'plain values' if several else 'one value'}, got {value!r}"
        )
    return [option, *map(str, values)] if several else [f"{option}={value}"]


def read_mapping(path: Path) -> dict[str, Any]:
    """Reads a YAML or JSON file that holds a mapping (JSON is YAML).

    Raises:
        DoorError: if it cannot be read, is neither, or holds something else.
    """
    text = read_text(path)
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DoorError(f"{path} is neither YAML nor JSON: {one_line(error, 120)}") from error
    if not isinstance(content, dict):
        raise DoorError(f"{path} must hold arguments and their values")
    return content


def read_text(path: Path) -> str:
    """A UTF-8 text file.

    Raises:
        DoorError: if there is none, or it is not text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DoorError(f"{path} is not a UTF-8 text file") from error
    except OSError as error:
        raise DoorError(f"cannot read {path}: {error.strerror or error}") from error


# --------------------------------------------------------------------------------------------------------------
# Files


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Writes files that belong together: all under temporary names first, then all renamed; folders are made.

    Raises:
        DoorError: if one cannot be written; none is left half-written and no temporary file stays.
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
        raise DoorError(f"cannot write {error.filename or path}: {error.strerror or error}") from error
    finally:
        for written in temporary.values():
            with contextlib.suppress(OSError):
                written.unlink(missing_ok=True)


def output_folder(path: Path) -> Path:
    """Makes sure that `path` can be written into; a folder that is missing is made when the first file comes.

    Raises:
        DoorError: if something else stands there, or it is not writable.
    """
    standing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not standing.is_dir():
        raise DoorError(f"the output {path} cannot be made: {standing} is not a folder")
    if not os.access(standing, os.W_OK):
        raise DoorError(f"the output {path} cannot be written: no permission")
    return path


# --------------------------------------------------------------------------------------------------------------
# Pictures, vocabularies, checkpoints


def find_pictures(sources: Sequence[Path]) -> list[Path]:
    """Files as given and the pictures directly in the folders given, in order, each once.

    Raises:
        DoorError: if a source does not exist or a folder holds no picture.
    """
    found: dict[Path, Path] = {}
    for source in sources:
        if source.is_dir():
            inside = [
                path
                for path in sorted(source.iterdir())
                if path.suffix.lower() in PICTURE_SUFFIXES
                and path.is_file()
                and not path.name.startswith(".")
            ]
            if not inside:
                raise DoorError(f"no pictures in the folder {source}")
        elif source.exists():
            inside = [source]
        else:
            raise DoorError(f"no such picture or folder: {source}")
        for path in inside:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def read_picture(path: Path) -> Image.Image:
    """A picture as a person sees it: upright, RGB, 8 bits.

    Raises:
        DoorError: if it is empty, cut off, no picture, of a kind that Pillow cannot decode, or has more pixels than
            `image_processing_ita.MAX_PICTURE_PIXELS`.
    """
    from image_processing_ita import read_picture as decode

    try:
        return decode(path)
    except ValueError as error:
        raise DoorError(str(error)) from error


def read_vocabulary(path: Path) -> list[list[str]]:
    """A vocabulary file: JSON (a list of names or lists of synonyms) or text lines `id:name,synonym,...`.

    Text is what FC-CLIP's category lists are published in: classes in the order of the lines, without lines whose
    name is `invalid_class_id`.

    Raises:
        DoorError: if it is neither, or holds no class or an empty name.
    """
    from modeling_ita.vocabulary import normalize_vocabulary

    text = read_text(path)
    try:
        classes = json.loads(text)
    except json.JSONDecodeError as error:
        if path.suffix.lower() == ".json" or text.lstrip()[:1] in ("[", "{"):
            where = f"line {error.lineno}, column {error.colno}"
            raise DoorError(f"the vocabulary file {path} is not JSON: {error.msg} ({where})") from error
        classes = _classes_of_lines(path, text)
    if not isinstance(classes, list):
        raise DoorError(
            f"the vocabulary file {path} must hold a list of classes, got {type(classes).__name__}"
        )
    try:
        return normalize_vocabulary(classes)
    except ValueError as error:
        raise DoorError(f"the vocabulary file {path}: {one_line(error)}") from error


def _classes_of_lines(path: Path, text: str) -> list[str]:
    classes, ids = [], set()
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        class_id, colon, names = line.partition(":")
        if not colon or not class_id.strip().isdecimal():
            raise DoorError(
                f"the vocabulary file {path} is neither JSON nor lines 'id:name,synonym,...' (line {number})"
            )
        if int(class_id) in ids:
            raise DoorError(f"the vocabulary file {path} has the id {int(class_id)} twice (line {number})")
        ids.add(int(class_id))
        if names.strip() != "invalid_class_id":
            classes.append(names)
    return classes


def load_checkpoint(path: Path, device: str | None = None) -> tuple[Any, Any]:
    """The model, in eval mode on `device` (a GPU if there is one, by default), and the processor of a checkpoint.

    Raises:
        DoorError: if the folder is not there, has no weights, lacks some of them, or does not fit together.
    """
    if not path.is_dir():
        raise DoorError(f"no such checkpoint folder: {path}")
    if not (path / "config.json").is_file():
        raise DoorError(f"{path} is not a checkpoint folder: it has no config.json")
    if not any((path / name).is_file() for name in WEIGHT_FILES):
        raise DoorError(f"the checkpoint folder {path} has no weights (model.safetensors)")
    if not (path / "preprocessor_config.json").is_file():
        raise DoorError(f"the checkpoint folder {path} has no image processor (preprocessor_config.json)")

    import torch
    from safetensors import SafetensorError
    from transformers import AutoImageProcessor
    from transformers.utils import logging

    from modeling_ita import ITAForOpenVocabSegmentation

    logging.disable_progress_bar()
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model, report = ITAForOpenVocabSegmentation.from_pretrained(path, output_loading_info=True)
        processor = AutoImageProcessor.from_pretrained(path)
        model = model.eval().to(chosen)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AssertionError, SafetensorError) as error:
        raise DoorError(f"the checkpoint {path} cannot be loaded: {one_line(error, 240)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise DoorError(f"the checkpoint {path} lacks {len(missing)} of its weights, such as {missing[0]}")
    return model, processor


def set_shortest_side(processor: Any, side: int | None) -> None:
    """Lets the processor bring pictures to this shortest side in pixels; the limit of the longest scales along."""
    if side is None:
        return
    size = dict(processor.size)
    ratio = (size.get("longest_edge") or 1333) / (size.get("shortest_edge") or 800)
    processor.size = type(processor.size)(shortest_edge=side, longest_edge=round(side * ratio))
    processor.do_resize = True


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
