"""Class names as the page's tags give them -> a vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ita_segmentation.errors import ITAError, one_line
from modeling_ita.text import normal_form, parse_classes


@dataclass(frozen=True)
class NameLimits:
    """What the class names of one request may come to."""

    names: int = 1_000
    characters: int = 200
    total_characters: int = 20_000


def read_class_list(tags: Any, limits: NameLimits) -> tuple[list[list[str]] | None, list[str]]:
    """Read a vocabulary.

    Args:
        tags: strings such as "cat" or "sofa|couch"; or one string, as `parse_classes` takes it; None or nothing for
            the model's own vocabulary.
        limits: what is refused.

    Returns:
        the classes, each a list of names, repeated classes left out (None: the model's own); and sentences for the
        user on what was left out.

    Raises:
        ITAError: an empty or overlong name, more than the limits allow, or something other than text.
    """
    texts = [tags] if isinstance(tags, str) else tags
    if texts is None or (isinstance(texts, Sequence) and not any(texts)):
        return None, []
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ITAError("Class names must be a list of texts, such as cat, sofa|couch.")
    if sum(map(len, texts)) > limits.total_characters:
        raise ITAError(
            f"The class names have {sum(map(len, texts)):,} characters; this page takes up to "
            f"{limits.total_characters:,}."
        )
    classes: list[list[str]] = []
    for place, text in enumerate(texts, start=1):
        try:
            classes += parse_classes(text)
        except ValueError as error:
            raise ITAError(f"Class {place} cannot be used: {one_line(error, 160)}.") from error
    names = [name for synonyms in classes for name in synonyms]
    if len(names) > limits.names:
        raise ITAError(f"These are {len(names):,} class names; this page takes up to {limits.names:,}.")
    too_long = next((name for name in names if len(name) > limits.characters), None)
    if too_long is not None:
        raise ITAError(
            f"A class name is longer than {limits.characters} characters: “{one_line(too_long, 40)}”."
        )
    different = {frozenset(map(normal_form, synonyms)): synonyms for synonyms in reversed(classes)}
    left_out = len(classes) - len(different)
    remark = f"{left_out} repeated class{'es were' if left_out > 1 else ' was'} left out."
    return list(reversed(different.values())), [remark] if left_out else []
