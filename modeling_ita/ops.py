"""Small tensor functions that several parts of the network share."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int):
        super().__init__()
        dims = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(dims[:-1], dims[1:], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_dim) to (..., out_dim)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def const_matrix(rows: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make a small matrix on the device; in an exported graph its entries may depend on the image's size."""
    return torch.stack(
        [torch.stack([torch.full((), one, dtype=dtype, device=device) for one in row]) for row in rows]
    )


def sine_position_embedding(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """Encode the positions of a (height, width) grid by sines (DETR, arXiv 2005.12872).

    1-based rows and columns over the size, times 2 pi; temperature 10000; the first half of the channels encodes y,
    the second x, sine and cosine interleaved.

    Args:
        height: rows of the grid.
        width: columns of the grid.
        channels: C, a multiple of 4.
        like: a tensor that gives device and dtype.

    Returns:
        (C, height, width).
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


def mask_mean(features: Tensor, masks: Tensor) -> Tensor:
    """Average features inside masks; zero for an empty mask.

    In float32 whatever surrounds it: half precision can hold neither the sum over a large mask nor its area.

    Args:
        features: (B, C, h, w).
        masks: (B, Q, h, w) bool.

    Returns:
        (B, Q, C) float32.
    """
    with torch.autocast(features.device.type, enabled=False):
        weights = masks.flatten(2).float()
        # An epsilon would do as well, but ONNX's optimizer drops its addition.
        areas = weights.sum(dim=-1, keepdim=True).clamp(min=1)
        return weights @ features.float().flatten(2).transpose(1, 2) / areas


def valid_cells(valid: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
    """Find the cells of a coarser grid that hold at least one valid pixel.

    Args:
        valid: (B, H, W) bool.
        size: (h, w), divisors of (H, W).

    Returns:
        (B, h, w) bool.
    """
    height, width = valid.shape[-2:]
    return F.max_pool2d(valid[:, None].float(), (height // size[0], width // size[1]))[:, 0] > 0


def channels_last(pixel_values: Tensor) -> Tensor:
    """Bring images into the layout in which convolutions of an accelerator are fastest; leave them on a CPU."""
    if pixel_values.device.type == "cpu":
        return pixel_values
    return pixel_values.contiguous(memory_format=torch.channels_last)
