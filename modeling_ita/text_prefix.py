"""Prompts that begin alike share the text tower's work: what stands before the name is encoded once for all names.

Attention in the text tower is causal, so the tokens before the name do not depend on it: their keys and values are
kept, and only the tokens from the name on go through the tower, without any that fill up shorter prompts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
    """Encode prompts by what comes after their beginnings.

    Args:
        tower: has the weights.
        tokens: (T, L) int64, a row for each beginning; the end token is the largest, and what follows it is not read.
        prefixes: the encoded beginnings.

    Returns:
        (T, width), the last block's output at the end token; None if a row does not begin as it should.
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
    """Run the blocks on tokens one after the other; they are in rows of one length for attention only.

    Args:
        tower: has the blocks.
        x: (M, width), the tokens of all prompts.
        is_token: (T, L) bool with M that are True, where they lie in rows.
        allowed: bool, broadcast to (T, heads, L, P + L), where each may look.
        earlier: keys and values of the tokens before, (T, heads, P, c), of each layer.

    Returns:
        (M, width), and keys and values of each layer, (T, heads, L, c).
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
