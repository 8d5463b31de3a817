"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, section 4.1) and its three samplers.

Each query looks at a few learned points of every level. `sample_by_grid_sample` is the reference and the fallback,
`sample_by_embedding_bag` the same several times faster on a CPU, and `sample_by_triton` one kernel, forward and
backward, for NVIDIA GPUs: a program takes one query and one head, walks over levels and points, reads the four cells
around each point and adds them up in float32; no sampled value is ever written to memory. The kernel is registered as
an operator of torch, so that compiled graphs take it as it is. With TRITON_INTERPRET=1 set before triton is imported it
runs on tensors in main memory, slowly, for tests.
"""

import itertools
import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .ops import const_matrix

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention: each query looks at a few learned points of every level.

    Args:
        channels: C.
        heads: attention heads.
        levels: feature levels, L.
        points: sampled points per head and level.
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
        """Start points on rays, one direction per head, a step further for each point, and weights equal."""
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
        init.copy_(self.sampling_offsets.bias, offsets)

    def forward(self, query: Tensor, value: Tensor, sampling_grid: "SamplingGrid") -> Tensor:
        """Attend.

        Args:
            query: (B, S, C), all cells of all levels.
            value: (B, S, C), the levels' cells one after the other.
            sampling_grid: where they lie.

        Returns:
            (B, S, C).
        """
        batch, length, _ = query.shape
        heads = self.heads
        offsets = self.sampling_offsets(query).view(batch, length, heads, self.levels, self.points, 2)
        weights = self.attention_weights(query).view(batch, length, heads, -1)
        value = self.value_proj(value)
        # Positions in float32 whatever the weights are: half precision cannot tell neighboring cells apart.
        if value.is_cuda and triton_supports(value) and not torch.compiler.is_exporting():
            attended = sample_by_triton(value, offsets, weights.softmax(-1), sampling_grid)
        else:
            sample = (
                sample_by_embedding_bag
                if sampling_grid.fits_embedding_bag(value, heads)
                else sample_by_grid_sample
            )
            attended = sample(value.float(), offsets.float(), weights.float().softmax(-1), sampling_grid)
        return self.output_proj(attended.to(query.dtype))


@dataclass
class SamplingGrid:
    """Where the cells of the attended levels lie; the same for all layers.

    All levels lie in one table of cells, for `sample_by_embedding_bag`: one below the other, each with a border of
    zeros one cell wide.

    Attributes:
        shapes: each level's (height, width).
        reference_points: (S, 2) float32, each cell's own (x, y) in 0..1, all levels one after the other.
        origins: x and y (S, L) float32 of the same place in cells of each level; 0 is its border's first cell.
        limits: x and y (L,) float32, where each level's border ends.
        first_rows: each level's first row in the table.
        row_stride: cells in a row of the table.
        rows: rows of the table.
    """

    shapes: list[tuple[int, int]]
    reference_points: Tensor
    origins: tuple[Tensor, Tensor]
    limits: tuple[Tensor, Tensor]
    first_rows: list[int]
    row_stride: int
    rows: int

    @classmethod
    def of(cls, shapes: list[tuple[int, int]], device: torch.device) -> "SamplingGrid":
        """Lay out levels of these (height, width), coarse or fine in any order."""
        reference_points = torch.cat([cell_centers(height, width, device) for height, width in shapes])
        heights, widths = const_matrix(shapes, torch.float32, device).unbind(-1)
        starts = [0, *itertools.accumulate(height + 2 for height, _ in shapes)]
        return cls(
            shapes,
            reference_points,
            origins=(reference_points[:, :1] * widths + 0.5, reference_points[:, 1:] * heights + 0.5),
            limits=(widths + 1, heights + 1),
            first_rows=starts[:-1],
            row_stride=max(width for _, width in shapes) + 2,
            rows=starts[-1] + 1,  # below the last border there is one row more to read zeros from
        )

    def fits_embedding_bag(self, value: Tensor, heads: int) -> bool:
        """Say whether `sample_by_embedding_bag` is the faster one: on a CPU, if not in training with narrow heads.

        Its gradient with respect to `value` sorts all sampled cells, which pays from 32 channels per head on.
        Positions in the table have to be exact in float32.
        """
        if value.device.type != "cpu" or torch.compiler.is_exporting():
            return False
        if value.requires_grad and value.shape[-1] < 32 * heads:
            return False
        return self.rows * self.row_stride < 2**24 and value.numel() < 2**31

    @property
    def points_in_cells(self) -> Tensor:
        """`origins` as (x, y) where 0 is the center of a level's own first cell, (S, L, 2) float32."""
        return torch.stack(self.origins, dim=-1) - 1

    @property
    def levels(self) -> Tensor:
        """Each level's height, width and first cell in the sequence, (L, 3) int32."""
        starts = itertools.accumulate((height * width for height, width in self.shapes[:-1]), initial=0)
        rows = [(height, width, start) for (height, width), start in zip(self.shapes, starts, strict=True)]
        return const_matrix(rows, torch.int32, self.reference_points.device)


def sample_by_grid_sample(
    value: Tensor, offsets: Tensor, weights: Tensor, sampling_grid: SamplingGrid
) -> Tensor:
    """Sum bilinear samples with weights, by one `grid_sample` per level.

    Args:
        value: (B, S, C) float32, heads one after the other in C.
        offsets: (B, S, heads, L, points, 2) float32, (x, y) in cells of the level, from the query's own place.
        weights: (B, S, heads, L points) float32.
        sampling_grid: where the cells lie.

    Returns:
        (B, S, C) float32.
    """
    batch, length, heads, _, points, _ = offsets.shape
    channels = value.shape[-1]
    # Heads join the batch: (B heads, S, levels, points).
    weights = weights.transpose(1, 2).reshape(batch * heads, length, -1, points)
    value = value.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1).flatten(0, 1).contiguous()
    attended = value.new_zeros(batch * heads, channels // heads, length)
    start = 0
    for level, (height, width) in enumerate(sampling_grid.shapes):
        size = const_matrix([(width, height)], offsets.dtype, offsets.device)[0]
        locations = sampling_grid.reference_points[None, :, None, None] + offsets[:, :, :, level] / size
        grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)
        cells = value[:, :, start : start + height * width].unflatten(-1, (height, width))
        samples = F.grid_sample(cells, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        attended = attended + (samples * weights[:, None, :, level]).sum(dim=-1)
        start += height * width
    return attended.view(batch, channels, length).transpose(1, 2)


def sample_by_triton(value: Tensor, offsets: Tensor, weights: Tensor, sampling_grid: SamplingGrid) -> Tensor:
    """Compute the same sums by the Triton kernel; value, offsets and weights may be half precision."""
    heads, points = offsets.shape[2], offsets.shape[4]
    attended = deformable_attention(
        value.unflatten(-1, (heads, -1)),
        offsets,
        weights.unflatten(-1, (-1, points)),
        sampling_grid.points_in_cells,
        sampling_grid.levels,
    )
    return attended.flatten(2)


def sample_by_embedding_bag(
    value: Tensor, offsets: Tensor, weights: Tensor, sampling_grid: SamplingGrid
) -> Tensor:
    """Compute the same sums, several times faster on a CPU, as one `embedding_bag`.

    A bag is one query's and head's points, four corners each, and its weights are bilinear weights times attention
    weights. Arguments and result as for `sample_by_grid_sample`.
    """
    batch, length, heads, _, points, _ = offsets.shape
    row_stride, rows, channels = sampling_grid.row_stride, sampling_grid.rows, value.shape[-1]
    table = value.new_zeros(batch, rows, row_stride, channels)
    parts = value.split([height * width for height, width in sampling_grid.shapes], dim=1)
    for (height, width), row, part in zip(sampling_grid.shapes, sampling_grid.first_rows, parts, strict=True):
        table[:, row + 1 : row + 1 + height, 1 : 1 + width] = part.unflatten(1, (height, width))

    def for_each_point(levels: Tensor) -> Tensor:
        """Repeat (..., L) to (..., heads * L * points)."""
        return levels[..., None, :, None].expand(*levels.shape[:-1], heads, -1, points).flatten(-3)

    # Points lie in one dimension, (B, S, heads * L * points), and x and y apart: each step is a plain loop.
    # What lies beyond a level's border is zero like the border itself.
    x, y = (
        (offsets[..., axis].flatten(2) + for_each_point(sampling_grid.origins[axis])).clamp(
            offsets.new_zeros(()), for_each_point(sampling_grid.limits[axis])
        )
        for axis in (0, 1)
    )
    column, row_in_level = x.floor(), y.floor()
    x, y = x - column, y - row_in_level
    lower = weights.flatten(2) * y
    upper = weights.flatten(2) - lower
    upper_right, lower_right = upper * x, lower * x
    corner_weights = (upper - upper_right, upper_right, lower - lower_right, lower_right)

    first = torch.tensor(sampling_grid.first_rows, dtype=torch.int32, device=value.device) * (
        row_stride * heads
    )
    image = torch.arange(batch, dtype=torch.int32, device=value.device) * (rows * row_stride * heads)
    head = torch.arange(heads, dtype=torch.int32, device=value.device).repeat_interleave(len(first) * points)
    steps = (0, heads, row_stride * heads, (row_stride + 1) * heads)
    cell = torch.add(column, row_in_level, alpha=row_stride).to(torch.int32)
    index = torch.add((for_each_point(first) + head) + image[:, None, None], cell, alpha=heads)
    # A NaN position must not read outside of the table; its weight is NaN, too.
    index = index.clamp(0, batch * rows * row_stride * heads - 1 - steps[-1])

    bags = (batch * length * heads, -1)
    attended = F.embedding_bag(
        torch.cat([(index + step).view(bags) for step in steps], dim=-1),
        table.view(-1, channels // heads),
        mode="sum",
        per_sample_weights=torch.cat([corner.view(bags) for corner in corner_weights], dim=-1),
    )
    return attended.view(batch, length, channels)


def cell_centers(height: int, width: int, device: torch.device) -> Tensor:
    """Give (x, y) of each cell's center in 0..1, row by row: (height * width, 2) float32."""
    y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
    x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1).flatten(0, 1)


def triton_supports(value: Tensor) -> bool:
    """Say whether the kernel can take this value tensor: on an NVIDIA GPU, with Triton installed, of 32-bit size."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return triton is not None and (value.is_cuda or interpreted) and value.numel() < 2**31


if triton is not None:

    @triton.jit
    def _forward_kernel(
        value, offsets, weights, origins, levels, attended,
        queries, cells,
        heads: tl.constexpr, num_levels: tl.constexpr, points: tl.constexpr,
        channels: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0).to(tl.int64)
        head = program % heads
        query = (program // heads) % queries
        image = program // (heads * queries)
        channel = tl.arange(0, block)
        real = channel < channels
        total = tl.zeros((block,), dtype=tl.float32)
        for level in range(num_levels):
            height = tl.load(levels + level * 3)
            width = tl.load(levels + level * 3 + 1)
            start = tl.load(levels + level * 3 + 2)
            own_x = tl.load(origins + (query * num_levels + level) * 2)
            own_y = tl.load(origins + (query * num_levels + level) * 2 + 1)
            for point in range(points):
                place = (program * num_levels + level) * points + point
                x = own_x + tl.load(offsets + place * 2).to(tl.float32)
                y = own_y + tl.load(offsets + place * 2 + 1).to(tl.float32)
                weight = tl.load(weights + place).to(tl.float32)
                # Beyond the border all is zero; clamped to fit 32 bits. NaNs propagate.
                left = tl.floor(tl.minimum(tl.maximum(x, -2.0), width + 1.0))
                top = tl.floor(tl.minimum(tl.maximum(y, -2.0), height + 1.0))
                for corner in tl.static_range(4):
                    column = left.to(tl.int32) + corner % 2
                    row = top.to(tl.int32) + corner // 2
                    across, down = 1.0 - tl.abs(x - column), 1.0 - tl.abs(y - row)
                    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
                    there = (real & inside) != 0
                    cell = image * cells + start + row * width + column
                    here = value + (cell * heads + head) * channels + channel
                    sampled = tl.load(here, mask=there, other=0.0).to(tl.float32)
                    total += tl.where(inside, weight * across * down, 0.0) * sampled
                total += tl.where((x == x) & (y == y), 0.0, x + y)
        tl.store(attended + program * channels + channel, total, mask=real)

    @triton.jit
    def _backward_kernel(
        value, offsets, weights, origins, levels, gradient, to_value, to_offsets, to_weights,
        queries, cells,
        heads: tl.constexpr, num_levels: tl.constexpr, points: tl.constexpr,
        channels: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0).to(tl.int64)
        head = program % heads
        query = (program // heads) % queries
        image = program // (heads * queries)
        channel = tl.arange(0, block)
        real = channel < channels
        arriving = tl.load(gradient + program * channels + channel, mask=real, other=0.0).to(tl.float32)
        for level in range(num_levels):
            height = tl.load(levels + level * 3)
            width = tl.load(levels + level * 3 + 1)
            start = tl.load(levels + level * 3 + 2)
            own_x = tl.load(origins + (query * num_levels + level) * 2)
            own_y = tl.load(origins + (query * num_levels + level) * 2 + 1)
            for point in range(points):
                place = (program * num_levels + level) * points + point
                x = own_x + tl.load(offsets + place * 2).to(tl.float32)
                y = own_y + tl.load(offsets + place * 2 + 1).to(tl.float32)
                weight = tl.load(weights + place).to(tl.float32)
                left = tl.floor(tl.minimum(tl.maximum(x, -2.0), width + 1.0))
                top = tl.floor(tl.minimum(tl.maximum(y, -2.0), height + 1.0))
                along_x = 0.0
                along_y = 0.0
                seen = 0.0
                for corner in tl.static_range(4):
                    column = left.to(tl.int32) + corner % 2
                    row = top.to(tl.int32) + corner // 2
                    across, down = 1.0 - tl.abs(x - column), 1.0 - tl.abs(y - row)
                    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
                    there = (real & inside) != 0
                    cell = image * cells + start + row * width + column
                    here = (cell * heads + head) * channels + channel
                    sampled = tl.load(value + here, mask=there, other=0.0).to(tl.float32)
                    # What this cell is worth to the gradient, whatever its weights.
                    worth = tl.sum(sampled * arriving)
                    seen += tl.where(inside, across * down * worth, 0.0)
                    along_x += tl.where(inside, (2 * (corner % 2) - 1) * down * worth, 0.0)
                    along_y += tl.where(inside, (2 * (corner // 2) - 1) * across * worth, 0.0)
                    share = weight * across * down
                    tl.atomic_add(to_value + here, share * arriving, mask=there)
                tl.store(to_weights + place, seen)
                tl.store(to_offsets + place * 2, weight * along_x)
                tl.store(to_offsets + place * 2 + 1, weight * along_y)

    def _launch(kernel, value: Tensor, offsets: Tensor, *others: Tensor) -> None:
        """Run a kernel, one program for each image, query and head. value: (B, S, heads, c)."""
        batch, queries, heads, num_levels, points, _ = offsets.shape
        channels = value.shape[-1]
        kernel[(batch * queries * heads,)](
            value, offsets, *others, queries, value.shape[1], heads, num_levels, points, channels,
            triton.next_power_of_2(channels), num_warps=1,
        )  # fmt: skip


@torch.library.custom_op("ita::deformable_attention", mutates_args=())
def deformable_attention(
    value: Tensor, offsets: Tensor, weights: Tensor, origins: Tensor, levels: Tensor
) -> Tensor:
    """Sum bilinear samples with weights.

    Args:
        value: (B, S, heads, c) float32, bfloat16 or float16, the levels' cells one after the other.
        offsets: (B, Q, heads, L, points, 2), (x, y) in cells of the level, from the query's own place.
        weights: (B, Q, heads, L, points).
        origins: (Q, L, 2) float32, the query's own (x, y) in cells of each level; 0 is the first cell's center.
        levels: (L, 3) int32, each level's height, width and first cell.

    Returns:
        (B, Q, heads, c) float32.
    """
    value, offsets, weights = value.contiguous(), offsets.contiguous(), weights.contiguous()
    attended = torch.empty((*offsets.shape[:3], value.shape[-1]), dtype=torch.float32, device=value.device)
    _launch(_forward_kernel, value, offsets, weights, origins.contiguous(), levels, attended)
    return attended


@deformable_attention.register_fake
def _(value: Tensor, offsets: Tensor, weights: Tensor, origins: Tensor, levels: Tensor) -> Tensor:
    return value.new_empty((*offsets.shape[:3], value.shape[-1]), dtype=torch.float32)


@torch.library.custom_op("ita::deformable_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor, value: Tensor, offsets: Tensor, weights: Tensor, origins: Tensor, levels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradients of value, offsets and weights, float32, from that of the result."""
    value, offsets, weights = value.contiguous(), offsets.contiguous(), weights.contiguous()
    to_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    to_offsets = torch.empty(offsets.shape, dtype=torch.float32, device=value.device)
    to_weights = torch.empty(weights.shape, dtype=torch.float32, device=value.device)
    _launch(
        _backward_kernel, value, offsets, weights, origins.contiguous(), levels, gradient.contiguous(),
        to_value, to_offsets, to_weights,
    )  # fmt: skip
    return to_value, to_offsets, to_weights


@_backward.register_fake
def _(
    gradient: Tensor, value: Tensor, offsets: Tensor, weights: Tensor, origins: Tensor, levels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(tensor.new_empty(tensor.shape, dtype=torch.float32) for tensor in (value, offsets, weights))  # type: ignore[return-value]


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    found = _backward(gradient, *inputs)
    return *(one.to(tensor.dtype) for one, tensor in zip(found, inputs, strict=False)), None, None


deformable_attention.register_autograd(_gradients, setup_context=_keep)
