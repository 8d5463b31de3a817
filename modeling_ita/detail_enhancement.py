"""DEM, detail enhancement: multi-scale features with deformable attention.

res5, res4 and res3 are projected to one width and attend to each other at a few sampled points (Deformable DETR,
arXiv 2010.04159; the pixel decoder of Mask2Former, arXiv 2112.01527); res2 then adds the detail from which masks are
made (ITA, section 3.3). Runs in the dtype of its weights, also under autocast: sampling positions lose too much in
half precision.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .deformable_triton import deformable_attention, serves


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

    def forward(self, query: Tensor, value: Tensor, plan: "SamplingPlan") -> Tensor:
        """Attends. query: (B, S, C). value: (B, S, C), the levels' cells one after the other. Returns (B, S, C)."""
        batch, length, _ = query.shape
        heads = self.heads
        offsets = self.sampling_offsets(query).view(batch, length, heads, self.levels, self.points, 2)
        weights = self.attention_weights(query).view(batch, length, heads, -1).softmax(-1)
        value = self.value_proj(value)
        # Positions in float32 whatever the weights are: half precision cannot tell neighbouring cells apart.
        if value.is_cuda and serves(value) and not torch.compiler.is_exporting():
            attended = sample_by_triton(value, offsets, weights, plan)
        else:
            sample = sample_by_bags if plan.fits_bags(value) else sample_by_grid
            attended = sample(value.float(), offsets.float(), weights.float(), plan)
        return self.output_proj(attended.to(query.dtype))


@dataclass
class SamplingPlan:
    """Where the cells of the attended levels lie; the same for all layers.

    All levels lie in one table of cells, for `sample_by_bags`: one below the other, each with a border of zeros one
    cell wide.

    Attributes:
        shapes: each level's (height, width).
        reference: (S, 2) float32, each cell's own (x, y) in 0..1, all levels one after the other.
        origins: x and y (S, L) float32 of the same place in cells of each level; 0 is its border's first cell.
        limits: x and y (L,) float32, where each level's border ends.
        first_rows: each level's first row in the table.
        pitch, rows: cells in a row of the table, and its rows.
    """

    shapes: list[tuple[int, int]]
    reference: Tensor
    origins: tuple[Tensor, Tensor]
    limits: tuple[Tensor, Tensor]
    first_rows: list[int]
    pitch: int
    rows: int

    @classmethod
    def of(cls, shapes: list[tuple[int, int]], device: torch.device) -> "SamplingPlan":
        reference = torch.cat([cell_centres(height, width, device) for height, width in shapes])
        heights, widths = numbers(shapes, torch.float32, device).unbind(-1)
        starts = [0, *itertools.accumulate(height + 2 for height, _ in shapes)]
        return cls(
            shapes,
            reference,
            origins=(reference[:, :1] * widths + 0.5, reference[:, 1:] * heights + 0.5),
            limits=(widths + 1, heights + 1),
            first_rows=starts[:-1],
            pitch=max(width for _, width in shapes) + 2,
            rows=starts[-1] + 1,  # below the last border there is one row more to read zeros from
        )

    def fits_bags(self, value: Tensor) -> bool:
        """Whether `sample_by_bags` serves: on a CPU, and positions in the table are exact in float32."""
        if value.device.type != "cpu" or torch.compiler.is_exporting():
            return False
        return self.rows * self.pitch < 2**24 and value.numel() < 2**31

    @property
    def places(self) -> Tensor:
        """(S, L, 2) float32, `origins` as (x, y) where 0 is the centre of a level's own first cell."""
        return torch.stack(self.origins, dim=-1) - 1

    @property
    def levels(self) -> Tensor:
        """(L, 3) int32, each level's height, width and first cell in the sequence."""
        starts = itertools.accumulate((height * width for height, width in self.shapes[:-1]), initial=0)
        rows = [(height, width, start) for (height, width), start in zip(self.shapes, starts, strict=True)]
        return numbers(rows, torch.int32, self.reference.device)


def numbers(rows: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small matrix, made on the device; in an exported graph its entries may depend on the image's size."""
    return torch.stack(
        [torch.stack([torch.full((), one, dtype=dtype, device=device) for one in row]) for row in rows]
    )


def sample_by_grid(value: Tensor, offsets: Tensor, weights: Tensor, plan: SamplingPlan) -> Tensor:
    """Weighted sums of bilinear samples, by one `grid_sample` per level.

    Args:
        value: (B, S, C) float32, heads one after the other in C.
        offsets: (B, S, heads, L, points, 2) float32, (x, y) in cells of the level, from the query's own place.
        weights: (B, S, heads, L points) float32.

    Returns: (B, S, C) float32.
    """
    batch, length, heads, _, points, _ = offsets.shape
    channels = value.shape[-1]
    # Heads join the batch: (B heads, S, levels, points).
    weights = weights.transpose(1, 2).reshape(batch * heads, length, -1, points)
    value = value.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1).flatten(0, 1).contiguous()
    attended = value.new_zeros(batch * heads, channels // heads, length)
    start = 0
    for level, (height, width) in enumerate(plan.shapes):
        size = numbers([(width, height)], offsets.dtype, offsets.device)[0]
        locations = plan.reference[None, :, None, None] + offsets[:, :, :, level] / size
        grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)
        cells = value[:, :, start : start + height * width].unflatten(-1, (height, width))
        samples = F.grid_sample(cells, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        attended = attended + (samples * weights[:, None, :, level]).sum(dim=-1)
        start += height * width
    return attended.view(batch, channels, length).transpose(1, 2)


def sample_by_triton(value: Tensor, offsets: Tensor, weights: Tensor, plan: SamplingPlan) -> Tensor:
    """The same sums by the kernel of `deformable_triton.py`; value, offsets and weights may be half precision."""
    heads, points = offsets.shape[2], offsets.shape[4]
    attended = deformable_attention(
        value.unflatten(-1, (heads, -1)),
        offsets,
        weights.unflatten(-1, (-1, points)),
        plan.places,
        plan.levels,
    )
    return attended.flatten(2)


def sample_by_bags(value: Tensor, offsets: Tensor, weights: Tensor, plan: SamplingPlan) -> Tensor:
    """The same sums, several times faster on a CPU, as one `embedding_bag`.

    A bag is one query's and head's points, four corners each, and its weights are bilinear weights times attention
    weights. Arguments and result as for `sample_by_grid`.
    """
    batch, length, heads, _, points, _ = offsets.shape
    pitch, rows, channels = plan.pitch, plan.rows, value.shape[-1]
    table = value.new_zeros(batch, rows, pitch, channels)
    parts = value.split([height * width for height, width in plan.shapes], dim=1)
    for (height, width), row, part in zip(plan.shapes, plan.first_rows, parts, strict=True):
        table[:, row + 1 : row + 1 + height, 1 : 1 + width] = part.unflatten(1, (height, width))

    def for_each_point(levels: Tensor) -> Tensor:
        """(..., L) -> (..., heads * L * points)."""
        return levels[..., None, :, None].expand(*levels.shape[:-1], heads, -1, points).flatten(-3)

    # Points lie in one dimension, (B, S, heads * L * points), and x and y apart: each step is a plain loop.
    # What lies beyond a level's border is zero like the border itself.
    x, y = (
        (offsets[..., axis].flatten(2) + for_each_point(plan.origins[axis])).clamp(
            offsets.new_zeros(()), for_each_point(plan.limits[axis])
        )
        for axis in (0, 1)
    )
    column, row_in_level = x.floor(), y.floor()
    x, y = x - column, y - row_in_level
    lower = weights.flatten(2) * y
    upper = weights.flatten(2) - lower
    upper_right, lower_right = upper * x, lower * x
    corner_weights = (upper - upper_right, upper_right, lower - lower_right, lower_right)

    first = torch.tensor(plan.first_rows, dtype=torch.int32, device=value.device) * (pitch * heads)
    image = torch.arange(batch, dtype=torch.int32, device=value.device) * (rows * pitch * heads)
    head = torch.arange(heads, dtype=torch.int32, device=value.device).repeat_interleave(len(first) * points)
    steps = (0, heads, pitch * heads, (pitch + 1) * heads)
    cell = torch.add(column, row_in_level, alpha=pitch).to(torch.int32)
    index = torch.add((for_each_point(first) + head) + image[:, None, None], cell, alpha=heads)
    # A place that is no number must not read outside of the table; its weight is no number either.
    index = index.clamp(0, batch * rows * pitch * heads - 1 - steps[-1])

    bags = (batch * length * heads, -1)
    attended = F.embedding_bag(
        torch.cat([(index + step).view(bags) for step in steps], dim=-1),
        table.view(-1, channels // heads),
        mode="sum",
        per_sample_weights=torch.cat([corner.view(bags) for corner in corner_weights], dim=-1),
    )
    return attended.view(batch, length, channels)


class EncoderLayer(GradientCheckpointingLayer):
    """Deformable self-attention and a feed-forward network, each with residual and norm after (post-norm)."""

    def __init__(self, channels: int, heads: int, levels: int, points: int, ffn_dim: int):
        super().__init__()
        self.attention = DeformableAttention(channels, heads, levels, points)
        self.attention_norm = nn.LayerNorm(channels)
        self.linear1 = nn.Linear(channels, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, channels)
        self.ffn_norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, positions: Tensor, plan: SamplingPlan) -> Tensor:
        """x: (B, S, C), positions: (S, C), added to the attention's query only. Returns (B, S, C)."""
        x = self.attention_norm(x + self.attention(x + positions, x, plan))
        return self.ffn_norm(x + self.linear2(F.relu(self.linear1(x), inplace=True)))


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
            nn.ReLU(inplace=True),
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
        # Channels last: what is an image for convolutions is a list of cells for attention, without a copy.
        levels = [level.contiguous(memory_format=torch.channels_last) for level in levels]
        res2, attended = levels[0], levels[:0:-1]
        projected = [
            projection(level) for projection, level in zip(self.input_projections, attended, strict=True)
        ]
        shapes = [(x.shape[-2], x.shape[-1]) for x in projected]
        x = torch.cat([level.flatten(2).transpose(1, 2) for level in projected], dim=1)
        positions = torch.cat(
            [
                sine_positions(height, width, x.shape[-1], like=x).flatten(1).T + embedding
                for (height, width), embedding in zip(shapes, self.level_embedding, strict=True)
            ]
        )
        plan = SamplingPlan.of(shapes, x.device)
        for layer in self.layers:
            x = layer(x, positions, plan)
        parts = x.split([height * width for height, width in shapes], dim=1)
        features = [
            part.unflatten(1, shape).movedim(-1, 1) for part, shape in zip(parts, shapes, strict=True)
        ]

        lateral = self.lateral(res2)
        upsampled = F.interpolate(features[-1], size=lateral.shape[-2:], mode="bilinear", align_corners=False)
        return self.mask_features(self.output(lateral.add_(upsampled))), features


def cell_centres(height: int, width: int, device: torch.device) -> Tensor:
    """(height * width, 2) float32: (x, y) of each cell's centre in 0..1, row by row."""
    y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
    x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1).flatten(0, 1)
