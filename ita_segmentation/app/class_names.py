"""Words as the page's chips give them -> a vocabulary. A chip is a class; bars stand between its synonyms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ita_segmentation.errors import ITAError, one_line
from modeling_ita.vocabulary import normalize_vocabulary

MAX_NAME_CHARACTERS = 200


def vocabulary_of_chips(chips: Any, max_classes: int) -> tuple[list[list[str]] | None, list[str]]:
    """A vocabulary and remarks on it for the person.

    Args:
        chips: strings such as "cat" or "sofa|couch"; or one string with commas between them; None or nothing for
            the model's own vocabulary.
        max_classes: most classes allowed.

    Returns:
        the classes, each a list of names, repeated classes left out (None: the model's own); and what was left out,
        in sentences.

    Raises:
        ITAError: for an empty or overlong word, for too many classes, and for anything that is not text.
    """
    if isinstance(chips, str):
        chips = chips.split(",") if chips.strip() else []
    if chips is None or (isinstance(chips, Sequence) and not chips):
        return None, []
    if not isinstance(chips, list | tuple) or not all(isinstance(chip, str) for chip in chips):
        raise ITAError("Class words must be a list of texts, such as cat, sofa|couch.")
    if len(chips) > max_classes:
        raise ITAError(f"These are {len(chips):,} class words; this page takes up to {max_classes:,}.")
    classes: dict[frozenset[str], list[str]] = {}
    for place, chip in enumerate(chips, start=1):
        names = _names(chip, place)
        classes.setdefault(frozenset(name.casefold() for name in names), names)
    left_out = len(chips) - len(classes)
    remark = f"{left_out} repeated class{'es were' if left_out > 1 else ' was'} left out."
    return list(classes.values()), [remark] if left_out else []


def _names(chip: str, place: int) -> list[str]:
    names = [" ".join(name.split()) for name in chip.split("|")]
    if not all(names):
        raise ITAError(
            f"Class word {place} is empty or has an empty synonym: “{one_line(chip, 60).strip()}”."
        )
    if max(map(len, names)) > MAX_NAME_CHARACTERS:
        raise ITAError(
            f"Class word {place} is longer than {MAX_NAME_CHARACTERS} characters: “{one_line(chip, 40)}”."
        )
    try:
        return normalize_vocabulary([names])[0]
    except ValueError as error:
        raise ITAError(f"Class word {place} cannot be used: {one_line(error, 160)}.") from error
