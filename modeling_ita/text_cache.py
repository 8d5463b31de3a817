"""What keeps the text tower from doing work twice: embeddings on disk, and beginnings that prompts share.

A large vocabulary is encoded once on each machine. The embeddings of a name depend on the text tower's weights, on
the tokenizer and on the prompt templates: a folder is named by a digest of those, and holds files of names with their
embeddings. A file is written under another name and then renamed, so it is complete or absent; it carries a digest of
its content. One that fails it, or does not hold what it should, is deleted (or, where it cannot be, passed over), and
its names are encoded again. When all files together are larger than the limit, those that were used least recently are
deleted.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging

logger = logging.get_logger(__name__)

CACHE_FOLDER_VARIABLE = "ITA_TEXT_CACHE"
"""Environment variable: the folder of the cache, or "off"; without it, `ita_text` in the Hugging Face home."""

CACHE_LIMIT_VARIABLE = "ITA_TEXT_CACHE_MB"
"""Environment variable: the most megabytes that the cache may take; 1024 without it."""

FORMAT = "2"  # part of every digest: to be increased when the same names would get other embeddings


def cache_folder() -> Path | None:
    """Give the folder of the cache, or None where the environment says that there is to be none."""
    chosen = os.environ.get(CACHE_FOLDER_VARIABLE)
    if chosen is None:
        return Path(HF_HOME) / "ita_text"
    return None if chosen.strip().lower() in ("", "0", "off", "false", "no") else Path(chosen)


def cache_limit() -> int:
    """Give the most bytes that the cache may take."""
    try:
        return int(float(os.environ.get(CACHE_LIMIT_VARIABLE, "1024")) * 1e6)
    except (ValueError, OverflowError):
        logger.warning_once(f"{CACHE_LIMIT_VARIABLE} is not a number of megabytes: 1024 is used")
        return 1_024_000_000


def digest_of(description: Sequence[str], tensors: Sequence[Tensor]) -> str:
    """Give a digest, 32 hexadecimal digits, of strings and of the content of tensors (dtype, shape, bytes)."""

    def content(tensor: Tensor) -> bytes:
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        header = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
        return hashlib.sha256(header + hashlib.sha256(flat.numpy().data).digest()).digest()

    with ThreadPoolExecutor(max_workers=4) as pool:  # hashlib lets other threads work meanwhile
        parts = list(pool.map(content, tensors))
    return hashlib.sha256(json.dumps([FORMAT, *description]).encode() + b"".join(parts)).hexdigest()[:32]


class TextCache:
    """The names encoded with one text tower and one set of templates.

    Args:
        folder: of this tower and these templates; made when something is written.
        embed_dim: D.
    """

    def __init__(self, folder: Path, embed_dim: int):
        self.folder = folder
        self.embed_dim = embed_dim

    def read(self, names: Sequence[str]) -> list[tuple[list[str], Tensor, Tensor]]:
        """Read what is kept of the names: blocks of (n names, prompt and name embeddings, (n, D) each)."""
        wanted, blocks = set(names), []
        for path in sorted(self.folder.glob("*.safetensors")):
            if not wanted:
                break
            try:
                found, prompt_embeds, name_embeds = self._read_block(path, wanted)
            except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
                self._discard(path, error)
                continue
            if found:
                wanted -= set(found)
                blocks.append((found, prompt_embeds, name_embeds))
                with contextlib.suppress(OSError):
                    os.utime(path)  # the order in which files are deleted
        return blocks

    @staticmethod
    def _discard(path: Path, error: Exception) -> None:
        try:
            path.unlink(missing_ok=True)
            logger.warning(f"{path} is damaged and is deleted; its names are encoded again ({error})")
        except OSError:
            logger.warning_once(
                f"{path} is damaged and is passed over; its names are encoded again ({error})"
            )

    def _read_block(self, path: Path, wanted: set[str]) -> tuple[list[str], Tensor, Tensor]:
        with safe_open(path, framework="pt") as file:
            encoded = file.get_tensor("names")
            names = json.loads(encoded.numpy().tobytes().decode("utf-8"))
            rows = [row for row, name in enumerate(names) if name in wanted]
            if not rows:
                return [], torch.empty(0), torch.empty(0)
            prompt_embeds, name_embeds = file.get_tensor("prompt_embeds"), file.get_tensor("name_embeds")
            if (file.metadata() or {}).get("digest") != digest_of((), (encoded, prompt_embeds, name_embeds)):
                raise ValueError("its content does not fit its digest")
        for embeds in (prompt_embeds, name_embeds):
            if embeds.shape != (len(names), self.embed_dim) or not bool(embeds.isfinite().all()):
                raise ValueError(
                    f"{len(names)} names, but embeddings of shape {tuple(embeds.shape)}, or not finite"
                )
        return [names[row] for row in rows], prompt_embeds[rows], name_embeds[rows]

    def write(self, names: Sequence[str], prompt_embeds: Tensor, name_embeds: Tensor) -> None:
        """Keep n names with their embeddings (n, D); where the disk is full or read-only, only warn."""
        encoded = torch.frombuffer(bytearray(json.dumps(list(names)).encode()), dtype=torch.uint8)
        tensors = {
            "names": encoded,
            "prompt_embeds": prompt_embeds.cpu().contiguous(),
            "name_embeds": name_embeds.cpu().contiguous(),
        }
        digest = digest_of((), tuple(tensors.values()))
        temporary = self.folder / f".{digest}.{os.getpid()}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, metadata={"digest": digest})
            os.replace(temporary, self.folder / f"{digest}.safetensors")
            self._prune(cache_limit())
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            logger.warning_once(f"encoded names cannot be kept in {self.folder}: {error}")

    def _prune(self, limit: int) -> None:
        """Delete the least recently used files of all towers until the rest takes at most `limit` bytes."""
        files = []
        for path in self.folder.parent.glob("*/*.safetensors"):
            with contextlib.suppress(OSError):
                status = path.stat()
                files.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= limit:
                break
            with contextlib.suppress(OSError):
                path.unlink()
                total -= size


# --- what stands before the name in prompts, encoded once for all names ---
#
# Attention in the text tower is causal, so the tokens before the name do not depend on it: their keys and values are
# kept, and only the tokens from the name on go through the tower, without any that fill up shorter prompts.


@dataclass
class Prefixes:
    """The beginnings of T prompts, encoded.

    Attributes:
        tokens: of each prompt, the start token first.
        keys_and_values: of each layer, (T, heads, P, c) both, P the longest beginning.
    """

    tokens: list[list[int]]
    keys_and_values: list[tuple[Tensor, Tensor]]


def has_usual_blocks(tower: Any) -> bool:
    """Say whether a text tower's blocks are open_clip's usual ones, whose steps are taken one by one here."""
    from open_clip.transformer import ResidualAttentionBlock

    return all(
        type(block) is ResidualAttentionBlock and isinstance(block.attn, nn.MultiheadAttention)
        for block in tower.transformer.resblocks
    )


def encode_prefixes(tower: Any, tokens: list[list[int]]) -> Prefixes:
    """Encode the beginnings of prompts, each with at least the start token."""
    lengths = torch.tensor([len(own) for own in tokens])
    positions = torch.arange(int(lengths.max()))
    is_token = positions < lengths[:, None]
    causal = torch.ones(len(positions), len(positions), dtype=torch.bool).tril()
    x = tower.token_embedding(torch.tensor([token for own in tokens for token in own]))
    x = x + tower.positional_embedding[positions.expand_as(is_token)[is_token]]
    return Prefixes(tokens, _run_blocks(tower, x, is_token, causal, None)[1])


def encode_rest(tower: Any, tokens: Tensor, prefixes: Prefixes) -> Tensor | None:
    """Encode prompts (T, L) by what comes after their T beginnings: the last block's output at the end token.

    The end token is the largest, and what follows it is not read. None if a prompt does not begin as it should.
    """
    if any(row[: len(own)].tolist() != own for row, own in zip(tokens, prefixes.tokens, strict=True)):
        return None
    starts = torch.tensor([len(own) for own in prefixes.tokens])
    lengths = tokens.argmax(dim=-1) + 1 - starts
    steps = torch.arange(int(lengths.max()))
    is_token, positions = steps < lengths[:, None], starts[:, None] + steps
    x = tower.token_embedding(tokens.gather(1, positions.clamp(max=tokens.shape[1] - 1))[is_token])
    x = x + tower.positional_embedding[positions[is_token]]
    is_before = torch.arange(int(starts.max())) < starts[:, None]
    causal = torch.ones(len(steps), len(steps), dtype=torch.bool).tril().expand(len(tokens), -1, -1)
    allowed = torch.cat([is_before[:, None].expand(-1, len(steps), -1), causal], dim=-1)[:, None]
    x, _ = _run_blocks(tower, x, is_token, allowed, prefixes.keys_and_values)
    return x[lengths.cumsum(0) - 1]


def _run_blocks(
    tower: Any, x: Tensor, is_token: Tensor, allowed: Tensor, earlier: list[tuple[Tensor, Tensor]] | None
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Run the blocks on the tokens (M, width) of all prompts; they are in rows of one length for attention only.

    `is_token` (T, L) says where they lie in rows, `allowed` (T, heads, L, P + L) where each may look. Also gives the
    keys and values of each layer, (T, heads, L, c), as `earlier` has those of the P tokens before.
    """
    kept = []
    for index, block in enumerate(tower.transformer.resblocks):
        attention = block.attn
        projected = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
        rows = projected.new_zeros(*is_token.shape, projected.shape[-1])
        rows[is_token] = projected
        query, key, value = rows.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        kept.append((key, value))
        if earlier is not None:
            key, value = torch.cat([earlier[index][0], key], 2), torch.cat([earlier[index][1], value], 2)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        x = x + block.ls_1(attention.out_proj(attended.transpose(1, 2).flatten(2)[is_token]))
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
    return x, kept
