"""What a vocabulary is, and the text classifier that becomes of it.

A *class* is one or more *names* (synonyms). Each name is put into every prompt template; the normalised embeddings of
its prompts are averaged and normalised again (ViLD, arXiv 2104.13921; FC-CLIP, arXiv 2308.02487). The *bare*
embedding of the name alone is what dominant category unearthing compares with the image.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

logger = logging.get_logger(__name__)

OTHER = "other"
"""The word that joins every vocabulary when dominant categories are looked for."""


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
    def repeats(self) -> list[bool]:
        """For each class, whether one before it has the very same names (the text tower knows no case)."""
        names = [frozenset(" ".join(name.casefold().split()) for name in synonyms) for synonyms in self]
        first = {synonyms: index for index, synonyms in reversed(list(enumerate(names)))}
        return [first[synonyms] != index for index, synonyms in enumerate(names)]

    @property
    def key(self) -> tuple[tuple[str, ...], ...]:
        """A hashable form."""
        return tuple(tuple(synonyms) for synonyms in self)


def normal_form(name: str) -> str:
    """Bring a name to the form in which names are compared: Unicode composed, case folded, blanks collapsed."""
    return " ".join(unicodedata.normalize("NFC", name).casefold().split())


def normalize_vocabulary(classes: Iterable[str | Iterable[str]]) -> Vocabulary:
    """Checks a vocabulary and brings it to one form.

    Args:
        classes: K classes. A class is a name, several names in one string separated by commas (as published category
            lists write synonyms), or a list of names.

    Raises:
        ValueError: nothing in it, an empty name, or something that is no name.
    """
    if isinstance(classes, Vocabulary):
        return classes
    if isinstance(classes, str) or not isinstance(classes, Iterable):
        raise ValueError(f"a vocabulary is a list of classes, got {type(classes).__name__}: {classes!r}")
    vocabulary = Vocabulary()
    for index, entry in enumerate(classes):
        names = [entry] if isinstance(entry, str) else entry
        if not isinstance(names, Iterable) or isinstance(names, dict):
            raise ValueError(
                f"class {index} of the vocabulary is neither a name nor a list of names: {entry!r}"
            )
        synonyms: list[str] = []
        for name in names:
            if not isinstance(name, str):
                raise ValueError(f"class {index} of the vocabulary holds something that is no name: {name!r}")
            parts = [part.strip() for part in name.split(",")]
            if not all(parts):
                raise ValueError(f"class {index} of the vocabulary has an empty name: {entry!r}")
            synonyms.extend(part for part in parts if part not in synonyms)
        if not synonyms:
            raise ValueError(f"class {index} of the vocabulary has no name: {entry!r}")
        vocabulary.append(synonyms)
    if not vocabulary:
        raise ValueError("the vocabulary is empty: give at least one class")
    return vocabulary


def parse_classes(text: str) -> Vocabulary:
    """Reads `"cat, sofa|couch, wall"`: commas between classes, bars between synonyms.

    Raises:
        ValueError: no class in the text, or an empty name.
    """
    if not text.strip():
        raise ValueError("the vocabulary is empty: give at least one class, such as 'cat, sofa|couch'")
    return normalize_vocabulary([part.split("|") for part in text.split(",")])


def vocabularies_of_batch(
    vocabulary: Sequence[str | Sequence] | None, default: Vocabulary | None, batch_size: int
) -> list[Vocabulary]:
    """One vocabulary for each image of a batch.

    `vocabulary` is one list of classes for all images, or one such list per image. A list of B >= 2 lists of names
    for B images is read as one vocabulary per image; wrap classes with `normalize_vocabulary` to say otherwise.

    Raises:
        ValueError: no vocabulary at all, one that is malformed, or not as many as there are images.
    """
    if vocabulary is None:
        if default is None:
            raise ValueError("no vocabulary: pass vocabulary=[...] or call set_vocabulary on the model first")
        return [default] * batch_size
    if isinstance(vocabulary, Vocabulary | str):
        return [normalize_vocabulary(vocabulary)] * batch_size
    entries = list(vocabulary)
    nested = bool(entries) and all(isinstance(entry, list | tuple) for entry in entries)
    per_image = nested and (
        any(
            isinstance(entry, Vocabulary) or any(not isinstance(name, str) for name in entry)
            for entry in entries
        )
        or len(entries) == batch_size > 1
    )
    if not per_image:
        return [normalize_vocabulary(entries)] * batch_size
    if len(entries) != batch_size:
        raise ValueError(f"{len(entries)} vocabularies for {batch_size} images")
    if not any(
        isinstance(entry, Vocabulary) or any(not isinstance(name, str) for name in entry) for entry in entries
    ):
        logger.warning_once(
            f"{batch_size} lists of names for {batch_size} images are read as one vocabulary per image; for classes "
            "with synonyms pass normalize_vocabulary(vocabulary)"
        )
    return [normalize_vocabulary(entry) for entry in entries]


@dataclass
class WordTensors:
    """A vocabulary as the network takes it: tensors alone, so that it can be an input of a compiled or exported graph.

    Attributes:
        templated: (N, D), a unit row per name, the mean over the prompt templates.
        class_of_name: (N,) int64, the class of each name; increasing.
        candidates: (M, D), unit bare embeddings of what dominant categories are chosen from.
        seen: (K,) bool, classes that share a name with the training's.
        repeats: (K,) bool, classes that stand in the vocabulary once more.
    """

    templated: Tensor
    class_of_name: Tensor
    candidates: Tensor
    seen: Tensor
    repeats: Tensor

    def logits(self, embeddings: Tensor, void: Tensor, scale: Tensor) -> Tensor:
        """As `TextClassifier.logits`."""
        return class_logits(
            embeddings, self.templated, self.class_of_name, self.repeats.shape[0], void, scale
        )


@dataclass
class TextClassifier:
    """A vocabulary as CLIP sees it.

    Attributes:
        vocabulary: its K classes, N names.
        templated: (N, D), a unit row per name, the mean over the prompt templates.
        class_of_name: (N,) int64, the class of each name.
        candidate_names: the unique names plus `other`, M of them: what dominant categories are chosen from.
        candidates: (M, D), their unit bare embeddings.
        templates: the prompt templates.
    """

    vocabulary: Vocabulary
    templated: Tensor
    class_of_name: Tensor
    candidate_names: list[str]
    candidates: Tensor
    templates: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.vocabulary)

    @cached_property
    def repeats(self) -> Tensor:
        """(K,) bool, `Vocabulary.repeats`."""
        return torch.tensor(self.vocabulary.repeats, device=self.class_of_name.device)

    def nearest_classes(self, embeddings: Tensor, names: int) -> list[list[int]]:
        """For each embedding (B, D) of an image, in order the classes that have one of the `names` nearest names."""
        classes_of: dict[str, list[int]] = {name: [] for name in self.candidate_names}
        for name, index in zip(self.vocabulary.names, self.class_of_name.tolist(), strict=True):
            classes_of[name].append(index)
        similarity = F.normalize(embeddings.float(), dim=-1) @ self.candidates.float().T
        # One more than asked for: `other` stands among the candidates without being a class.
        nearest = similarity.topk(min(names + 1, len(self.candidate_names)), dim=-1).indices
        found = [[classes_of[self.candidate_names[index]] for index in row] for row in nearest.tolist()]
        chosen = [[classes for classes in row if classes][:names] for row in found]
        return [sorted({index for classes in row for index in classes}) for row in chosen]

    def shortlist(self, classes: Sequence[int]) -> "TextClassifier":
        """The classifier of these classes alone, given as increasing indices."""
        place = torch.full((self.num_classes,), -1)
        place[list(classes)] = torch.arange(len(classes))
        place = place.to(self.class_of_name.device)[self.class_of_name]
        names = (place >= 0).nonzero().flatten()
        return TextClassifier(
            vocabulary=Vocabulary(self.vocabulary[index] for index in classes),
            templated=self.templated[names],
            class_of_name=place[names],
            candidate_names=self.candidate_names,
            candidates=self.candidates,
            templates=self.templates,
        )

    def logits(self, embeddings: Tensor, void: Tensor, scale: Tensor) -> Tensor:
        """Class logits of embeddings: scaled cosine, the maximum over a class's names; void last.

        Args:
            embeddings: (B, Q, D), any length.
            void: (1, D), the void embedding, any length.
            scale: the logit scale, a scalar.

        Returns: (B, Q, K + 1).
        """
        return class_logits(embeddings, self.templated, self.class_of_name, self.num_classes, void, scale)

    def tensors(self, train_vocabulary: Vocabulary | None) -> WordTensors:
        """What the network needs of this vocabulary. train_vocabulary: the classes that were seen in training."""
        seen = torch.tensor(
            shares_a_name(self.vocabulary, train_vocabulary), device=self.class_of_name.device
        )
        return WordTensors(self.templated, self.class_of_name, self.candidates, seen, self.repeats)


def class_logits(
    embeddings: Tensor,
    templated: Tensor,
    class_of_name: Tensor,
    num_classes: int,
    void: Tensor,
    scale: Tensor,
) -> Tensor:
    """`TextClassifier.logits` of a vocabulary given as tensors: (B, Q, D) -> (B, Q, K + 1)."""
    scaled = scale * F.normalize(embeddings, dim=-1)
    void_logit = scaled @ F.normalize(void.to(embeddings.dtype), dim=-1).T
    classes = names = scaled @ templated.to(embeddings.dtype).T
    # An exported graph is to serve vocabularies with synonyms, whether the one at hand has any or not.
    if torch.compiler.is_exporting() or len(class_of_name) > num_classes:
        index = class_of_name.expand_as(names)
        classes = names.new_full((*names.shape[:-1], num_classes), float("-inf"))
        classes = classes.scatter_reduce(-1, index, names, "amax", include_self=False)
    return torch.cat([classes, void_logit], dim=-1)


def shares_a_name(vocabulary: Vocabulary, train_vocabulary: Vocabulary | None) -> list[bool]:
    """For each class, whether any of its names is a name seen in training (compared exactly)."""
    seen = set(train_vocabulary.names) if train_vocabulary else set()
    return [any(name in seen for name in synonyms) for synonyms in vocabulary]
