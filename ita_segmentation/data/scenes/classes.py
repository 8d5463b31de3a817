"""The classes of Scenes: names, synonyms, which are things, and which have masks in training (`vocabulary.json`).

Seen classes have masks in training. Unseen classes never do, and CLIP knows them from captioned images alone: the
split of open-vocabulary segmentation.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

VOCABULARY_FILE = Path(__file__).with_name("vocabulary.json")


@dataclass(frozen=True)
class ScenesVocabulary:
    """The classes of Scenes, things first and then stuff; a class id is a position in these lists."""

    classes: list[list[str]]
    """Name and synonyms of each class; no name belongs to two classes."""
    is_thing: list[bool]
    seen: list[bool]
    codepoints: list[list[int]]
    """Unicode code points of each thing's pictograms (empty for stuff)."""

    @cached_property
    def names(self) -> list[str]:
        """Primary name of each class."""
        return [names[0] for names in self.classes]

    @cached_property
    def thing_ids(self) -> list[int]:
        """Ids of the things."""
        return [index for index, is_thing in enumerate(self.is_thing) if is_thing]

    @cached_property
    def stuff_ids(self) -> list[int]:
        """Ids of the stuff classes."""
        return [index for index, is_thing in enumerate(self.is_thing) if not is_thing]

    @cached_property
    def seen_ids(self) -> list[int]:
        """Ids of the seen classes."""
        return [index for index, seen in enumerate(self.seen) if seen]


@lru_cache(maxsize=1)
def scenes_vocabulary() -> ScenesVocabulary:
    """Load the classes of Scenes, once, from `vocabulary.json`."""
    table = json.loads(VOCABULARY_FILE.read_text(encoding="utf-8"))
    rows = table["things"] + table["stuff"]
    return ScenesVocabulary(
        classes=[[row["name"], *row["synonyms"]] for row in rows],
        is_thing=[True] * len(table["things"]) + [False] * len(table["stuff"]),
        seen=[row["seen"] for row in rows],
        codepoints=[[int(point[2:], 16) for point in row.get("codepoints", [])] for row in rows],
    )


def select_classes(classes: str | Iterable[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Resolve a selection ("seen", "all" or ids) to sorted thing ids and stuff ids; ValueError if there are none."""
    if not isinstance(classes, str):
        classes = tuple(classes)
    return _select_classes(classes)


@lru_cache(maxsize=64)
def _select_classes(classes: str | tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    vocabulary = scenes_vocabulary()
    if classes == "all":
        chosen = list(range(len(vocabulary.classes)))
    elif classes == "seen":
        chosen = vocabulary.seen_ids
    elif isinstance(classes, str):
        raise ValueError(f'classes must be "seen", "all" or class ids, not {classes!r}')
    else:
        unknown = [c for c in classes if isinstance(c, bool) or not 0 <= c < len(vocabulary.classes)]
        if unknown:
            raise ValueError(f"class ids must lie in [0, {len(vocabulary.classes)}), got {unknown[:5]}")
        chosen = sorted({int(c) for c in classes})
    if not chosen:
        raise ValueError("classes names no class")
    things = tuple(c for c in chosen if vocabulary.is_thing[c])
    return things, tuple(c for c in chosen if not vocabulary.is_thing[c])
