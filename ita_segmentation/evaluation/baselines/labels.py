"""Match the labels of another model with the classes of a benchmark, by name.

A model trained on a fixed list of labels can be scored only where its labels and the benchmark's classes mean the
same. Datasets spell one class in many ways ("wall-other-merged", "diningtable", "sofa, couch"), so names are compared
from the strictest way to the loosest, and each class gets the labels that name it in the strictest way.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from modeling_ita.text import normal_form

SUFFIXES = frozenset({"merged", "other", "stuff"})
"""Last words that COCO adds to distinguish its labels ("tree-merged", "wall-stuff"); they name nothing."""

ORDER_AGREEMENT = 0.9
"""Share of labels that must name the class at their own index before the rest are matched by index alone.

Two lists of names are published for ADE20K's 150 classes, in one order ("windowpane" and "window"); 139 agree.
"""

PLACEHOLDER = re.compile(r"(label|class)?[\s_-]*\d+")


@dataclass(frozen=True)
class LabelMatch:
    """Labels of a model and the classes of a benchmark.

    `labels` are the indices with a class, ascending, and `classes` theirs; other labels are not scored, and the classes
    in `missing`, which no label names, can never be predicted. `notes` are for readers of the scores, one line each.
    """

    labels: tuple[int, ...]
    classes: tuple[int, ...]
    missing: tuple[int, ...]
    notes: tuple[str, ...] = ()


def match_labels(labels: Sequence[str], classes: Sequence[Sequence[str]]) -> LabelMatch:
    """Find each label's class; labels are "name, synonym, ...", classes lists of names.

    Names are compared first in their normal form, then without punctuation, spaces and `SUFFIXES`; the first name of
    both first, then any. A label that names several classes equally well gets none of them; several labels may be one
    class. Two rules go beyond names, and `notes` reports them:

    - by index: if there are as many labels as classes and at least `ORDER_AGREEMENT` of the labels name the class at
      their own index and none names another, then the rest are matched by their index, too;
    - background: if the benchmark has a class "background" that no label names, every label without a class is
      background.

    Raises ValueError if the labels are placeholders ("LABEL_0"), or no label names a class.
    """
    if all(PLACEHOLDER.fullmatch(normal_form(label)) for label in labels):
        raise ValueError(
            f"its {len(labels)} labels are placeholders such as {labels[0]!r}: write their names into id2label of "
            "its config.json"
        )
    found = _matches_by_name([_names(label) for label in labels], classes)
    if not found:
        raise ValueError(
            f"none of its {len(labels)} labels ({quoted(labels)}) is one of the {len(classes)} classes "
            f"({quoted([names[0] for names in classes])})"
        )
    notes = []
    in_order = len(labels) == len(classes) and all(label == index for label, index in found.items())
    by_index = [index for index in range(len(labels)) if index not in found]
    if in_order and by_index and len(found) >= ORDER_AGREEMENT * len(labels):
        pairs = [f"{labels[index]!r} is {classes[index][0]!r}" for index in by_index]
        notes.append(f"{len(by_index)} of {len(labels)} labels are matched by their index: {_first(pairs)}")
        found |= {index: index for index in by_index}
    rest = [index for index in range(len(labels)) if index not in found]
    background = background_class(classes)
    if rest and background is not None and background not in found.values():
        notes.append(f"{len(rest)} labels that are no class count as {classes[background][0]!r}")
        found |= dict.fromkeys(rest, background)
    elif rest:
        notes.append(
            f"{len(rest)} labels that are no class are left out: {quoted([labels[i] for i in rest])}"
        )
    chosen = tuple(sorted(found))
    missing = tuple(sorted(set(range(len(classes))) - set(found.values())))
    return LabelMatch(chosen, tuple(found[index] for index in chosen), missing, tuple(notes))


def background_class(classes: Sequence[Sequence[str]]) -> int | None:
    """Return the index of the class that means "none of the others"; None if there is none."""
    found = [index for index, names in enumerate(classes) if _loose(names[0]) == "background"]
    return found[0] if found else None


def _names(label: str) -> list[str]:
    return [name for part in re.split(r"[,;|]", label) if (name := part.strip())] or [label]


def _loose(name: str) -> str:
    words = re.findall(r"[^\W_]+", name.casefold())
    while len(words) > 1 and words[-1] in SUFFIXES:
        words.pop()
    return "".join(words)


STAGES: tuple[Callable[[Sequence[str]], set[str]], ...] = (
    lambda names: {", ".join(map(normal_form, names))},
    lambda names: {normal_form(names[0])},
    lambda names: {_loose(names[0])},
    lambda names: {normal_form(name) for name in names},
    lambda names: {_loose(name) for name in names},
)
"""Ways to compare, strictest first: keys of a list of names, one of which must be equal."""


def _matches_by_name(
    label_names: Sequence[Sequence[str]], class_names: Sequence[Sequence[str]]
) -> dict[int, int]:
    """Return label index -> class index."""
    found: dict[int, int] = {}
    for keys_of in STAGES:
        taken = set(found.values())
        by_key: dict[str, set[int]] = {}
        for index, names in enumerate(class_names):
            if index not in taken:
                for key in keys_of(names):
                    by_key.setdefault(key, set()).add(index)
        by_key.pop("", None)
        for label, names in enumerate(label_names):
            if label in found:
                continue
            claims = {index for key in keys_of(names) for index in by_key.get(key, ())}
            if len(claims) == 1:
                found[label] = claims.pop()
    return found


def quoted(names: Sequence[str]) -> str:
    """List the first names in quotes."""
    return _first([repr(name) for name in names])


def _first(items: Sequence[str], limit: int = 5) -> str:
    text = ", ".join(items[:limit])
    return text if len(items) <= limit else f"{text} and {len(items) - limit} more"
