"""ITA, image-text aggregation: the progressive feature decoder (ITA, section 3.4).

Text queries and learned queries read the enhanced features level by level, coarse to fine and round again. Each layer
looks only where the prediction before it saw the query's object (masked attention, Mask2Former, arXiv 2112.01527).
There is no self-attention between queries in ITA; FC-CLIP has it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .ops import MLP, mask_mean, sine_position_embedding, valid_cells, with_weights


class Attention(nn.Module):
    """Multi-head attention with an optional mask.

    Args:
        channels: C.
        heads: attention heads.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize weights by Xavier's rule, biases by zero."""
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None, eager: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: (B, Q, C).
            key: (B, S, C).
            value: (B, S, C).
            allowed: (B, Q, S) bool, where each query may look; None for everywhere.
            eager: compute the attention weights, in the place of `scaled_dot_product_attention`.

        Returns:
            (B, Q, C), and with `eager` the attention weights (B, heads, Q, S).
        """
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        mask = None if allowed is None else allowed[:, None]
        weights = None
        if eager:
            logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            logits = logits if mask is None else logits.masked_fill(~mask, float("-inf"))
            weights = logits.softmax(dim=-1)
            attended = weights @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), weights


class DecoderLayer(GradientCheckpointingLayer):
    """Masked cross-attention, optionally self-attention, feed-forward; residual and norm after each (post-norm).

    Args:
        channels: C.
        heads: attention heads.
        ffn_dim: width of the feed-forward network.
        self_attention: whether queries attend to each other (FC-CLIP).
    """

    def __init__(self, channels: int, heads: int, ffn_dim: int, self_attention: bool):
        super().__init__()
        self.cross_attention = Attention(channels, heads)
        self.cross_attention_norm = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, heads) if self_attention else None
        self.self_attention_norm = nn.LayerNorm(channels) if self_attention else None
        self.linear1 = nn.Linear(channels, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, channels)
        self.ffn_norm = nn.LayerNorm(channels)

    def forward(
        self,
        x: Tensor,
        query_positions: Tensor,
        key: Tensor,
        value: Tensor,
        allowed: Tensor,
        eager: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Update the queries.

        Args:
            x: (B, Q, C), queries.
            query_positions: (Q, C), added to the queries inside attention.
            key: (B, S, C).
            value: (B, S, C).
            allowed: (B, Q, S) bool, where each query may look.
            eager: also give attention weights.

        Returns:
            (B, Q, C), and with `eager` the weights of cross-attention (B, heads, Q, S) and, where there is any, of
            self-attention (B, heads, Q, Q); otherwise no weights.
        """
        attended, *weights = self.cross_attention(x + query_positions, key, value, allowed, eager)
        x = self.cross_attention_norm(x + attended)
        if self.self_attention is not None and self.self_attention_norm is not None:
            placed = x + query_positions
            attended, own_weights = self.self_attention(placed, placed, x, eager=eager)
            x = self.self_attention_norm(x + attended)
            weights.append(own_weights)
        x = self.ffn_norm(x + self.linear2(F.relu(self.linear1(x), inplace=True)))
        return x, tuple(weights) if eager else ()


@dataclass
class QueryPrediction:
    """What the queries say at one depth of the decoder.

    Attributes:
        class_embeds: (B, Q, D), not normalized.
        mask_logits: (B, Q, H / 4, W / 4), the products of mask embeddings and mask features.
        mask_embeds: (B, Q, C_mask).
    """

    class_embeds: Tensor
    mask_logits: Tensor
    mask_embeds: Tensor


class ImageTextAggregation(nn.Module):
    """The decoder.

    Args:
        hidden_dim: C.
        mask_dim: channels of the mask features.
        embed_dim: D, CLIP's embedding width.
        num_text_queries: k.
        num_learned_queries: L.
        layers: 9 in the paper.
        heads: attention heads, 8 in the paper.
        ffn_dim: width of the feed-forward networks, 2048 in the paper.
        self_attention: between queries, in each layer (FC-CLIP).
    """

    num_levels = 3

    def __init__(
        self,
        hidden_dim: int,
        mask_dim: int,
        embed_dim: int,
        num_text_queries: int,
        num_learned_queries: int,
        layers: int,
        heads: int,
        ffn_dim: int,
        self_attention: bool,
    ):
        super().__init__()
        self.num_text_queries = num_text_queries
        self.learned_queries = nn.Parameter(torch.empty(num_learned_queries, hidden_dim))
        self.query_positions = nn.Parameter(torch.empty(num_text_queries + num_learned_queries, hidden_dim))
        self.level_embedding = nn.Parameter(torch.empty(self.num_levels, hidden_dim))
        self.layers = nn.ModuleList(
            DecoderLayer(hidden_dim, heads, ffn_dim, self_attention) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(hidden_dim)
        self.mask_embedding = MLP(hidden_dim, hidden_dim, mask_dim, 3)
        self.pooled_projection = nn.Sequential(nn.LayerNorm(mask_dim), nn.Linear(mask_dim, hidden_dim))
        self.class_embedding = MLP(hidden_dim, hidden_dim, embed_dim, 3)
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize queries by a normal distribution, the logit scale by log(1 / 0.07)."""
        for parameter in (self.learned_queries, self.query_positions, self.level_embedding):
            nn.init.normal_(parameter)
        nn.init.constant_(self.logit_scale, 2.6592600369327779)  # log(1 / 0.07)
        for name, parameter in self.layers.named_parameters():
            if "linear" in name and parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    @property
    @with_weights
    def scale(self) -> Tensor:
        """The decoder's own logit scale: min(exp(logit_scale), 100), a scalar."""
        return self.logit_scale.exp().clamp(max=100)

    def forward(
        self,
        text_queries: Tensor | None,
        mask_features: Tensor,
        levels: list[Tensor],
        valid: Tensor | None = None,
        every_layer: bool = False,
        eager: bool = False,
        regions: Tensor | None = None,
    ) -> tuple[list[QueryPrediction], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Decode.

        Args:
            text_queries: (B, k', C) with k' <= k; None for no text queries.
            mask_features: (B, C_mask, H / 4, W / 4).
            levels: F1, F2, F3, (B, C, H_l, W_l) at strides 32, 16, 8.
            valid: (B, H, W) bool, pixels that are not padding; None where all are.
            every_layer: predict before the first layer and after each (for training), not only after the last.
            eager: compute attention weights.
            regions: (B, k', h w) bool, cells at stride 32 where the first layer's text queries look; None for where
                their mask is.

        Returns:
            Predictions, the last one last, of Q = k' + L queries; the hidden states before the first layer and after
            each, (B, Q, C); with `eager` the attention weights of all layers.
        """
        batch = mask_features.shape[0]
        queries = self.learned_queries.expand(batch, -1, -1)
        positions = self.query_positions[self.num_text_queries :]
        if text_queries is not None:
            queries = torch.cat([text_queries.to(queries.dtype), queries], dim=1)
            positions = torch.cat([self.query_positions[: text_queries.shape[1]], positions])

        values = [
            level.flatten(2).transpose(1, 2) + self.level_embedding[i] for i, level in enumerate(levels)
        ]
        keys = [
            value
            + sine_position_embedding(level.shape[-2], level.shape[-1], value.shape[-1], like=value)
            .flatten(1)
            .T
            for value, level in zip(values, levels, strict=True)
        ]
        # Mask logits are linear in the mask features, so the features are resized to a level, once, not the logits.
        sizes = [level.shape[-2:] for level in levels]
        level_features = [
            F.interpolate(mask_features.detach(), size=size, mode="bilinear", align_corners=False).flatten(2)
            for size in sizes
        ]
        level_valid = [
            None if valid is None else valid_cells(valid, size).flatten(1)[:, None] for size in sizes
        ]
        mask_valid = None if valid is None else valid_cells(valid, mask_features.shape[-2:])

        predictions, hidden_states, attentions = [], [queries], []
        for index, layer in enumerate(self.layers):
            normed = self.norm(queries)
            mask_embeds = self.mask_embedding(normed)
            if every_layer:
                predictions.append(self._predict(normed, mask_embeds, mask_features, mask_valid))
            level = index % self.num_levels
            allowed = self._attention_mask(mask_embeds, level_features[level], level_valid[level])
            if index == 0 and regions is not None:
                allowed = torch.cat([regions, allowed[:, regions.shape[1] :]], dim=1)
            queries, weights = layer(queries, positions, keys[level], values[level], allowed, eager)
            hidden_states.append(queries)
            attentions += weights
        normed = self.norm(queries)
        predictions.append(self._predict(normed, self.mask_embedding(normed), mask_features, mask_valid))
        return predictions, tuple(hidden_states), tuple(attentions)

    @staticmethod
    @torch.no_grad()
    def _attention_mask(mask_embeds: Tensor, features: Tensor, valid: Tensor | None) -> Tensor:
        """Say where each query may look, (B, Q, S) bool: its mask at the level's size; everywhere if that is empty."""
        allowed = (mask_embeds.detach() @ features) >= 0  # where the sigmoid is at least one half
        if valid is not None:
            allowed = allowed & valid
        is_empty = ~allowed.any(dim=-1, keepdim=True)
        return allowed | (is_empty if valid is None else is_empty & valid)

    def _predict(
        self, normed: Tensor, mask_embeds: Tensor, mask_features: Tensor, valid: Tensor | None
    ) -> QueryPrediction:
        mask_logits = (mask_embeds @ mask_features.flatten(2)).unflatten(-1, mask_features.shape[-2:])
        inside = (mask_logits.detach() > 0) if valid is None else (mask_logits.detach() > 0) & valid[:, None]
        pooled = mask_mean(mask_features, inside).to(normed.dtype)
        class_embeds = self.class_embedding(normed + self.pooled_projection(pooled))
        return QueryPrediction(class_embeds, mask_logits, mask_embeds)
