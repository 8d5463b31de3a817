"""Mask-Adapter: learned pooling of the dense CLIP feature over masks (Li et al., CVPR 2025, arXiv 2412.04533).

In place of the mean over the cells that a mask covers, a small convolutional network looks at the image and the mask
and gives several maps of weights over all cells; CLIP's head turns the feature's weighted means into CLIP embeddings.

Symbols in shapes: B images, R masks, M maps per mask, D CLIP's embedding width, n and m the network's widths; the dense
feature (B, C_5, h, w) has stride 32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .ops import valid_cells


class ChannelNorm(nn.LayerNorm):
    """Layer normalization over the channels of each cell of (R, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        """(R, C, h, w) -> (R, C, h, w)."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ConvNeXtBlock(nn.Module):
    """Depth-wise convolution and a two-layer perceptron with a scaled residual (arXiv 2201.03545)."""

    def __init__(self, channels: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.linear1 = nn.Linear(channels, 4 * channels)
        self.linear2 = nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the scale, so that the block starts close to the identity."""
        nn.init.constant_(self.scale, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(R, C, h, w) -> (R, C, h, w)."""
        update = self.norm(self.depthwise(x).movedim(1, -1))
        update = self.scale * self.linear2(F.gelu(self.linear1(update)))
        return x + update.movedim(-1, 1)


class MaskAdapter(nn.Module):
    """Masks and image embeddings -> semantic activation maps.

    Args:
        embed_dim: D.
        mask_channels: m, the width of the mask tokens.
        channels: n, the width of the blocks.
        num_maps: M, the maps of each mask.
    """

    def __init__(self, embed_dim: int, mask_channels: int = 16, channels: int = 768, num_maps: int = 16):
        super().__init__()
        self.mask_tokens = nn.Sequential(
            nn.Conv2d(1, mask_channels // 4, 3, stride=2, padding=1),
            ChannelNorm(mask_channels // 4, eps=1e-6),
            nn.GELU(),
            nn.Conv2d(mask_channels // 4, mask_channels, 3, stride=2, padding=1),
            ChannelNorm(mask_channels, eps=1e-6),
            nn.GELU(),
        )
        self.mask_projection = nn.Conv2d(mask_channels, embed_dim, 1)
        self.fuse = nn.Conv2d(embed_dim, channels, 1)
        self.block1, self.block2, self.block3 = (ConvNeXtBlock(channels) for _ in range(3))
        self.norm = ChannelNorm(channels, eps=1e-5)
        self.maps = nn.Conv2d(channels, num_maps, 1)

    def context(self, cell_embeds: Tensor) -> Tensor:
        """Fuse what CLIP's head makes of each cell, (B, D, h, w) of any floating dtype, to (B, n, h, w)."""
        return self.fuse(cell_embeds.to(self.fuse.weight.dtype))

    def forward(self, context: Tensor, masks: Tensor) -> Tensor:
        """Compute the semantic activation maps of masks.

        Args:
            context: (R, n, h, w), of each mask's image.
            masks: (R, 4 h, 4 w) float in 0..1, from `binary_masks`.

        Returns:
            (R, M, h, w) logits.
        """
        # `fuse` of the sum of image and projected mask tokens, as published; but that of the image is computed once for
        # all its masks, and the projection, which is linear too, is multiplied with `fuse`.
        fuse = self.fuse.weight.flatten(1)
        weight = fuse @ self.mask_projection.weight.flatten(1)
        bias = fuse @ self.mask_projection.get_parameter("bias")
        tokens = self.mask_tokens(masks[:, None].to(context.dtype))
        x = context + F.conv2d(tokens, weight[..., None, None], bias)
        # Channels last: what is an image for convolutions is a list of cells for linear layers, without a copy.
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.block3(self.block2(self.block1(x)))
        return self.maps(self.norm(x))


def binary_masks(
    mask_logits: Tensor, size: Sequence[int], threshold: float, valid: Tensor | None = None
) -> Tensor:
    """Threshold masks first and resize them second: the adapter's input.

    Args:
        mask_logits: (B, Q, H / 4, W / 4).
        size: (h, w) of the dense feature.
        threshold: a pixel is in the mask if its probability is above this.
        valid: (B, H, W) bool, pixels that are not padding; None where all are.

    Returns:
        (B, Q, 4 h, 4 w) float in 0..1: between the two where pixels of the mask and others share a cell.
    """
    masks = mask_logits.sigmoid() > threshold
    if valid is not None:
        masks = masks & valid_cells(valid, mask_logits.shape[-2:])[:, None]
    return F.interpolate(masks.float(), size=(4 * size[0], 4 * size[1]), mode="bilinear", align_corners=False)


def weighted_means(dense: Tensor, maps: Tensor, cells: Tensor | None = None) -> Tensor:
    """Average a dense feature over all cells, weighted by each activation map's sigmoid.

    Args:
        dense: (R, C_5, h, w).
        maps: (R, M, h, w) logits.
        cells: (R, h, w) bool, the cells that take part; None for all.

    Returns:
        (R, M, C_5) float32.
    """
    with torch.autocast(dense.device.type, enabled=False):
        logits = F.logsigmoid(maps.float())  # the sigmoid itself may underflow
        if cells is not None:
            logits = logits.masked_fill(~cells[:, None], float("-inf"))
        return logits.flatten(2).softmax(dim=-1) @ dense.float().flatten(2).transpose(1, 2)
