"""The classes of a dataset, and which of them a training run may see masks of."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import ClassLabel

from ita_segmentation.data.prepared import vocabulary_of
from ita_segmentation.data.scenes import IGNORE_INDEX, scenes_vocabulary
from ita_segmentation.errors import ITAError
from modeling_ita.text import normal_form, normalize_vocabulary


@dataclass(frozen=True)
class TrainingClasses:
    """The classes of a dataset, and which of them a training run may see masks of.

    Attributes:
        classes: K classes, each a list of names.
        seen: (K,) whether masks of the class are used in training.
        stuff_names: first names of the stuff classes.
        ignore_index: the label of ignored pixels.
    """

    classes: list[list[str]]
    seen: list[bool]
    stuff_names: list[str]
    ignore_index: int = IGNORE_INDEX

    @property
    def seen_classes(self) -> list[list[str]]:
        """The training vocabulary."""
        return [names for names, seen in zip(self.classes, self.seen, strict=True) if seen]

    @property
    def training_label(self) -> np.ndarray:
        """(K,) int64: index of each class in the training vocabulary, -1 for unseen classes."""
        seen = np.asarray(self.seen)
        return np.where(seen, np.cumsum(seen) - 1, -1)

    def same_labels(self, other: "TrainingClasses") -> bool:
        """Whether the labels of two datasets mean the same: the same classes in the same order."""
        names = [[normal_form(names[0]) for names in some.classes] for some in (self, other)]
        return names[0] == names[1] and self.ignore_index == other.ignore_index


def scenes_classes() -> TrainingClasses:
    """The classes of Scenes with its split into seen and unseen."""
    vocabulary = scenes_vocabulary()
    stuff = [vocabulary.names[index] for index in vocabulary.stuff_ids]
    return TrainingClasses(vocabulary.classes, vocabulary.seen, stuff)


def dataset_classes(dataset: Any, unseen: Sequence[str] = ()) -> TrainingClasses:
    """Read the classes of a `datasets.Dataset`.

    They are the table `classes` of `name`, `synonyms`, `isthing` and `seen` (all but the name optional) in the JSON of
    `dataset.info.description`, as `scenes_dataset` writes it; or the vocabulary of a prepared dataset; or the names of
    the first ClassLabel among the features, where commas separate synonyms. Those named in `unseen` (case and blanks do
    not count) are withheld, too.

    Raises:
        ITAError: if there are no class names, `unseen` has a name that is not a class, or no class is seen.
    """
    ignore_index = IGNORE_INDEX
    table = _class_table(dataset.info.description)
    if not table and {"classes", "ignore_index"} <= set(dataset.features):
        vocabulary = vocabulary_of(dataset)
        ignore_index = vocabulary.ignore_index
        is_thing = vocabulary.is_thing or [True] * len(vocabulary.classes)
        table = [
            {"name": names[0], "synonyms": names[1:], "isthing": thing}
            for names, thing in zip(vocabulary.classes, is_thing, strict=True)
        ]
    table = table or [{"name": name} for name in class_names(dataset.features)]
    if not table:
        raise ITAError("the dataset has no class names: none of its features is or contains a ClassLabel")
    try:
        vocabulary_lists = normalize_vocabulary([[row["name"], *row.get("synonyms", [])] for row in table])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ITAError(f"the classes of the dataset cannot be read: {error}") from error
    classes = [list(names) for names in vocabulary_lists]
    normal = [{normal_form(name) for name in names} for names in classes]
    withheld = {normal_form(name) for name in unseen}
    unknown = [name for name in unseen if not any(normal_form(name) in names for names in normal)]
    if unknown:
        raise ITAError(f"the dataset has no class {', '.join(map(repr, sorted(unknown)))}")
    seen = [
        bool(row.get("seen", True)) and not withheld & names for row, names in zip(table, normal, strict=True)
    ]
    if not any(seen):
        raise ITAError("all classes of the dataset are unseen: none is left to train on")
    stuff = [names[0] for row, names in zip(table, classes, strict=True) if not row.get("isthing", True)]
    return TrainingClasses(classes, seen, stuff, ignore_index)


def _class_table(description: str) -> list[dict[str, Any]]:
    """The table of classes in a dataset's description; empty if there is none."""
    try:
        values = json.loads(description)
    except (ValueError, RecursionError):
        return []
    return values.get("classes", []) if isinstance(values, dict) else []


def class_names(features: Any) -> list[str]:
    """Names of the first ClassLabel in the features of a dataset, however deep; empty if there is none."""
    if isinstance(features, ClassLabel):
        return list(features.names)
    if isinstance(features, dict):
        parts = list(features.values())
    elif isinstance(features, list):
        parts = features
    else:
        parts = [features.feature] if hasattr(features, "feature") else []
    return next((names for names in map(class_names, parts) if names), [])
