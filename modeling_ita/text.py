"""Class names -> text embeddings: what a vocabulary is, and its encoding by the frozen text tower, kept for later.

A vocabulary is a list of classes, each with one or more names. Names are compared in one normal form (Unicode composed,
case folded, blanks collapsed), because CLIP's tokenizer lowers case and cleans blanks: names that differ in these have
one embedding. What is shown is what was given.

Each name is put into every prompt template; the normalized embeddings of its prompts are averaged and normalized again
(ViLD, arXiv 2104.13921; FC-CLIP, arXiv 2308.02487). The embedding of the name alone, without a template, is what
dominant category unearthing compares with the image.
"""

import functools
import os
import re
import threading
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

from .text_cache import TextCache, cache_folder, digest_of

if TYPE_CHECKING:
    from .clip_backbone import ClipBackbone  # which imports the configuration, which checks vocabularies

logger = logging.get_logger(__name__)

OTHER = "other"
"""The name that joins every vocabulary when dominant categories are selected."""

SURROGATES = re.compile("[\ud800-\udfff]")
"""Halves of a character, which no name can hold."""

Templates = tuple[str, ...]

VocabularyLike = Iterable[str | Iterable[str]]
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
    def class_of_normal_form(self) -> dict[str, int]:
        """For each name in normal form, the index of the first class that has it."""
        class_of: dict[str, int] = {}
        for name, index in zip(self.names, self.class_of_name, strict=True):
            class_of.setdefault(normal_form(name), index)
        return class_of

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


def normalize_vocabulary(classes: VocabularyLike) -> Vocabulary:
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
    classes: VocabularyLike | None, own: Vocabulary | None, train_vocabulary: VocabularyLike | None = None
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
        if not isinstance(template, str) or [template.count(part) for part in ("{}", "{", "}")] != [1, 1, 1]:
            raise ValueError(f"a prompt template has exactly one '{{}}' for the name, got {template!r:.100}")
    return tuple(templates)


# --- encoding ---


@dataclass
class TextEmbeddings:
    """A vocabulary as the network takes it: tensors alone, so that it can be an input of a compiled graph.

    K classes, N names (a class has one or more), M candidate names, D CLIP's embedding width.

    Attributes:
        prompt_embeds: (N, D), a unit row per name, the mean over the prompt templates.
        class_of_name: (N,) int64, the class of each name; increasing.
        name_embeds: (M, D), unit embeddings of the candidate names without a template; what dominant categories are
            selected from.
        is_seen: (K,) bool, classes that share a name with the training vocabulary.
        is_duplicate: (K,) bool, classes that stand in the vocabulary once more.
    """

    prompt_embeds: Tensor
    class_of_name: Tensor
    name_embeds: Tensor
    is_seen: Tensor
    is_duplicate: Tensor


def max_over_names(logits: Tensor, text: TextEmbeddings) -> Tensor:
    """Give each class the highest logit of its names: (..., N) -> (..., K)."""
    num_classes = text.is_seen.shape[0]
    # An exported graph is to serve vocabularies with synonyms, whether the one at hand has any or not.
    if torch.compiler.is_exporting() or len(text.class_of_name) > num_classes:
        classes = logits.new_full((*logits.shape[:-1], num_classes), float("-inf"))
        index = text.class_of_name.expand_as(logits)
        return classes.scatter_reduce(-1, index, logits, "amax", include_self=False)
    return logits


MAX_CACHED_NAMES = 65_536
MAX_CACHED_VOCABULARIES = 16
MIN_NAMES_ON_DISK = 64
"""From so many names on, encoding shows its progress, and the names are looked for on disk and kept there."""
NAMES_PER_BLOCK = 1_024
"""Names between one writing to disk and the next."""
NAMES_PER_BATCH = 32
"""Names that an accelerator encodes together."""

_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock  # noqa: PLW0603  (the thread that held it does not exist in a forked process)
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


@dataclass
class _Memory:
    """What was encoded with one state of the text tower.

    Attributes:
        tower: fingerprint of the text tower's weights.
        names: for each set of templates, name -> its prompt embedding and its name embedding, (D,) each.
        vocabularies: the last few vocabularies, oldest first.
    """

    tower: tuple = ()
    names: dict[Templates, dict[str, tuple[Tensor, Tensor]]] = field(default_factory=dict)
    vocabularies: dict[tuple, TextEmbeddings] = field(default_factory=dict)


class TextEncoder:
    """Encodes vocabularies with the frozen text tower and keeps what it encoded; large ones on disk, too.

    The embedding of a name does not depend on the other names, to the bit: its prompts make a batch of their
    own, or, on an accelerator, take part in batches of one shape. What is kept in memory is dropped when the text
    tower's weights change. Threads may share an encoder: one at a time encodes, and an entry is complete or absent.
    Copies and pickles start with nothing in memory.

    Args:
        clip: the frozen CLIP.

    Attributes:
        use_disk: False keeps every name off the disk, as a server that promises privacy has to.
    """

    def __init__(self, clip: "ClipBackbone"):
        self.clip = clip
        self.use_disk = True
        self._memory = _Memory()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is in memory: another thread may be adding to it, and it belongs to these very weights."""
        return self.__dict__ | {"_memory": _Memory()}

    @torch.compiler.assume_constant_result
    def encode(
        self,
        vocabulary: VocabularyKey,
        templates: Sequence[str],
        train_vocabulary: VocabularyLike | None = None,
    ) -> TextEmbeddings:
        """Encode a vocabulary, or take it from memory. In a graph being traced the embeddings become constants.

        Args:
            vocabulary: K classes, N names.
            templates: prompt templates, each with one `{}`.
            train_vocabulary: the classes seen in training; None if nothing was.

        Returns:
            Tensors on the device of the text tower, without gradients.

        Raises:
            ValueError: a template without exactly one `{}`, or a graph is exported before its vocabulary is encoded.
        """
        seen = normalize_vocabulary(train_vocabulary) if train_vocabulary else Vocabulary()
        key = (vocabulary, tuple(templates), seen.key)
        is_exporting = torch.compiler.is_exporting()  # the text tower has fake weights meanwhile
        memory = self._memory if is_exporting else self._current_memory()
        found = memory.vocabularies.get(key)
        if found is not None:
            return found
        if is_exporting:
            raise ValueError("call encode_vocabulary with the vocabulary of the graph before exporting it")
        classes = Vocabulary(vocabulary)
        # Outside of inference mode, so that it can take part in training later.
        with _lock, torch.inference_mode(False), torch.no_grad():
            candidates = classes.candidate_names
            names = list(dict.fromkeys([*classes.names, *candidates]))
            embeds = self._encode_names(memory, names, check_templates(templates))
            device = self.clip.device
            text = TextEmbeddings(
                prompt_embeds=torch.stack([embeds[name][0] for name in classes.names]),
                class_of_name=torch.tensor(classes.class_of_name, device=device),
                name_embeds=torch.stack([embeds[name][1] for name in candidates]),
                is_seen=torch.tensor(classes.shares_name_with(seen.names), device=device),
                is_duplicate=torch.tensor(classes.is_duplicate, device=device),
            )
            while len(memory.vocabularies) >= MAX_CACHED_VOCABULARIES:
                memory.vocabularies.pop(next(iter(memory.vocabularies)))
            memory.vocabularies[key] = text
        return text

    @torch.compiler.assume_constant_result
    def embed_names(self, names: Sequence[str], templates: Sequence[str], in_prompts: bool = False) -> Tensor:
        """Encode names, in the prompt templates or alone: unit rows (len(names), D)."""
        with _lock, torch.inference_mode(False), torch.no_grad():
            embeds = self._encode_names(
                self._current_memory(), list(dict.fromkeys(names)), check_templates(templates)
            )
            return torch.stack([embeds[name][0 if in_prompts else 1] for name in names])

    def _current_memory(self) -> _Memory:
        tower, memory = self.clip.text_fingerprint(), self._memory
        if memory.tower != tower:
            # Threads that are still encoding with the former weights go on filling the former memory.
            memory = self._memory = _Memory(tower)
        return memory

    def _encode_names(
        self, memory: _Memory, names: list[str], templates: Templates
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Give a table that has all the names (none twice), encoding those that it lacks."""
        table = memory.names.setdefault(templates, {})
        missing = [name for name in names if name not in table]
        if missing and sum(map(len, memory.names.values())) + len(missing) > MAX_CACHED_NAMES:
            memory.names.clear()
            table, missing = memory.names.setdefault(templates, {}), names
        on_disk = len(missing) >= MIN_NAMES_ON_DISK
        cache = self._open_cache(templates) if on_disk and self.use_disk else None
        for found, prompt_embeds, name_embeds in cache.read(missing) if cache else ():
            rows = prompt_embeds.to(self.clip.device), name_embeds.to(self.clip.device)
            table.update(zip(found, zip(*rows, strict=True), strict=True))
        missing = [name for name in missing if name not in table]
        with logging.tqdm(
            total=len(missing), desc="encoding names", unit="name", disable=not (on_disk and missing)
        ) as progress:
            for start in range(0, len(missing), NAMES_PER_BLOCK):
                block = missing[start : start + NAMES_PER_BLOCK]
                prompt_embeds, name_embeds = self._encode(block, templates, progress)
                table.update(zip(block, zip(prompt_embeds, name_embeds, strict=True), strict=True))
                if cache:
                    cache.write(block, prompt_embeds, name_embeds)
        return table

    def _open_cache(self, templates: Templates) -> TextCache | None:
        folder = cache_folder()
        if folder is None:
            return None
        sample = self.clip.tokenizer(["Ten Cats' 3 Sofas"])[0].tolist()  # shows case, length and truncation
        description = [*templates, self.clip.device.type, str(sample)]
        return TextCache(folder / digest_of(description, self.clip.text_tensors()), self.clip.embed_dim)

    def _encode(self, names: Sequence[str], templates: Templates, progress: Any) -> tuple[Tensor, Tensor]:
        """Encode names: prompt and name embeddings, (n, D) each, unit rows."""
        tokens = [self._tokenize(name, templates) for name in names]
        prompt_embeds: list[Any] = [None] * len(names)
        name_embeds: list[Any] = [None] * len(names)
        prefixes = self.clip.encode_prefixes(["{}", *templates])
        for batch, size in self._batches(tokens):
            filled = [*batch, *[batch[-1]] * (size - len(batch))]
            with torch.autocast(self.clip.device.type, enabled=False):
                encoded = self.clip.encode_tokens(torch.cat([tokens[index] for index in filled]), prefixes)
                encoded = F.normalize(encoded, dim=-1).unflatten(0, (size, -1))
                means = F.normalize(encoded[:, 1:].mean(dim=1), dim=-1)
            for row, index in enumerate(batch):
                prompt_embeds[index], name_embeds[index] = means[row], encoded[row, 0]
            progress.update(len(batch))
        prompts, alone = torch.stack(prompt_embeds), torch.stack(name_embeds)
        if not bool(torch.isfinite(prompts.sum() + alone.sum())):
            raise ValueError("text embeddings are NaN or infinite: the weights of the text tower are damaged")
        return prompts, alone

    def _tokenize(self, name: str, templates: Templates) -> Tensor:
        """Give the tokens of the name alone and of its prompts, (1 + T, L) int64."""
        tokens, num_cut = self.clip.tokenize([name, *(template.format(name) for template in templates)])
        if num_cut:
            shown = name if len(name) <= 200 else f"{name[:199]}…"
            logger.warning(
                f"the name {shown!r} is longer than the text tower's context of {self.clip.context_length} tokens "
                f"in {num_cut} of its {len(templates) + 1} prompts; what is beyond is cut off"
            )
        return tokens

    def _batches(self, tokens: list[Tensor]) -> Iterator[tuple[list[int], int]]:
        """Give indices of names whose prompts are of one length, and the number of names to fill up to."""
        size = 1 if self.clip.device.type == "cpu" else NAMES_PER_BATCH
        by_length: dict[int, list[int]] = {}
        for index, of_name in enumerate(tokens):
            by_length.setdefault(of_name.shape[1], []).append(index)
        for indices in by_length.values():
            for start in range(0, len(indices), size):
                yield indices[start : start + size], size
