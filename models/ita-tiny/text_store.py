"""Encoded names on disk, so that a large vocabulary is encoded once in a machine's life.

The embeddings of a name depend on the text tower's weights, on the tokenizer and on the prompt templates: a folder is
named by a digest of those, and holds files of names with their embeddings. A file is written under another name and
then renamed, so it is complete or absent; it carries a digest of its content, and one that fails it is deleted and its
names are encoded again.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

FOLDER_VARIABLE = "ITA_TEXT_CACHE"
"""Environment variable: the folder of the store, or "off"; without it, `ita_text` in the Hugging Face home."""

FORMAT = "1"  # goes into every digest: to be counted up when the same names would be encoded to other numbers


def store_folder() -> Path | None:
    """Where encoded names are kept, or None where they are not to be."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen is None:
        return Path(HF_HOME) / "ita_text"
    return None if chosen.strip().lower() in ("", "0", "off", "false", "no") else Path(chosen)


def digest_of(description: Sequence[str], tensors: Sequence[Tensor]) -> str:
    """A digest, 32 hexadecimal digits, of some words and of the content of tensors (dtype, shape, bytes)."""

    def content(tensor: Tensor) -> bytes:
        header = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
        return hashlib.sha256(header + _digest_bytes(tensor)).digest()

    with ThreadPoolExecutor(max_workers=4) as pool:  # hashlib lets other threads work meanwhile
        parts = list(pool.map(content, tensors))
    return hashlib.sha256(json.dumps([FORMAT, *description]).encode() + b"".join(parts)).hexdigest()[:32]


def _digest_bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).digest()


class TextStore:
    """The names encoded with one text tower and one set of templates.

    Args:
        folder: of this tower and these templates; made when something is written.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, names: Sequence[str]) -> list[tuple[list[str], Tensor, Tensor]]:
        """What is kept of the names.

        Returns:
            Blocks of (n names among those asked for, templated (n, D), bare (n, D)), no name twice.
        """
        wanted, blocks = set(names), []
        for path in sorted(self.folder.glob("*.safetensors")):
            if not wanted:
                break
            try:
                block = self._read_block(path, wanted)
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                logger.warning(f"{path} is damaged and is deleted; its names are encoded again ({error})")
                path.unlink(missing_ok=True)
                continue
            if block[0]:
                wanted.difference_update(block[0])
                blocks.append(block)
        return blocks

    @staticmethod
    def _read_block(path: Path, wanted: set[str]) -> tuple[list[str], Tensor, Tensor]:
        with safe_open(path, framework="pt") as file:
            encoded = file.get_tensor("names")
            names = json.loads(encoded.numpy().tobytes().decode("utf-8"))
            rows = [row for row, name in enumerate(names) if name in wanted]
            if not rows:
                return [], torch.empty(0), torch.empty(0)
            templated, bare = file.get_tensor("templated"), file.get_tensor("bare")
            if (file.metadata() or {}).get("digest") != digest_of((), (encoded, templated, bare)):
                raise ValueError("its content does not fit its digest")
        if len(rows) == len(names):
            return names, templated, bare
        return [names[row] for row in rows], templated[rows], bare[rows]

    def write(self, names: Sequence[str], templated: Tensor, bare: Tensor) -> None:
        """Keeps n names with their embeddings (n, D); a disk that is full or read-only costs a warning, no more."""
        encoded = torch.frombuffer(bytearray(json.dumps(list(names)).encode()), dtype=torch.uint8)
        tensors = {
            "names": encoded,
            "templated": templated.cpu().contiguous(),
            "bare": bare.cpu().contiguous(),
        }
        digest = digest_of((), tuple(tensors.values()))
        path = self.folder / f"{digest}.safetensors"
        unfinished = self.folder / f".unfinished-{os.getpid()}-{digest}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, unfinished, metadata={"digest": digest})
            os.replace(unfinished, path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            logger.warning_once(f"encoded names cannot be kept in {self.folder}: {error}")


def open_store(description: Sequence[str], tensors: Callable[[], Sequence[Tensor]]) -> TextStore | None:
    """The store of a text tower, or None where the environment says that there is to be none.

    Args:
        description: words on which embeddings depend: templates, tokenizer, device.
        tensors: gives the text tower's weights.
    """
    folder = store_folder()
    return None if folder is None else TextStore(folder / digest_of(description, tensors()))
