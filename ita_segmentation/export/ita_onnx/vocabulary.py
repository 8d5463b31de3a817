"""Vocabularies and their tokens: the rules of `modeling_ita.text` and of CLIP's tokenizer, without torch."""

import html
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

OTHER = "other"
"""The name that joins every vocabulary when dominant categories are selected."""

Classes = Sequence[str | Sequence[str]]


def normal_form(name: str) -> str:
    """Bring a name to the form in which names are compared."""
    return " ".join(unicodedata.normalize("NFC", name).casefold().split())


def distinct(names: Iterable[str]) -> list[str]:
    """Keep the first of the names that are equal in normal form."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(normal_form(name), name)
    return list(first.values())


def parse_classes(text: str) -> list[list[str]]:
    """Read `"cat, sofa|couch, wall"`: commas, semicolons or line ends between classes, bars between synonyms.

    Raises:
        ValueError: no class in the text, or an empty name.
    """
    entries = text.replace(";", ",").replace("\n", ",").split(",")
    while entries and not entries[-1].strip():
        entries.pop()
    return normalize_vocabulary([entry.split("|") for entry in entries])


def normalize_vocabulary(classes: Classes) -> list[list[str]]:
    """Bring a vocabulary to one form.

    Args:
        classes: each a name, comma-separated names, or a list of names.

    Raises:
        ValueError: it is no list, or empty, or has an empty name.
    """
    if isinstance(classes, str | Mapping) or not isinstance(classes, Iterable):
        raise ValueError(f"a vocabulary is a list of classes, got {classes!r:.100}")
    vocabulary = []
    for index, entry in enumerate(classes):
        names = [entry] if isinstance(entry, str) else list(entry)
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"class {index} of the vocabulary is not a name or a list of names: {entry!r:.100}"
            )
        parts = [part.strip() for name in names for part in name.split(",")]
        if not all(parts):
            raise ValueError(f"class {index} of the vocabulary has an empty name: {entry!r:.100}")
        vocabulary.append(distinct(parts))
    if not vocabulary:
        raise ValueError("the vocabulary is empty: give at least one class, such as 'cat, sofa|couch'")
    return vocabulary


def with_distractors(
    classes: Sequence[Sequence[str]], own: Sequence[Sequence[str]], trained: Sequence[Sequence[str]]
) -> list[list[str]]:
    """Add the checkpoint's classes that share no name with a given one, in singular or plural, to compete with them.

    Args:
        classes: the given ones.
        own: the checkpoint's own.
        trained: those with masks in training.
    """
    result = [list(names) for names in classes]
    if len(result) >= max(len(own), len(trained)):
        return result
    known = {form for names in result for name in names for form in _singular_and_plural(name)}
    for names in [*own, *trained]:
        forms = {form for name in names for form in _singular_and_plural(name)}
        if known.isdisjoint(forms):
            result.append(list(names))
            known |= forms
    return result


def _singular_and_plural(name: str) -> set[str]:
    form = normal_form(name)
    return {form, f"{form}s", f"{form}es", f"{form.removesuffix('y')}ies"}


def classes_among(vocabulary: Sequence[Sequence[str]], names: Iterable[str]) -> list[bool]:
    """For each class, say whether any of its names is among `names`, in normal form."""
    known = set(map(normal_form, names))
    return [any(normal_form(name) in known for name in synonyms) for synonyms in vocabulary]


def is_duplicate(vocabulary: Sequence[Sequence[str]]) -> list[bool]:
    """For each class, say whether an earlier one has the very same names."""
    first: dict[frozenset[str], int] = {}
    return [
        first.setdefault(frozenset(map(normal_form, names)), index) != index
        for index, names in enumerate(vocabulary)
    ]


class ClipTokenizer:
    """CLIP's tokens of prompts, by the package `tokenizers`."""

    def __init__(self, file: Path, context_length: int, padded: bool = False):
        from tokenizers import Tokenizer

        self.tokenizer: Any = Tokenizer.from_file(str(file))
        self.start, self.end = map(self.tokenizer.token_to_id, ("<start_of_text>", "<end_of_text>"))
        self.context_length, self.padded = context_length, padded

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Tokenize prompts: (n, L) int64, L of the longest; what goes beyond the context is cut off."""
        texts = [html.unescape(html.unescape(prompt)) for prompt in prompts]
        encoded = [one.ids for one in self.tokenizer.encode_batch(texts, add_special_tokens=False)]
        most = self.context_length - 2
        longest = most if self.padded else min(max(map(len, encoded)), most)
        tokens = np.zeros((len(prompts), longest + 2), np.int64)
        for row, codes in zip(tokens, encoded, strict=True):
            kept = codes[:most]
            row[: len(kept) + 2] = [self.start, *kept, self.end]
        return tokens
