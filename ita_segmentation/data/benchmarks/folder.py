"""A user's own folder: images, label PNGs of the same names, and a file of class names.

    source/classes.json (or classes.txt)
    source/images/NAME.jpg               or source/images/{train,validation}/NAME.jpg
    source/labels/NAME.png               or source/labels/{train,validation}/NAME.png

The class file is a vocabulary as everywhere else: a JSON list of names or lists of synonyms, numbered from 0; or
lines `id:name,synonym,...` with the label values as ids (`invalid_class_id` is ignored). A JSON file may also be
`{"classes": [...], "things": ["cat", ...]}`, with the names of the classes that have instances.
Labels 255 and 65535 are ignored unless they are ids of classes.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ita_segmentation.class_names import read_vocabulary
from ita_segmentation.data.benchmarks.base import ImageEntry, LabeledImage, SourceDataset
from ita_segmentation.data.benchmarks.readers import files_by_stem, read_pair, relabel, require_folder
from ita_segmentation.data.categories import Category
from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.files import read_text
from ita_segmentation.images import IMAGE_SUFFIXES

CLASS_FILES = ("classes.json", "classes.txt")
IGNORED_VALUES = (255, 65535)


@dataclass
class FolderDataset(SourceDataset):
    """A user's folder; `FolderDataset.at(source)` reads its classes.

    `values` (K,) are the label values of the classes; those in `ignored` are ignored unless they belong to a class.
    Without subfolders for splits all images are of "train".
    """

    categories: Sequence[Category] = ()
    values: tuple[int, ...] = ()
    ignored: tuple[int, ...] = IGNORED_VALUES
    ignore_index: int = 255
    splits: tuple[str, ...] = SourceDataset.splits
    in_subfolders: bool = True
    layout: str = (
        "classes.json or classes.txt (or a class file given), images/ and labels/ with images and PNGs of the same "
        "names, both perhaps with train/ and validation/ inside"
    )

    @classmethod
    def at(cls, source: Path, classes: Path | None = None) -> "FolderDataset":
        """Read the splits and the classes (in classes.json or classes.txt unless another file is given) of a folder."""
        require_folder(source, ["images", "labels"], cls.layout)
        if classes is None:
            classes = next((source / name for name in CLASS_FILES if (source / name).is_file()), None)
        if classes is None:
            require_folder(source, CLASS_FILES[:1], cls.layout)
            raise ITAError(f"{source / CLASS_FILES[0]} is not a regular file")
        splits = tuple(split for split in SourceDataset.splits if (source / "images" / split).is_dir())
        categories, values, invalid = read_classes(classes)
        return cls(
            categories=categories,
            values=values,
            ignored=(*IGNORED_VALUES, *invalid),
            ignore_index=255 if len(categories) <= 255 else 65535,
            splits=splits or ("train",),
            in_subfolders=bool(splits),
        )

    def index(self, source: Path, split: str) -> list[ImageEntry]:
        """List the images of a split; see `SourceDataset.index`."""
        images, labels = (f"{part}/{split}" if self.in_subfolders else part for part in ("images", "labels"))
        require_folder(source, [images, labels], self.layout)
        image_names = files_by_stem(source / images, IMAGE_SUFFIXES)
        stems = sorted(image_names | files_by_stem(source / labels, (".png",)))
        return [
            ImageEntry(stem, f"{images}/{image_names.get(stem, f'{stem}.*')}", f"{labels}/{stem}.png")
            for stem in stems
        ]

    def read(self, source: Path, entry: ImageEntry) -> LabeledImage:
        """Read one image; see `SourceDataset.read`."""
        image, values = read_pair(source, entry)
        indices = dict.fromkeys(self.ignored, self.ignore_index)
        indices |= {value: index for index, value in enumerate(self.values)}
        label = relabel(values, indices, self.ignore_index, source / str(entry.label))
        return LabeledImage(entry.image_id, image, label)


def read_classes(path: Path) -> tuple[tuple[Category, ...], tuple[int, ...], tuple[int, ...]]:
    """Read a class file: the categories, the label value of each, and the label values that it says to ignore."""
    from modeling_ita.text import normal_form

    text = read_text(path)
    table = None
    with contextlib.suppress(ValueError, RecursionError):
        table = json.loads(text)
    table = table if isinstance(table, dict) else None
    classes = read_vocabulary(path) if table is None else _classes_of_table(table, path)
    normal_names = [{normal_form(name) for name in names} for names in classes]
    for index, normal in enumerate(normal_names):
        if normal in normal_names[:index]:
            raise ITAError(f"{path} has the class {', '.join(classes[index])!r} twice")
    things = None if table is None or "things" not in table else table["things"]
    if things is not None:
        if not isinstance(things, list) or not all(isinstance(name, str) for name in things):
            raise ITAError(f"{path}: 'things' must be a list of names")
        unknown = [name for name in things if not any(normal_form(name) in names for names in normal_names)]
        if unknown:
            raise ITAError(f"{path}: the thing {unknown[0]!r} is none of the classes")
    categories = []
    for names, normal in zip(classes, normal_names, strict=True):
        is_thing = None if things is None else any(normal_form(name) in normal for name in things)
        categories.append(Category(", ".join(names), ", ".join(names), is_thing))
    values, invalid = _label_values(text, len(classes))
    if max(values) > 65_535:
        raise ITAError(f"{path} has the class {max(values)}: labels have at most 16 bits")
    return tuple(categories), values, invalid


def _classes_of_table(table: dict[str, Any], path: Path) -> list[list[str]]:
    if "classes" not in table or set(table) - {"classes", "things"}:
        raise ITAError(f'{path} must hold a list, or {{"classes": [...], "things": [...]}}')

    from modeling_ita.text import normalize_vocabulary

    try:
        return [list(names) for names in normalize_vocabulary(table["classes"])]
    except (ValueError, TypeError) as error:
        raise ITAError(f"{path}: {one_line(error)}") from error


def _label_values(text: str, num_classes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Label values of the classes, and of what is not a class: the ids of lines `id:names`, else 0, 1, ..."""
    if text.lstrip()[:1] in ("[", "{"):
        return tuple(range(num_classes)), ()
    values: list[int] = []
    invalid: list[int] = []
    for line in filter(str.strip, text.splitlines()):
        value, _, names = line.partition(":")
        (invalid if names.strip() == "invalid_class_id" else values).append(int(value))
    return tuple(values), tuple(invalid)
