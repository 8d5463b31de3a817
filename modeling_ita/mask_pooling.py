"""Pooling of CLIP's dense feature over masks: the plain mean, or weights that Mask-Adapter has learned.

`HardMaskPooling` takes the mean over the cells that a mask covers (FC-CLIP, arXiv 2308.02487, section 3.3). For
`AdapterMaskPooling` a small convolutional network looks at the image and the mask and gives several maps of weights
over all cells; CLIP's head turns the feature's weighted means into CLIP embeddings (Mask-Adapter, Li et al., CVPR 2025,
arXiv 2412.04533).

Symbols in shapes: B images, Q queries, R masks, M maps per mask, D CLIP's embedding width, n and m the network's
widths; the dense feature (B, C_5, h, w) has stride 32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .clip_backbone import ClipBackbone
from .ops import valid_cells

MAX_CHUNK_ACTIVATIONS = 2**25
"""Largest activation of one chunk of masks, in numbers: 128 MiB in float32."""
TRACED_CHUNK = 25
"""Masks of an image in a chunk of a compiled or exported graph, where sizes may be unknown."""


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
    """Average (R, C_5, h, w) over cells, weighted by the sigmoid of maps (R, M, h, w): (R, M, C_5) float32.

    `cells` (R, h, w) says which take part; None for all.
    """
    with torch.autocast(dense.device.type, enabled=False):
        logits = F.logsigmoid(maps.float())  # the sigmoid itself may underflow
        if cells is not None:
            logits = logits.masked_fill(~cells[:, None], float("-inf"))
        return logits.flatten(2).softmax(dim=-1) @ dense.float().flatten(2).transpose(1, 2)


class HardMaskPooling(nn.Module):
    """The mean over the cells that a mask covers, through CLIP's head (FC-CLIP, arXiv 2308.02487, section 3.3).

    Mask logits are resized first and thresholded second.

    Args:
        upsample: factor by which the dense feature is upsampled before masks are thresholded.
        needs_pixels: whether a mask that covers no cell has no out-of-vocabulary logits.
    """

    def __init__(self, upsample: int = 1, needs_pixels: bool = False):
        super().__init__()
        self.upsample = upsample
        self.needs_pixels = needs_pixels

    def forward(
        self,
        dense: Tensor,
        cell_embeds: Tensor | None,
        mask_logits: Tensor,
        valid: Tensor | None,
        in_vocab_logits: Tensor,
        clip: ClipBackbone,
    ) -> tuple[Tensor, Tensor | None]:
        """Embed masks.

        Args:
            dense: (B, C_5, h, w), the dense CLIP feature.
            cell_embeds: (B, D, h, w), what CLIP's head makes of each cell; for `AdapterMaskPooling`.
            mask_logits: (B, Q, H / 4, W / 4).
            valid: (B, H, W) bool, pixels that are not padding; None where all are.
            in_vocab_logits: (B, Q, K + 1), of the decoder; for `AdapterMaskPooling`.
            clip: the frozen CLIP; by name, so that accelerate does not move it like an input.

        Returns:
            (B, Q, D), not normalized, and (B, Q) bool, masks whose embedding counts; None where all do.
        """
        height, width = dense.shape[-2:]
        size = (height * self.upsample, width * self.upsample)
        masks = F.interpolate(mask_logits, size=size, mode="bilinear", align_corners=False) > 0
        masks = masks if valid is None else masks & valid_cells(valid, size)[:, None]
        if self.upsample > 1:
            dense = F.interpolate(dense, size=size, mode="bilinear", align_corners=False)
        return clip.pool_masks(dense, masks), masks.flatten(2).any(dim=-1) if self.needs_pixels else None


class AdapterMaskPooling(nn.Module):
    """Means weighted by Mask-Adapter's maps, each through CLIP's head; their mean (arXiv 2412.04533, section 3.2).

    The network costs several times the image tower, so it can be left out where little depends on it: a query adds at
    most (1 - p_void) times its largest mask probability to the score of any class in any pixel. Where that is at most
    `min_score`, as for void queries and empty masks, the mask is pooled as by `HardMaskPooling`. A compiled or exported
    graph, which cannot choose, runs the network for all queries.

    Args:
        adapter: the network.
        threshold: mask probability above which a pixel is in the mask.
        min_score: largest score up to which a query is left out; 0 leaves none out, as published.
    """

    def __init__(self, adapter: MaskAdapter, threshold: float = 0.5, min_score: float = 0.0):
        super().__init__()
        self.adapter = adapter
        self.threshold = threshold
        self.min_score = min_score
        self.hard = HardMaskPooling()

    def forward(
        self,
        dense: Tensor,
        cell_embeds: Tensor,
        mask_logits: Tensor,
        valid: Tensor | None,
        in_vocab_logits: Tensor,
        clip: ClipBackbone,
    ) -> tuple[Tensor, Tensor | None]:
        """Embed masks, as `HardMaskPooling`; all of them count."""
        batch, queries = mask_logits.shape[:2]
        masks = binary_masks(mask_logits, dense.shape[-2:], self.threshold, valid)
        context = self.adapter.context(cell_embeds)
        images = torch.arange(batch, device=dense.device)[:, None].expand(-1, queries)
        if torch.compiler.is_compiling():
            parts = zip(masks.split(TRACED_CHUNK, dim=1), images.split(TRACED_CHUNK, dim=1), strict=True)
            embeds = [
                self._embed_chunk(clip, dense, context, part.flatten(0, 1), index.flatten(), valid).unflatten(
                    0, part.shape[:2]
                )
                for part, index in parts
            ]
            return torch.cat(embeds, dim=1), None
        if not self.min_score:
            every = self.embed(clip, dense, context, masks.flatten(0, 1), images.flatten(), valid)
            return every.unflatten(0, (batch, queries)), None
        class_probs = 1 - in_vocab_logits.float().softmax(dim=-1)[..., -1]
        matters = class_probs * mask_logits.flatten(2).amax(dim=-1).sigmoid() > self.min_score
        pooled, _ = self.hard(dense, None, mask_logits, valid, in_vocab_logits, clip=clip)
        chosen = self.embed(clip, dense, context, masks[matters], images[matters], valid)
        return pooled.masked_scatter(matters[..., None], chosen.to(pooled.dtype)), None

    def embed(
        self,
        clip: ClipBackbone,
        dense: Tensor,
        context: Tensor,
        masks: Tensor,
        image_of_mask: Tensor,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Embed R masks of `binary_masks`, each of the image of its index, chunk by chunk: (R, D), not normalized."""
        chunk = max(1, MAX_CHUNK_ACTIVATIONS // (4 * context[0].numel()))
        embeds = [
            self._embed_chunk(clip, dense, context, part, images, valid)
            for part, images in zip(masks.split(chunk), image_of_mask.split(chunk), strict=True)
        ]
        return torch.cat(embeds)

    def _embed_chunk(
        self,
        clip: ClipBackbone,
        dense: Tensor,
        context: Tensor,
        masks: Tensor,
        image_of_mask: Tensor,
        valid: Tensor | None,
    ) -> Tensor:
        maps = self.adapter(context[image_of_mask], masks)
        cells = None if valid is None else valid_cells(valid, dense.shape[-2:])[image_of_mask]
        pooled = weighted_means(dense[image_of_mask], maps, cells)
        return clip.project(pooled.to(dense.dtype)).mean(dim=-2)
