"""DEM, detail enhancement: multi-scale features with deformable attention.

res5, res4 and res3 are projected to one width and attend to each other at a few sampled points (Deformable DETR,
arXiv 2010.04159; the pixel decoder of Mask2Former, arXiv 2112.01527); res2 then adds the detail from which masks are
made (ITA, section 3.3). Runs in the dtype of its weights, also under autocast: sampling positions lose too much in
half precision.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sine_positions(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """Sine position encoding of a (height, width) grid, (channels, height, width).

    1-based rows and columns over the size, times 2 pi; temperature 10000; the first half of the channels encodes y,
    the second x, sine and cosine interleaved (DETR, arXiv 2005.12872). `like` gives device and dtype.
    """
    half = channels // 2
    index = torch.arange(half, device=like.device, dtype=torch.float32)
    frequency = 10000 ** (2 * torch.div(index, 2, rounding_mode="floor") / half)

    def encode(size: int) -> Tensor:
        steps = torch.arange(1, size + 1, device=like.device, dtype=torch.float32)
        angles = (steps / (size + 1e-6) * 2 * math.pi)[:, None] / frequency
        return torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=-1).flatten(1)

    y = encode(height).T[:, :, None].expand(-1, -1, width)
    x = encode(width).T[:, None, :].expand(-1, height, -1)
    return torch.cat([y, x]).to(like.dtype)


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention: each query looks at a few learned points of every level.

    Args:
        channels: C. heads: attention heads. levels: feature levels. points: sampled points per head and level.
    """

    def __init__(self, channels: int, heads: int, levels: int, points: int):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(channels, heads * levels * points * 2)
        self.attention_weights = nn.Linear(channels, heads * levels * points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Points start on rays, one direction per head, a step further for each point; weights start equal."""
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        ray = torch.stack([angle.cos(), angle.sin()], dim=-1)
        ray = ray / ray.abs().max(dim=-1, keepdim=True).values
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)
        offsets = ray[:, None, None] * steps[:, None]
        offsets = offsets.expand(-1, self.levels, -1, -1).reshape(-1)
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        if not self.sampling_offsets.bias.is_meta and not getattr(
            self.sampling_offsets.bias, "_is_hf_initialized", False
        ):
            with torch.no_grad():
                self.sampling_offsets.bias.copy_(offsets)

    def forward(
        self, query: Tensor, value: Tensor, reference: Tensor, shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Attends.

        Args:
            query: (B, S, C). value: (B, S, C), the levels' cells one after the other.
            reference: (S, 2) float32, each query's own (x, y) in 0..1. shapes: each level's (height, width).

        Returns: (B, S, C).
        """
        batch, length, channels = query.shape
        heads, levels, points = self.heads, self.levels, self.points
        offsets = self.sampling_offsets(query).view(batch, length, heads, levels, points, 2)
        weights = self.attention_weights(query).view(batch, length, heads, levels * points).softmax(-1)
        # Heads join the batch: (B heads, S, levels, points).
        weights = weights.transpose(1, 2).reshape(batch * heads, length, levels, points)
        value = self.value_proj(value).view(batch, -1, heads, channels // heads).permute(0, 2, 3, 1)
        # Positions in float32 whatever the weights are: half precision cannot tell neighbouring cells apart.
        value, offsets, weights = value.flatten(0, 1).float().contiguous(), offsets.float(), weights.float()

        attended = value.new_zeros(batch * heads, channels // heads, length)
        start = 0
        for level, (height, width) in enumerate(shapes):
            size = offsets.new_tensor([width, height])
            locations = reference[None, :, None, None] + offsets[:, :, :, level] / size
            grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)
            cells = value[:, :, start : start + height * width].unflatten(-1, (height, width))
            samples = F.grid_sample(cells, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
            attended = attended + (samples * weights[:, None, :, level]).sum(dim=-1)
            start += height * width
        attended = attended.view(batch, channels, length).transpose(1, 2)
        return self.output_proj(attended.to(query.dtype))


class EncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, each with residual and norm after (post-norm)."""

    def __init__(self, channels: int, heads: int, levels: int, points: int, ffn_dim: int):
        super().__init__()
        self.attention = DeformableAttention(channels, heads, levels, points)
        self.attention_norm = nn.LayerNorm(channels)
        self.linear1 = nn.Linear(channels, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, channels)
        self.ffn_norm = nn.LayerNorm(channels)

    def forward(
        self, x: Tensor, positions: Tensor, reference: Tensor, shapes: list[tuple[int, int]]
    ) -> Tensor:
        """x: (B, S, C), positions: (S, C), added to the attention's query only. Returns (B, S, C)."""
        x = self.attention_norm(x + self.attention(x + positions, x, reference, shapes))
        return self.ffn_norm(x + self.linear2(F.relu(self.linear1(x))))


class DetailEnhancement(nn.Module):
    """The four levels of the image tower -> three levels for the decoder and the mask features.

    Args:
        in_channels: channels of res2..res5. hidden_dim: C. mask_dim: channels of the mask features.
        layers, heads, points, ffn_dim: of the deformable encoder.
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
            nn.ReLU(),
        )
        self.mask_features = nn.Conv2d(hidden_dim, mask_dim, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.level_embedding)
        for name, parameter in self.named_parameters(recurse=True):
            module, _, kind = name.rpartition(".")
            is_linear = ".linear" in module and kind == "weight"
            if is_linear or (module.startswith("input_projections") and parameter.ndim > 1):
                nn.init.xavier_uniform_(parameter)
            elif parameter.ndim == 4:
                nn.init.kaiming_uniform_(parameter, a=1)

    def forward(self, levels: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        """levels: res2..res5, (B, C_l, H_l, W_l) at strides 4, 8, 16, 32.

        Returns: mask features (B, C_mask, H / 4, W / 4), and F1, F2, F3: (B, C, H_l, W_l) at strides 32, 16, 8.
        """
        with torch.autocast(levels[0].device.type, enabled=False):
            return self._forward([level.to(self.level_embedding.dtype) for level in levels])

    def _forward(self, levels: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        res2, attended = levels[0], levels[:0:-1]
        projected = [
            projection(level) for projection, level in zip(self.input_projections, attended, strict=True)
        ]
        shapes = [(x.shape[-2], x.shape[-1]) for x in projected]
        x = torch.cat([level.flatten(2) for level in projected], dim=-1).transpose(1, 2)
        positions = torch.cat(
            [
                sine_positions(height, width, x.shape[-1], like=x).flatten(1).T + embedding
                for (height, width), embedding in zip(shapes, self.level_embedding, strict=True)
            ]
        )
        reference = torch.cat([cell_centres(height, width, x.device) for height, width in shapes])
        for layer in self.layers:
            x = layer(x, positions, reference, shapes)
        parts = x.transpose(1, 2).split([height * width for height, width in shapes], dim=-1)
        features = [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]

        lateral = self.lateral(res2)
        upsampled = F.interpolate(features[-1], size=lateral.shape[-2:], mode="bilinear", align_corners=False)
        return self.mask_features(self.output(lateral + upsampled)), features


def cell_centres(height: int, width: int, device: torch.device) -> Tensor:
    """(height * width, 2) float32: (x, y) of each cell's centre in 0..1, row by row."""
    y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
    x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1).flatten(0, 1)
