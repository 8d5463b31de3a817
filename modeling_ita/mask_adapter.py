"""Mask-Adapter: learned pooling of the dense CLIP feature over masks (Li et al., CVPR 2025, arXiv 2412.04533).

In place of the mean over the cells that a mask covers, a small convolutional network looks at the image and the mask
and gives several maps of weights over all cells; CLIP's head turns the feature's weighted means into CLIP embeddings.

Symbols in shapes: B images, R masks, M maps per mask, D CLIP's embedding width, n and m the network's widths; the dense
feature (B, C_5, h, w) has stride 32.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_CHUNK_ACTIVATIONS = 2**25
"""Largest activation of one chunk of masks, in numbers: 128 MiB in float32."""
TRACED_CHUNK = 25
"""Masks in a chunk of a compiled or exported graph, where the size of the image may be unknown."""


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
        num_blocks: ConvNeXt blocks.
    """

    def __init__(
        self,
        embed_dim: int,
        mask_channels: int = 16,
        channels: int = 768,
        num_maps: int = 16,
        num_blocks: int = 3,
    ):
        super().__init__()
        self.mask_tokens = nn.Sequential(
            nn.Conv2d(1, mask_channels // 4, 3, stride=2, padding=1),
            ChannelNorm(mask_channels // 4, eps=1e-6),
            nn.GELU(),
            nn.Conv2d(mask_channels // 4, mask_channels, 3, stride=2, padding=1),
            ChannelNorm(mask_channels, eps=1e-6),
            nn.GELU(),
            nn.Conv2d(mask_channels, embed_dim, 1),
        )
        self.fuse = nn.Conv2d(embed_dim, channels, 1)
        self.blocks = nn.ModuleList(ConvNeXtBlock(channels) for _ in range(num_blocks))
        self.norm = ChannelNorm(channels, eps=1e-5)
        self.maps = nn.Conv2d(channels, num_maps, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as ConvNeXt does; a block starts close to the identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, ConvNeXtBlock):
                nn.init.constant_(module.scale, 1e-6)

    def forward(self, dense: Tensor, image_embeds: Tensor, masks: Tensor, image_of_mask: Tensor) -> Tensor:
        """Pool the dense feature for each mask, chunk by chunk.

        Args:
            dense: (B, C_5, h, w).
            image_embeds: (B, D, h, w), what CLIP's head makes of each cell, not normalized.
            masks: (R, 4 h, 4 w) float in 0..1, from `binary_masks`.
            image_of_mask: (R,) int64, the image of each mask.

        Returns:
            (R, M, C_5) float32, one weighted mean for each activation map.
        """
        if not len(masks):
            return dense.new_zeros(0, self.maps.out_channels, dense.shape[1], dtype=torch.float32)
        context = self.fuse(image_embeds)
        chunk = self._chunk(image_embeds)
        pooled = [
            weighted_means(dense[images], self.activation_maps(context[images], part))
            for part, images in zip(masks.split(chunk), image_of_mask.split(chunk), strict=True)
        ]
        return torch.cat(pooled)

    def activation_maps(self, context: Tensor, masks: Tensor) -> Tensor:
        """Compute the semantic activation maps of masks.

        Args:
            context: (R, n, h, w), `fuse` of each mask's image.
            masks: (R, 4 h, 4 w) float.

        Returns:
            (R, M, h, w) logits.
        """
        x = context + F.conv2d(self.mask_tokens(masks[:, None].to(context.dtype)), self.fuse.weight)
        # Channels last: what is an image for convolutions is a list of cells for linear layers, without a copy.
        x = x.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x = block(x)
        return self.maps(self.norm(x))

    def _chunk(self, image_embeds: Tensor) -> int:
        if torch.compiler.is_compiling():
            return TRACED_CHUNK
        height, width = image_embeds.shape[-2:]
        return max(1, MAX_CHUNK_ACTIVATIONS // (4 * self.fuse.out_channels * height * width))


def binary_masks(mask_logits: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """Threshold masks first and resize them second: the adapter's input.

    Args:
        mask_logits: (B, Q, H / 4, W / 4).
        size: (h, w) of the dense feature.
        threshold: a pixel is in the mask if its probability is above this.

    Returns:
        (B, Q, 4 h, 4 w) float in 0..1: between the two where pixels of the mask and others share a cell.
    """
    masks = (mask_logits.sigmoid() > threshold).float()
    return F.interpolate(masks, size=(4 * size[0], 4 * size[1]), mode="bilinear", align_corners=False)


def weighted_means(dense: Tensor, maps: Tensor) -> Tensor:
    """Average a dense feature over all cells, weighted by each activation map's sigmoid.

    Args:
        dense: (R, C_5, h, w).
        maps: (R, M, h, w) logits.

    Returns:
        (R, M, C_5) float32.
    """
    with torch.autocast(dense.device.type, enabled=False):
        weights = F.logsigmoid(maps.float()).flatten(2).softmax(dim=-1)  # the sigmoid itself may underflow
        return weights @ dense.float().flatten(2).transpose(1, 2)
