"""Names -> embeddings: prompts, the frozen text tower, and what was encoded already, in memory and on disk."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

from .clip_backbone import ClipBackbone
from .text_store import TextStore, open_store
from .vocabulary import OTHER, TextClassifier, Vocabulary

logger = logging.get_logger(__name__)

MAX_CACHED_NAMES = 65_536
MAX_CACHED_VOCABULARIES = 16
NAMES_WORTH_KEEPING = 512
"""From so many names on, encoding shows its progress, and the names are looked for on disk and kept there."""
NAMES_IN_A_BLOCK = 1_024
"""Names between one writing to disk and the next."""
NAMES_IN_A_BATCH = 32
"""Names that an accelerator encodes together."""


class _Table:
    """Names encoded with one set of templates: templated and bare embeddings, (n, D) each."""

    def __init__(self) -> None:
        self.row_of: dict[str, int] = {}
        self.blocks: list[tuple[Tensor, Tensor]] = []

    def add(self, names: Sequence[str], templated: Tensor, bare: Tensor) -> None:
        self.row_of.update(zip(names, range(len(self.row_of), len(self.row_of) + len(names)), strict=True))
        self.blocks.append((templated, bare))

    def rows(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Templated and bare embeddings of names that are all in the table."""
        if len(self.blocks) > 1:
            self.blocks = [(torch.cat([t for t, _ in self.blocks]), torch.cat([b for _, b in self.blocks]))]
        templated, bare = self.blocks[0]
        index = torch.tensor([self.row_of[name] for name in names], device=bare.device)
        return templated[index], bare[index]


class VocabularyEncoder:
    """Encodes names with the frozen text tower and keeps what it encoded, large vocabularies on disk, too.

    The embedding of a name does not depend on the company it came in, to the bit: its prompts make a batch of their
    own, or, on an accelerator, take part in batches of one shape. What is kept in memory is dropped when the text
    tower's weights change.
    """

    def __init__(self, clip: ClipBackbone):
        self.clip = clip
        self._fingerprint: tuple = ()
        self._tables: dict[tuple[str, ...], _Table] = {}
        self._classifiers: dict[tuple, TextClassifier] = {}
        self.names_encoded = 0

    def classifier(self, vocabulary: Vocabulary, templates: Sequence[str]) -> TextClassifier:
        """The text classifier of a vocabulary. Raises ValueError for a template without `{}`."""
        templates = check_templates(templates)
        self._drop_if_stale()
        key = (vocabulary.key, templates)
        if key not in self._classifiers:
            if len(self._classifiers) >= MAX_CACHED_VOCABULARIES:
                self._classifiers.pop(next(iter(self._classifiers)))
            # Outside of inference mode, so that what is kept can take part in training later.
            with torch.inference_mode(False), torch.no_grad():
                candidate_names = list(dict.fromkeys([*vocabulary.names, OTHER]))
                table = self._table_with(candidate_names, templates)
                templated, _ = table.rows(vocabulary.names)
                _, candidates = table.rows(candidate_names)
                self._classifiers[key] = TextClassifier(
                    vocabulary=vocabulary,
                    templated=templated,
                    class_of_name=torch.tensor(vocabulary.class_of_name, device=templated.device),
                    candidate_names=candidate_names,
                    candidates=candidates,
                    templates=templates,
                )
        return self._classifiers[key]

    def bare(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Unit bare embeddings of names, (len(names), D)."""
        self._drop_if_stale()
        with torch.inference_mode(False), torch.no_grad():
            return self._table_with(list(dict.fromkeys(names)), check_templates(templates)).rows(names)[1]

    def _table_with(self, names: list[str], templates: tuple[str, ...]) -> _Table:
        """The table of these templates, with the names (none twice) in it."""
        table = self._tables.setdefault(templates, _Table())
        missing = [name for name in names if name not in table.row_of]
        if len(table.row_of) + len(missing) > MAX_CACHED_NAMES:
            table = self._tables[templates] = _Table()
            missing = names
        if len(missing) < NAMES_WORTH_KEEPING:
            if missing:
                table.add(missing, *self._encode(missing, templates))
            return table

        store = self._store(templates)
        for block in store.read(missing) if store else ():
            table.add(block[0], *(part.to(self.clip.device) for part in block[1:]))
        missing = [name for name in missing if name not in table.row_of]
        with logging.tqdm(
            total=len(missing), desc="encoding names", unit="name", disable=not missing
        ) as progress:
            for start in range(0, len(missing), NAMES_IN_A_BLOCK):
                block_names = missing[start : start + NAMES_IN_A_BLOCK]
                templated, bare = self._encode(block_names, templates, progress)
                table.add(block_names, templated, bare)
                if store:
                    store.write(block_names, templated, bare)
        return table

    def _store(self, templates: tuple[str, ...]) -> TextStore | None:
        device, tokenizer = self.clip.device, self.clip.tokenizer
        tokens = tokenizer(["Ten Cats' 3 Sofas"])[0].tolist()  # what case, length and truncation come to
        description = [*templates, device.type, str(tokens)]
        return open_store(description, self.clip.text_tensors)

    def _encode(
        self, names: Sequence[str], templates: tuple[str, ...], progress: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Templated and bare embeddings of names, (n, D) each, unit rows."""
        tokens = []
        for name in names:
            of_name, too_long = self.clip.tokenize([name, *(template.format(name) for template in templates)])
            if too_long:
                shown = name if len(name) <= 200 else f"{name[:199]}…"
                logger.warning(
                    f"the name {shown!r} is longer than the text tower's context of {self.clip.context_length} tokens "
                    f"in {too_long} of its {len(templates) + 1} prompts; what is beyond is cut off"
                )
            tokens.append(of_name)
        templated: dict[int, Tensor] = {}
        bare: dict[int, Tensor] = {}
        for batch, size in self._batches(tokens):
            filled = [*batch, *[batch[-1]] * (size - len(batch))]
            with torch.autocast(self.clip.device.type, enabled=False):
                encoded = self.clip.encode_tokens(torch.cat([tokens[index] for index in filled]))
                encoded = F.normalize(encoded, dim=-1).unflatten(0, (size, -1))
                means = F.normalize(encoded[:, 1:].mean(dim=1), dim=-1)
            templated.update(zip(batch, means, strict=False))
            bare.update(zip(batch, encoded[:, 0], strict=False))
            if progress is not None:
                progress.update(len(batch))
        self.names_encoded += len(names)
        order = range(len(names))
        return torch.stack([templated[i] for i in order]), torch.stack([bare[i] for i in order])

    def _batches(self, tokens: list[Tensor]) -> Iterator[tuple[list[int], int]]:
        """Indices of names whose prompts are of one length, and the number of names to fill up to."""
        size = 1 if self.clip.device.type == "cpu" else NAMES_IN_A_BATCH
        by_length: dict[int, list[int]] = {}
        for index, of_name in enumerate(tokens):
            by_length.setdefault(of_name.shape[1], []).append(index)
        for members in by_length.values():
            for start in range(0, len(members), size):
                yield members[start : start + size], size

    def _drop_if_stale(self) -> None:
        fingerprint = self.clip.text_fingerprint()
        if fingerprint != self._fingerprint:
            self._tables.clear()
            self._classifiers.clear()
            self._fingerprint = fingerprint


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """The templates as a tuple. Raises ValueError if there is none or one does not have exactly one `{}`."""
    templates = (templates,) if isinstance(templates, str) else tuple(templates)
    if not templates:
        raise ValueError("no prompt template: give at least one, such as 'a photo of a {}.'")
    for template in templates:
        if (
            not isinstance(template, str)
            or template.count("{}") != 1
            or template.count("{") != 1
            or template.count("}") != 1
        ):
            raise ValueError(f"a prompt template has exactly one '{{}}' for the name, got {template!r}")
    return templates
