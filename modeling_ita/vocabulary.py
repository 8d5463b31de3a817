"""What a vocabulary is: classes, each with one or more names, in one checked form.

Names are compared in one normal form (Unicode composed, case folded, blanks collapsed), because CLIP's tokenizer
lowers case and cleans blanks: names that differ in these have one embedding. What is shown is what was given.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence

OTHER = "other"
"""The name that joins every vocabulary when dominant categories are selected."""

SURROGATES = re.compile("[\ud800-\udfff]")
"""Halves of a character, which no name can hold."""

Templates = tuple[str, ...]

Classes = Iterable[str | Iterable[str]]
"""A vocabulary as callers give it: a class is a name, comma-separated names, or a list of names."""

VocabularyKey = tuple[tuple[str, ...], ...]
"""A checked vocabulary in hashable form."""


class Vocabulary(list):
    """A checked vocabulary: a list of classes, each a non-empty list of names. Made by `normalize_vocabulary`."""

    @property
    def names(self) -> list[str]:
        """All names of all classes, in order; N of them."""
        return [name for synonyms in self for name in synonyms]

    @property
    def class_of_name(self) -> list[int]:
        """For each of the N names, the index of its class."""
        return [index for index, synonyms in enumerate(self) for _ in synonyms]

    @property
    def candidate_names(self) -> list[str]:
        """Names that dominant categories are selected from: each different name once, and `other`; M of them."""
        return distinct([*self.names, OTHER])

    @property
    def is_duplicate(self) -> list[bool]:
        """For each class, whether an earlier one has the very same names."""
        first: dict[frozenset[str], int] = {}
        return [
            first.setdefault(frozenset(map(normal_form, synonyms)), index) != index
            for index, synonyms in enumerate(self)
        ]

    @property
    def key(self) -> VocabularyKey:
        """A hashable form."""
        return tuple(tuple(synonyms) for synonyms in self)

    def shares_name_with(self, names: Iterable[str]) -> list[bool]:
        """For each class, whether any of its names is among `names`, in normal form."""
        known = set(map(normal_form, names))
        return [any(normal_form(name) in known for name in synonyms) for synonyms in self]


@functools.lru_cache(maxsize=65_536)
def normal_form(name: str) -> str:
    """Bring a name to the form in which names are compared: Unicode composed, case folded, blanks collapsed."""
    return " ".join(unicodedata.normalize("NFC", name).casefold().split())


def distinct(names: Iterable[str]) -> list[str]:
    """Keep the first of the names that are equal in normal form."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(normal_form(name), name)
    return list(first.values())


def normalize_vocabulary(classes: Classes) -> Vocabulary:
    """Check a vocabulary and bring it to one form.

    Args:
        classes: K classes. A class is a name, several names in one string separated by commas (as published category
            lists write synonyms), or a list of names. Synonyms that are equal in normal form are kept once.

    Raises:
        ValueError: it is empty, or has an empty name, a name that is not a string, or one that is not valid Unicode.
    """
    if isinstance(classes, Vocabulary):
        return classes
    if isinstance(classes, str | dict) or not isinstance(classes, Iterable):
        raise ValueError(f"a vocabulary is a list of classes, got {type(classes).__name__}: {classes!r:.100}")
    vocabulary = Vocabulary(_synonyms(index, entry) for index, entry in enumerate(classes))
    if not vocabulary:
        raise ValueError("the vocabulary is empty: give at least one class")
    return vocabulary


def _synonyms(index: int, entry: str | Iterable[str]) -> list[str]:
    names = [entry] if isinstance(entry, str) else entry
    if not isinstance(names, Iterable) or isinstance(names, dict):
        raise ValueError(
            f"class {index} of the vocabulary is neither a name nor a list of names: {entry!r:.100}"
        )
    synonyms: list[str] = []
    for name in names:
        if not isinstance(name, str):
            hint = "; for a vocabulary per image use vocabularies=" if isinstance(name, list | tuple) else ""
            raise ValueError(
                f"class {index} of the vocabulary has a name that is not a string: {name!r:.100}{hint}"
            )
        for part in map(str.strip, name.split(",")):
            if not part:
                raise ValueError(f"class {index} of the vocabulary has an empty name: {entry!r:.100}")
            if SURROGATES.search(part):
                raise ValueError(
                    f"class {index} of the vocabulary has a name that is not valid Unicode: {part!r:.100}"
                )
            synonyms.append(part)
    if not synonyms:
        raise ValueError(f"class {index} of the vocabulary has no name: {entry!r:.100}")
    return distinct(synonyms)


def parse_classes(text: str) -> Vocabulary:
    """Read `"cat, sofa|couch, wall"`: commas, semicolons or line ends between classes, bars between synonyms.

    Raises:
        ValueError: no class in the text, or an empty name.
    """
    entries = text.replace(";", ",").replace("\n", ",").split(",")
    while entries and not entries[-1].strip():  # a separator at the end separates nothing
        entries.pop()
    if not entries:
        raise ValueError("the vocabulary is empty: give at least one class, such as 'cat, sofa|couch'")
    return normalize_vocabulary([entry.split("|") for entry in entries])


def with_distractors(
    classes: Classes | None, own: Vocabulary | None, train_vocabulary: Classes | None = None
) -> tuple[Vocabulary, int]:
    """Add classes that compete with a few given ones, so that an image can show none of those.

    A softmax over a single class is 1 whatever the image shows. What it may show instead are the checkpoint's own
    classes and those it was trained on, without the ones that share a name with a given class, in singular or plural.
    `post_process_*(..., num_classes=...)` leaves them out of the results.

    Args:
        classes: the given classes; None for the checkpoint's own.
        own: the checkpoint's own vocabulary.
        train_vocabulary: the classes it was trained on.

    Returns:
        The given classes followed by the distractors, and the number of given classes. There are no distractors where
        at least as many classes are given as the checkpoint has of its own and was trained on.

    Raises:
        ValueError: if `classes` is no vocabulary, or there is none at all.
    """
    if classes is None and own is None:
        raise ValueError("no classes are given, and the checkpoint has none of its own")
    own_classes = own or Vocabulary()
    given = own_classes if classes is None else normalize_vocabulary(classes)
    trained = normalize_vocabulary(train_vocabulary) if train_vocabulary else Vocabulary()
    if len(given) >= max(len(own_classes), len(trained)):
        return given, len(given)
    known = {form for name in given.names for form in _singular_and_plural(name)}
    distractors = []
    for synonyms in [*own_classes, *trained]:
        forms = {form for name in synonyms for form in _singular_and_plural(name)}
        if known.isdisjoint(forms):
            distractors.append(synonyms)
            known |= forms
    return Vocabulary([*given, *distractors]), len(given)


def _singular_and_plural(name: str) -> set[str]:
    """Give forms of a name of which two names that differ in number share one."""
    form = normal_form(name)
    return {form, f"{form}s", f"{form}es", f"{form.removesuffix('y')}ies"}


def check_templates(templates: Sequence[str]) -> Templates:
    """Give the templates as a tuple.

    Raises:
        ValueError: there is none, or one does not have exactly one `{}`.
    """
    templates = [templates] if isinstance(templates, str) else templates
    if not isinstance(templates, Sequence):
        raise ValueError(f"prompt templates are a list, got {templates!r:.100}")
    if not templates:
        raise ValueError("no prompt template: give at least one, such as 'a photo of a {}.'")
    for template in templates:
        if (
            not isinstance(template, str)
            or template.count("{}") != 1
            or template.count("{") != 1
            or template.count("}") != 1
        ):
            raise ValueError(f"a prompt template has exactly one '{{}}' for the name, got {template!r:.100}")
    return tuple(templates)
