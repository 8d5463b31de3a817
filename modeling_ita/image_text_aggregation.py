"""ITA, image-text aggregation: the progressive feature decoder.

Text queries and learned queries read the enhanced features level by level, coarse to fine and round again, each
layer looking only where the prediction before it saw the query's object (masked attention, Mask2Former,
arXiv 2112.01527). There is no self-attention between queries in ITA (section 3.4); FC-CLIP has it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .detail_enhancement import sine_positions


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int):
        super().__init__()
        dims = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(dims[:-1], dims[1:], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class Attention(nn.Module):
    """Multi-head attention with an optional mask, through `scaled_dot_product_attention`."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        """query: (B, Q, C), key and value: (B, S, C), allowed: (B, Q, S) bool. Returns (B, Q, C)."""
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        mask = None if allowed is None else allowed[:, None]
        return self.out_proj(
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        )


class DecoderLayer(GradientCheckpointingLayer):
    """Masked cross-attention, optionally self-attention, feed-forward; residual and norm after each (post-norm)."""

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
        self, x: Tensor, query_positions: Tensor, key: Tensor, value: Tensor, allowed: Tensor
    ) -> Tensor:
        """x: (B, Q, C), query_positions: (Q, C), key and value: (B, S, C), allowed: (B, Q, S). Returns (B, Q, C)."""
        x = self.cross_attention_norm(x + self.cross_attention(x + query_positions, key, value, allowed))
        if self.self_attention is not None and self.self_attention_norm is not None:
            placed = x + query_positions
            x = self.self_attention_norm(x + self.self_attention(placed, placed, x))
        return self.ffn_norm(x + self.linear2(F.relu(self.linear1(x), inplace=True)))


@dataclass
class Prediction:
    """Class embeddings (B, Q, D), not normalised, and mask logits (B, Q, H / 4, W / 4).

    Mask logits are the products of mask embeddings (B, Q, C_mask) and mask features.
    """

    class_embeddings: Tensor
    mask_logits: Tensor
    mask_embeddings: Tensor


class ImageTextAggregation(nn.Module):
    """The decoder.

    Args:
        hidden_dim: C. mask_dim: channels of the mask features. embed_dim: D, CLIP's width.
        num_text_queries: k. num_learned_queries: L. layers, heads, ffn_dim: as in the paper 9, 8, 2048.
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
        for parameter in (self.learned_queries, self.query_positions, self.level_embedding):
            nn.init.normal_(parameter)
        nn.init.constant_(self.logit_scale, 2.6592600369327779)  # log(1 / 0.07)
        for name, parameter in self.layers.named_parameters():
            if "linear" in name and parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    @property
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
    ) -> list[Prediction]:
        """Decodes.

        Args:
            text_queries: (B, k', C) with k' <= k, or None.
            mask_features: (B, C_mask, H / 4, W / 4). levels: F1, F2, F3, (B, C, H_l, W_l).
            valid: (B, H, W) bool, pixels that are no padding; None where all are.
            every_layer: give the prediction before the first layer and after each (for training), not only the last.

        Returns: predictions, the last one last; Q = k' + L.
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
            value + sine_positions(level.shape[-2], level.shape[-1], value.shape[-1], like=value).flatten(1).T
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
        pixel_valid = None if valid is None else valid_cells(valid, mask_features.shape[-2:])

        predictions = []
        for index, layer in enumerate(self.layers):
            normed = self.norm(queries)
            mask_embeddings = self.mask_embedding(normed)
            if every_layer:
                predictions.append(self._predict(normed, mask_embeddings, mask_features, pixel_valid))
            level = index % self.num_levels
            allowed = self._attention_mask(mask_embeddings, level_features[level], level_valid[level])
            queries = layer(queries, positions, keys[level], values[level], allowed)
        normed = self.norm(queries)
        predictions.append(self._predict(normed, self.mask_embedding(normed), mask_features, pixel_valid))
        return predictions

    @staticmethod
    @torch.no_grad()
    def _attention_mask(mask_embeddings: Tensor, features: Tensor, valid: Tensor | None) -> Tensor:
        """Where each query may look, (B, Q, S) bool: its mask at the level's size; everywhere if that is nowhere."""
        allowed = (mask_embeddings.detach() @ features) >= 0  # where the sigmoid is at least one half
        if valid is not None:
            allowed = allowed & valid
        nowhere = ~allowed.any(dim=-1, keepdim=True)
        return allowed | (nowhere if valid is None else nowhere & valid)

    def _predict(
        self, normed: Tensor, mask_embeddings: Tensor, mask_features: Tensor, valid: Tensor | None
    ) -> Prediction:
        mask_logits = (mask_embeddings @ mask_features.flatten(2)).unflatten(-1, mask_features.shape[-2:])
        inside = (mask_logits.detach() > 0) if valid is None else (mask_logits.detach() > 0) & valid[:, None]
        pooled = mask_means(mask_features, inside).to(normed.dtype)
        class_embeddings = self.class_embedding(normed + self.pooled_projection(pooled))
        return Prediction(class_embeddings, mask_logits, mask_embeddings)


def mask_means(features: Tensor, masks: Tensor) -> Tensor:
    """Mean of features (B, C, h, w) inside masks (B, Q, h, w) bool, zero for an empty one: (B, Q, C) float32.

    In float32 whatever surrounds it: half precision can hold neither the sum over a large mask nor its area.
    """
    with torch.autocast(features.device.type, enabled=False):
        weights = masks.flatten(2).float()
        # An epsilon would do as well, but ONNX's optimiser drops its addition.
        areas = weights.sum(dim=-1, keepdim=True).clamp(min=1)
        return weights @ features.float().flatten(2).transpose(1, 2) / areas


def valid_cells(valid: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
    """Which cells of a (h, w) grid hold at least one valid pixel, (B, h, w) bool, from (B, H, W) bool."""
    height, width = valid.shape[-2:]
    return F.max_pool2d(valid[:, None].float(), (height // size[0], width // size[1]))[:, 0] > 0
