"""Class names -> text embeddings, by the frozen text tower, and what was encoded already, in memory and on disk.

Each name is put into every prompt template; the normalized embeddings of its prompts are averaged and normalized again
(ViLD, arXiv 2104.13921; FC-CLIP, arXiv 2308.02487). The embedding of the name alone, without a template, is what
dominant category unearthing compares with the image.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

from .classification import TextEmbeddings
from .clip_backbone import ClipBackbone
from .text_cache import TextCache, open_cache
from .vocabulary import (
    Classes,
    Templates,
    Vocabulary,
    VocabularyKey,
    check_templates,
    normalize_vocabulary,
)

logger = logging.get_logger(__name__)

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

    The embedding of a name does not depend on the company it came in, to the bit: its prompts make a batch of their
    own, or, on an accelerator, take part in batches of one shape. What is kept in memory is dropped when the text
    tower's weights change. Threads may share an encoder: one at a time encodes, and an entry is complete or absent.
    Copies and pickles start with nothing in memory.

    Args:
        clip: the frozen CLIP.

    Attributes:
        use_disk: False keeps every name off the disk, as a server that promises privacy has to.
    """

    def __init__(self, clip: ClipBackbone):
        self.clip = clip
        self.use_disk = True
        self._memory = _Memory()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is in memory: another thread may be adding to it, and it belongs to these very weights."""
        return self.__dict__ | {"_memory": _Memory()}

    @torch.compiler.assume_constant_result
    def encode(
        self, vocabulary: VocabularyKey, templates: Sequence[str], train_vocabulary: Classes | None = None
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
        with (
            _lock,
            torch.inference_mode(False),
            torch.no_grad(),
        ):  # so that it can take part in training later
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
            # Threads that are still encoding with the former weights go on filling what nobody reads any more.
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
        sample = self.clip.tokenizer(["Ten Cats' 3 Sofas"])[0].tolist()  # shows case, length and truncation
        description = [*templates, self.clip.device.type, str(sample)]
        return open_cache(description, self.clip.text_tensors, self.clip.embed_dim)

    def _encode(self, names: Sequence[str], templates: Templates, progress: Any) -> tuple[Tensor, Tensor]:
        """Encode names: prompt and name embeddings, (n, D) each, unit rows.

        Raises:
            ValueError: the text tower gives values that are not finite.
        """
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
