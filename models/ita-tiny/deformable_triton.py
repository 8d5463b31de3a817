"""Multi-scale deformable attention as one Triton kernel, forward and backward, for NVIDIA GPUs.

A program takes one query and one head: it walks over levels and points, reads the four cells around each place, and
adds them up in float32. No sampled value is ever written to memory. What it computes is `sample_by_grid` of
`detail_enhancement.py` (Deformable DETR, arXiv 2010.04159, section 4.1), which stays the reference and the fallback.

Registered as operators of torch's, so that compiled graphs take them as they are. With TRITON_INTERPRET=1 set before
triton is imported they run on tensors in main memory, slowly, for tests.
"""

import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

AVAILABLE = triton is not None
"""Whether triton can be imported."""


def serves(value: Tensor) -> bool:
    """Whether the kernel can take this value tensor: on an NVIDIA GPU, with Triton installed, of 32-bit size."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return AVAILABLE and (value.is_cuda or interpreted) and value.numel() < 2**31


if AVAILABLE:

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
                # Beyond the border all is zero; a number that fits 32 bits, and one that is none stays none.
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
        """Runs a kernel, one program for each image, query and head. value: (B, S, heads, c)."""
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
    """Weighted sums of bilinear samples.

    Args:
        value: (B, S, heads, c) float32, bfloat16 or float16, the levels' cells one after the other.
        offsets: (B, Q, heads, L, points, 2), (x, y) in cells of the level, from the query's own place.
        weights: (B, Q, heads, L, points).
        origins: (Q, L, 2) float32, the query's own (x, y) in cells of each level; 0 is the first cell's centre.
        levels: (L, 3) int32, each level's height, width and first cell.

    Returns: (B, Q, heads, c) float32.
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
    """Gradients of value, offsets and weights, float32, from that of the result."""
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
