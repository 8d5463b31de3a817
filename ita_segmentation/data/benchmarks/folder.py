"""A folder of one's own: images, label PNGs of the same names, and a file of class names.

    source/classes.json (or classes.txt)
    source/images/NAME.jpg               or source/images/{train,validation}/NAME.jpg
    source/labels/NAME.png               or source/labels/{train,validation}/NAME.png

The class file is a vocabulary as everywhere here: a JSON list of names or of lists of synonyms, whose positions the
labels count from 0; or lines `id:name,synonym,...`, whose ids are the labels (`invalid_class_id` is ignored). A JSON
file may also be `{"classes": [...], "things": ["cat", ...]}`, with the names of the classes that have instances.
Labels 255 and 65535 are ignored unless they are ids of classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ita_segmentation.class_names import read_vocabulary
from ita_segmentation.data.benchmarks.files import (
    ImageFiles,
    files_by_stem,
    read_pair,
    relabel,
    require_folder,
)
from ita_segmentation.data.benchmarks.release import Category, LabelledImage, ReleaseError
from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.files import read_text
from ita_segmentation.images import IMAGE_SUFFIXES

CLASS_FILES = ("classes.json", "classes.txt")
IGNORED = (255, 65535)
SPLITS = ("train", "validation")


@dataclass
class FolderRelease:
    """A user's folder; `FolderRelease.at(source)` reads its classes.

    Attributes:
        values: (K,) the label value of each class.
        ignored: label values that are left out, unless they are of a class.
        splits: those that have sub-folders; "train" if there are no sub-folders.
        in_folders: whether there are.
    """

    categories: Sequence[Category] = ()
    values: tuple[int, ...] = ()
    ignored: tuple[int, ...] = IGNORED
    ignore_index: int = 255
    splits: tuple[str, ...] = SPLITS
    in_folders: bool = True
    has_segments: bool = False
    layout: str = (
        "classes.json or classes.txt (or a class file given), images/ and labels/ with images and PNGs of the same "
        "names, both perhaps with train/ and validation/ inside"
    )

    @classmethod
    def at(cls, source: Path, classes: Path | None = None) -> FolderRelease:
        """The folder with its classes and splits.

        Args:
            classes: the file of class names; classes.json or classes.txt in the folder if not given.

        Raises:
            ReleaseError: the folder is not as expected, or the class file cannot be read.
        """
        require_folder(source, ["images", "labels"], cls.layout)
        if classes is None:
            classes = next((source / name for name in CLASS_FILES if (source / name).is_file()), None)
        if classes is None:
            require_folder(source, CLASS_FILES[:1], cls.layout)
        assert classes is not None
        splits = tuple(split for split in SPLITS if (source / "images" / split).is_dir())
        categories, values, invalid = read_classes(classes)
        return cls(
            categories=categories,
            values=values,
            ignored=(*IGNORED, *invalid),
            ignore_index=255 if len(categories) <= 255 else 65535,
            splits=splits or SPLITS[:1],
            in_folders=bool(splits),
        )

    def index(self, source: Path, split: str) -> list[ImageFiles]:
        images, labels = (f"{part}/{split}" if self.in_folders else part for part in ("images", "labels"))
        require_folder(source, [images, labels], self.layout)
        image_files = files_by_stem(source / images, IMAGE_SUFFIXES)
        stems = sorted(image_files | files_by_stem(source / labels, (".png",)))
        return [
            ImageFiles(stem, f"{images}/{image_files.get(stem, f'{stem}.*')}", f"{labels}/{stem}.png")
            for stem in stems
        ]

    def read(self, source: Path, item: ImageFiles) -> LabelledImage:
        image, values = read_pair(source, item)
        indices = dict.fromkeys(self.ignored, self.ignore_index)
        indices |= {value: index for index, value in enumerate(self.values)}
        return LabelledImage(
            item.image_id, image, relabel(values, indices, self.ignore_index, source / item.label)
        )


def read_classes(path: Path) -> tuple[tuple[Category, ...], tuple[int, ...], tuple[int, ...]]:
    """Categories, the label value of each, and the values that the file says to ignore.

    Raises:
        ReleaseError: the file cannot be read, two classes have the same names, or a thing is none of the classes.
    """
    try:
        text = read_text(path)
        table = _json_object(text)
        names = read_vocabulary(path) if table is None else _names_of_table(table, path)
    except ITAError as error:
        raise ReleaseError(str(error)) from error
    words = [", ".join(synonyms) for synonyms in names]
    twice = next((word for word in words if words.count(word) > 1), None)
    if twice is not None:
        raise ReleaseError(f"{path} has the class {twice!r} twice")
    things = None if table is None or "things" not in table else _things(table["things"], names, path)
    categories = tuple(
        Category(word, word, None if things is None else bool(things & set(synonyms)))
        for word, synonyms in zip(words, names, strict=True)
    )
    values, invalid = _label_values(text, len(names))
    if max(values) > 65_535:
        raise ReleaseError(f"{path} has the class {max(values)}: labels have at most 16 bits")
    return categories, values, invalid


def _json_object(text: str) -> dict[str, Any] | None:
    """The object that the text holds; None if it is no JSON, or a list."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        return None
    return content if isinstance(content, dict) else None


def _names_of_table(table: dict[str, Any], path: Path) -> list[list[str]]:
    from modeling_ita.vocabulary import normalize_vocabulary

    unknown = sorted(set(table) - {"classes", "things"})
    if "classes" not in table or unknown:
        raise ReleaseError(f'{path} must hold a list, or {{"classes": [...], "things": [...]}}')
    try:
        return [list(synonyms) for synonyms in normalize_vocabulary(table["classes"])]
    except ValueError as error:
        raise ReleaseError(f"{path}: {one_line(error)}") from error


def _things(given: Any, names: Sequence[Sequence[str]], path: Path) -> set[str]:
    known = {word for synonyms in names for word in synonyms}
    if not isinstance(given, list) or not all(isinstance(word, str) for word in given):
        raise ReleaseError(f"{path}: 'things' must be a list of names")
    unknown = [word for word in given if word not in known]
    if unknown:
        raise ReleaseError(f"{path}: the thing {unknown[0]!r} is none of the classes")
    return set(given)


def _label_values(text: str, num_classes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Label values of the classes and of what is no class: the ids of lines `id:names`, else 0, 1, ..."""
    if text.lstrip()[:1] in ("[", "{"):
        return tuple(range(num_classes)), ()
    values: list[int] = []
    invalid: list[int] = []
    for line in filter(str.strip, text.splitlines()):
        value, _, names = line.partition(":")
        (invalid if names.strip() == "invalid_class_id" else values).append(int(value))
    return tuple(values), tuple(invalid)
