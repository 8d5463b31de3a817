"""The classes of a data set, and which of them a training run may see masks of."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import ClassLabel

from ita_segmentation.data.prepared import DatasetVocabulary, vocabulary_of
from ita_segmentation.data.scenes import IGNORE_INDEX, scenes_vocabulary
from modeling_ita.vocabulary import normalize_vocabulary


@dataclass(frozen=True)
class TrainingClasses:
    """The classes of a data set, and which of them a training run may see masks of.

    Attributes:
        classes: K classes, each a list of names.
        seen: (K,) whether masks of the class are given in training.
        stuff_names: primary names of amorphous classes.
        ignore_index: label of pixels that are left out.
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
        """(K,) int64: index of each class in the training vocabulary, -1 where it has none."""
        seen = np.asarray(self.seen)
        return np.where(seen, np.cumsum(seen) - 1, -1)


def scenes_classes() -> TrainingClasses:
    """The classes of the Scenes world with its split into seen and unseen."""
    vocabulary = scenes_vocabulary()
    stuff = [vocabulary.names[index] for index in vocabulary.stuff_ids]
    return TrainingClasses(vocabulary.classes, vocabulary.seen, stuff)


def disk_classes(dataset: Any, unseen: Sequence[str] = ()) -> TrainingClasses:
    """The classes of a data set.

    They are the table `classes` of `name`, `synonyms`, `isthing` and `seen` (all but the name optional) in the
    JSON of `dataset.info.description`, as `scenes_dataset` writes it; or the vocabulary of a prepared data set; or
    else the names of the first ClassLabel among the features, where commas separate synonyms. Ids count in that order.

    Args:
        dataset: a `datasets.Dataset`.
        unseen: names of classes whose masks are withheld, beside those that the table says.

    Raises:
        ValueError: there are no class names, or `unseen` has one that is none of them.
    """
    table, ignore_index = class_table(dataset.info.description), IGNORE_INDEX
    if not table and {"classes", "ignore_index"} <= set(dataset.features):
        vocabulary = vocabulary_of(dataset)
        table, ignore_index = vocabulary_table(vocabulary), vocabulary.ignore_index
    table = table or [{"name": name} for name in class_names(dataset.features)]
    if not table:
        raise ValueError("the data set has no class names: none of its features is or holds a ClassLabel")
    classes = [
        list(names) for names in normalize_vocabulary([[r["name"], *r.get("synonyms", [])] for r in table])
    ]
    unknown = sorted(set(unseen) - {name for names in classes for name in names})
    if unknown:
        raise ValueError(f"the data set has no class {', '.join(map(repr, unknown))}")
    seen = [
        row.get("seen", True) and not set(unseen) & set(names)
        for row, names in zip(table, classes, strict=True)
    ]
    stuff = [names[0] for row, names in zip(table, classes, strict=True) if not row.get("isthing", True)]
    return TrainingClasses(classes, seen, stuff, ignore_index)


def class_table(description: str) -> list[dict[str, Any]]:
    """The table of classes in a data set's description; empty if it holds none."""
    try:
        values = json.loads(description)
    except ValueError:
        return []
    return values.get("classes", []) if isinstance(values, dict) else []


def vocabulary_table(vocabulary: DatasetVocabulary) -> list[dict[str, Any]]:
    """The table of classes of a prepared data set; classes count as things where that is not known."""
    is_thing = vocabulary.is_thing or [True] * len(vocabulary.classes)
    return [
        {"name": names[0], "synonyms": names[1:], "isthing": thing}
        for names, thing in zip(vocabulary.classes, is_thing, strict=True)
    ]


def class_names(features: Any) -> list[str]:
    """Names of the first ClassLabel in the features of a data set, however deep; empty if there is none."""
    if isinstance(features, ClassLabel):
        return list(features.names)
    if isinstance(features, dict):
        parts = list(features.values())
    elif isinstance(features, list):
        parts = features
    else:
        parts = [features.feature] if hasattr(features, "feature") else []
    return next((names for names in map(class_names, parts) if names), [])
