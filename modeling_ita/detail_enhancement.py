"""DEM, detail enhancement: multi-scale features with deformable attention.

res5, res4 and res3 are projected to one width and attend to each other at a few sampled points (the pixel decoder of
Mask2Former, arXiv 2112.01527); res2 then adds the detail from which masks are made (ITA, section 3.3). Runs in the
dtype of its weights, also under autocast: sampling positions lose too much in half precision.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .deformable_attention import DeformableAttention, SamplingGrid
from .ops import sine_position_embedding


class EncoderLayer(GradientCheckpointingLayer):
    """Deformable self-attention and a feed-forward network, each with residual and norm after (post-norm)."""

    def __init__(self, channels: int, heads: int, levels: int, points: int, ffn_dim: int):
        super().__init__()
        self.attention = DeformableAttention(channels, heads, levels, points)
        self.attention_norm = nn.LayerNorm(channels)
        self.linear1 = nn.Linear(channels, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, channels)
        self.ffn_norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, positions: Tensor, grid: SamplingGrid) -> Tensor:
        """Refine cells.

        Args:
            x: (B, S, C), all cells of all levels.
            positions: (S, C), added to the attention's query only.
            grid: where the cells lie.

        Returns:
            (B, S, C).
        """
        x = self.attention_norm(x + self.attention(x + positions, x, grid))
        return self.ffn_norm(x + self.linear2(F.relu(self.linear1(x), inplace=True)))


class DetailEnhancement(nn.Module):
    """Pixel decoder: four levels of the image tower to three levels for the decoder and the mask features.

    Args:
        in_channels: channels of res2..res5.
        hidden_dim: C.
        mask_dim: channels of the mask features.
        layers: layers of deformable attention.
        heads: attention heads.
        points: sampled points per head and level.
        ffn_dim: width of the feed-forward networks.
    """

    def __init__(
        self,
        in_channels: list[int],
        hidden_dim: int,
        mask_dim: int,
        layers: int,
        heads: int,
        points: int,
        ffn_dim: int,
    ):
        super().__init__()
        attended = in_channels[:0:-1]  # res5, res4, res3
        self.input_projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, hidden_dim, 1), nn.GroupNorm(32, hidden_dim))
            for channels in attended
        )
        self.level_embedding = nn.Parameter(torch.empty(len(attended), hidden_dim))
        self.layers = nn.ModuleList(
            EncoderLayer(hidden_dim, heads, len(attended), points, ffn_dim) for _ in range(layers)
        )
        self.lateral = nn.Sequential(
            nn.Conv2d(in_channels[0], hidden_dim, 1, bias=False), nn.GroupNorm(32, hidden_dim)
        )
        self.output = nn.Sequential(
            nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, bias=False),
            nn.GroupNorm(32, hidden_dim),
            nn.ReLU(inplace=True),
        )
        self.mask_features = nn.Conv2d(hidden_dim, mask_dim, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as Mask2Former does."""
        nn.init.normal_(self.level_embedding)
        for name, parameter in self.named_parameters(recurse=True):
            module, _, kind = name.rpartition(".")
            is_linear = ".linear" in module and kind == "weight"
            if is_linear or (module.startswith("input_projections") and parameter.ndim > 1):
                nn.init.xavier_uniform_(parameter)
            elif parameter.ndim == 4:
                nn.init.kaiming_uniform_(parameter, a=1)

    def forward(self, levels: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        """Enhance features.

        Args:
            levels: res2..res5, (B, C_l, H_l, W_l) at strides 4, 8, 16, 32.

        Returns:
            Mask features (B, C_mask, H / 4, W / 4), and F1, F2, F3: (B, C, H_l, W_l) at strides 32, 16, 8.
        """
        with torch.autocast(levels[0].device.type, enabled=False):
            return self._forward([level.to(self.level_embedding.dtype) for level in levels])

    def _forward(self, levels: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        # Channels last: a map for convolutions is a sequence of cells for attention, without a copy.
        levels = [level.contiguous(memory_format=torch.channels_last) for level in levels]
        res2, attended = levels[0], levels[:0:-1]
        projected = [
            projection(level) for projection, level in zip(self.input_projections, attended, strict=True)
        ]
        shapes = [(x.shape[-2], x.shape[-1]) for x in projected]
        x = torch.cat([level.flatten(2).transpose(1, 2) for level in projected], dim=1)
        positions = torch.cat(
            [
                sine_position_embedding(height, width, x.shape[-1], like=x).flatten(1).T + embedding
                for (height, width), embedding in zip(shapes, self.level_embedding, strict=True)
            ]
        )
        grid = SamplingGrid.of(shapes, x.device)
        for layer in self.layers:
            x = layer(x, positions, grid)
        parts = x.split([height * width for height, width in shapes], dim=1)
        features = [
            part.unflatten(1, shape).movedim(-1, 1) for part, shape in zip(parts, shapes, strict=True)
        ]

        lateral = self.lateral(res2)
        upsampled = F.interpolate(features[-1], size=lateral.shape[-2:], mode="bilinear", align_corners=False)
        return self.mask_features(self.output(lateral.add_(upsampled))), features
