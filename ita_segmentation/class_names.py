"""Read vocabulary files."""

import json
from pathlib import Path

from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.files import read_text


def read_vocabulary(path: Path) -> list[list[str]]:
    """Read a vocabulary file.

    Args:
        path: JSON (a list of names or of lists of synonyms), or text lines `id:name,synonym,...`, the form of FC-CLIP's
            published lists: classes in the order of the lines, without lines whose name is `invalid_class_id`.

    Returns:
        The classes, each a list of names.

    Raises:
        ITAError: it is neither, or holds no class or an empty name.
    """
    from modeling_ita.text import normalize_vocabulary

    text = read_text(path)
    try:
        classes = json.loads(text)
    except RecursionError as error:
        raise ITAError(f"the vocabulary file {path} is nested too deeply") from error
    except json.JSONDecodeError as error:
        if path.suffix.lower() == ".json" or text.lstrip()[:1] in ("[", "{"):
            where = f"line {error.lineno}, column {error.colno}"
            raise ITAError(f"the vocabulary file {path} is not JSON: {error.msg} ({where})") from error
        classes = _classes_of_lines(path, text)
    if not isinstance(classes, list):
        raise ITAError(
            f"the vocabulary file {path} must hold a list of classes, got {type(classes).__name__}"
        )
    try:
        return normalize_vocabulary(classes)
    except ValueError as error:
        raise ITAError(f"the vocabulary file {path}: {one_line(error)}") from error


def _classes_of_lines(path: Path, text: str) -> list[str]:
    classes, ids = [], set()
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        class_id, colon, names = line.partition(":")
        if not colon or not class_id.strip().isdecimal():
            raise ITAError(
                f"the vocabulary file {path} is neither JSON nor lines 'id:name,synonym,...' (line {number})"
            )
        if int(class_id) in ids:
            raise ITAError(f"the vocabulary file {path} has the id {int(class_id)} twice (line {number})")
        ids.add(int(class_id))
        if names.strip() != "invalid_class_id":
            classes.append(names)
    return classes
