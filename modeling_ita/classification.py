"""Open-vocabulary classification of masks: class logits of the decoder, class logits of CLIP, and their ensemble.

In-vocabulary logits come from the decoder, which was trained on seen classes; out-of-vocabulary logits from CLIP's
dense feature pooled over each mask, which knows every class (FC-CLIP, arXiv 2308.02487, section 3.3).

`ITAConfig.mask_pooling` chooses between the mean over the cells that a mask covers (FC-CLIP, ITA) and Mask-Adapter, a
small convolutional network that looks at image and mask and gives several maps of weights over all cells (Li et al.,
CVPR 2025, arXiv 2412.04533). `ITAConfig.text_transfer` adds MAFT+'s text embeddings that depend on the image (Jiao et
al., arXiv 2408.00744). All of them are frozen while a segmenter trains, as published.

Symbols in shapes: B images, Q queries, K classes, N names, R masks, M maps per mask, D CLIP's embedding width, n and m
the adapter's widths; the dense feature (B, C_5, h, w) has stride 32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .clip_backbone import ClipBackbone
from .configuration_ita import ITAConfig
from .image_text_aggregation import Attention
from .ops import sine_position_embedding, valid_cells
from .text import TextEmbeddings, max_over_names

IMPOSSIBLE = -1e4
"""A logit whose probability is zero in float32."""
MAX_CHUNK_ACTIVATIONS = 2**25
"""Largest activation of one chunk of masks, in numbers: 128 MiB in float32."""
TRACED_CHUNK = 25
"""Masks of an image in a chunk of a compiled or exported graph, where sizes may be unknown."""


def class_logits(embeds: Tensor, text: TextEmbeddings, void_embed: Tensor, scale: Tensor) -> Tensor:
    """Compare embeddings with a vocabulary: scaled cosine, the maximum over a class's names.

    Args:
        embeds: (B, Q, D), of any length.
        text: K classes.
        void_embed: (1, D), of any length.
        scale: the logit scale, a scalar.

    Returns:
        (B, Q, K + 1), void last.
    """
    void_embed = F.normalize(void_embed.to(embeds.dtype), dim=-1)
    return compare(scale * F.normalize(embeds, dim=-1), text, text.prompt_embeds.to(embeds.dtype), void_embed)


def compare(scaled: Tensor, text: TextEmbeddings, prompt_embeds: Tensor, void_embed: Tensor) -> Tensor:
    """Multiply scaled embeddings (B, Q, D) with those of names, the maximum over a class's names: (B, Q, K + 1).

    Where each image has text embeddings of its own, they are (B, N, D) and (B, 1, D).
    """
    void_logit = scaled @ void_embed.mT
    return torch.cat([max_over_names(scaled @ prompt_embeds.mT, text), void_logit], dim=-1)


def ensemble_log_probs(
    in_vocab_logits: Tensor,
    out_vocab_logits: Tensor,
    text: TextEmbeddings,
    alpha: float,
    beta: float,
    has_pixels: Tensor | None = None,
    objectness_weight: float = 0.0,
) -> Tensor:
    """Combine the decoder's and CLIP's class logits to the final log-probabilities.

    Softmax of each without void; the geometric mean `p_in^(1 - w) p_out^w` in log space, w being alpha for classes
    seen in training and beta for others; softmax over the classes; times `1 - p_void`, where `p_void` is the last
    entry of the softmax of the in-vocabulary logits and comes last itself.

    Args:
        in_vocab_logits: (B, Q, K + 1), of the decoder, void last.
        out_vocab_logits: (B, Q, K + 1), of CLIP's pooled feature, void last.
        text: says which classes were seen, and which are duplicates, whose probability goes to the first.
        alpha: weight of the out-of-vocabulary logits for seen classes, 0..1.
        beta: the same for unseen classes.
        has_pixels: (B, Q) bool, masks whose out-of-vocabulary logits count; None where all do.
        objectness_weight: how far CLIP says whether a mask shows something, instead of the decoder, which takes
            what it has never seen for void. The log-odds of `1 - p_void` are mixed with those of CLIP's most probable
            class by this weight times the probability that the class is unseen. (Ours; 0 as published.)

    Returns:
        (B, Q, K + 1) float32.
    """
    void_logit = in_vocab_logits[..., -1:].float()
    in_vocab_logits = in_vocab_logits[..., :-1].float().masked_fill(text.is_duplicate, IMPOSSIBLE)
    out_vocab_logits = out_vocab_logits[..., :-1].float()
    # Transferred text embeddings give logits of any size.
    impossible = (2 * out_vocab_logits.amin(dim=-1, keepdim=True)).clamp(max=IMPOSSIBLE)
    out_vocab_logits = torch.where(text.is_duplicate, impossible, out_vocab_logits)
    log_p_in = in_vocab_logits.log_softmax(dim=-1)
    log_p_out = out_vocab_logits.log_softmax(dim=-1)
    weight = torch.where(text.is_seen, alpha, beta).to(log_p_in)
    if has_pixels is not None:
        weight = weight * has_pixels[..., None]
    log_classes = ((1 - weight) * log_p_in + weight * log_p_out).log_softmax(dim=-1)
    # log(1 - p_void) and log p_void, by sums of exponentials: the power form can reach log 0.
    any_class = in_vocab_logits.logsumexp(dim=-1, keepdim=True)
    if objectness_weight:
        is_unseen = ~text.is_seen if has_pixels is None else ~text.is_seen & has_pixels[..., None]
        share = objectness_weight * (log_classes.exp() * is_unseen).sum(dim=-1, keepdim=True)
        clip_odds = log_p_out.amax(dim=-1, keepdim=True).exp().logit(eps=1e-6)
        any_class = void_logit + (1 - share) * (any_class - void_logit) + share * clip_odds
    total = torch.logaddexp(any_class, void_logit)
    return torch.cat([log_classes + any_class - total, void_logit - total], dim=-1)


# --- pooling of the dense CLIP feature over masks ---


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
    """Threshold masks (B, Q, H / 4, W / 4) first and resize them second: the adapter's input.

    For a dense feature of size (h, w) it is (B, Q, 4 h, 4 w) float, between 0 and 1 where pixels of the mask and others
    share a cell.
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


# --- text embeddings that depend on the image ---


class TextTransfer(nn.Module):
    """MAFT+'s content-dependent transfer: cross-attention from text embeddings to an image.

    Each row of the text classifier attends to the image and is moved by what it finds there. Rows do not see each
    other, so that classes can be left out, added or cut into chunks without a change for the rest.

    Args:
        embed_dim: D, CLIP's embedding width.
        heads: attention heads.
        form: "post_norm" for `norm(text + update)`, as in MAFT+'s semantic checkpoints, or "res_post_norm" for
            `text + norm(update)`, as in its panoptic ones. No tensor of a checkpoint shows it.

    Raises:
        ValueError: the embedding width is not a multiple of the heads and of 4.
    """

    def __init__(self, embed_dim: int, heads: int = 8, form: str = "post_norm"):
        super().__init__()
        if embed_dim % heads or embed_dim % 4:
            raise ValueError(f"{heads} attention heads and sine positions do not fit {embed_dim} channels")
        self.form = form
        self.attention = Attention(embed_dim, heads)
        self.linear = nn.Linear(embed_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, text_embeds: Tensor, image_embeds: Tensor) -> Tensor:
        """Transfer text embeddings to each image.

        Args:
            text_embeds: (N, D), unit rows, the same for all images.
            image_embeds: (B, D, h, w), not normalized; MAFT+'s come from `shuffled_cells`.

        Returns:
            (B, N, D), not normalized: rows are about sqrt(D) long after `post_norm`.
        """
        cells = image_embeds.flatten(2).transpose(1, 2)
        height, width = image_embeds.shape[-2:]
        positions = sine_position_embedding(height, width, cells.shape[-1], like=cells).flatten(1).T
        text = text_embeds.to(cells.dtype).expand(cells.shape[0], -1, -1)
        attended, _ = self.attention(text, cells + positions, cells)
        update = self.linear(attended)
        return self.norm(text + update) if self.form == "post_norm" else text + self.norm(update)


def shuffled_cells(dense: Tensor) -> Tensor:
    """Read a dense feature (B, C, h, w) as (B, h w, C) in the order in which MAFT+ was trained to read it.

    The published code cuts each image's numbers, channel by channel, into h w consecutive pieces of C numbers, where
    a transpose was meant. A piece mixes pixels of one channel or a few, so results depend on an image's padding.
    """
    channels, height, width = dense.shape[1:]
    return dense.flatten(1).unflatten(1, (height * width, channels))


# --- out-of-vocabulary logits ---


class MaskClassifier(nn.Module):
    """The out-of-vocabulary half of classification.

    Args:
        config: says how masks are pooled and whether text embeddings are transferred.
        clip: whose features are pooled.

    Raises:
        ValueError: an adapter or a transfer for an image tower whose head does not take one cell.
    """

    def __init__(self, config: ITAConfig, clip: ClipBackbone):
        super().__init__()
        self.pooling: HardMaskPooling | AdapterMaskPooling
        if config.mask_pooling == "adapter":
            adapter = MaskAdapter(
                clip.embed_dim, config.adapter_mask_channels, config.adapter_dim, config.adapter_num_maps
            )
            self.pooling = AdapterMaskPooling(
                adapter, config.adapter_mask_threshold, config.adapter_min_score
            )
        else:
            self.pooling = HardMaskPooling(config.dense_upsample, config.ensemble_on_valid_mask)
        self.text_transfer = (
            TextTransfer(clip.embed_dim, config.text_transfer_heads, config.text_transfer)
            if config.text_transfer is not None
            else None
        )
        self.needs_cell_embeds = config.mask_pooling == "adapter" or config.text_transfer is not None
        if self.needs_cell_embeds and clip.is_resnet:
            raise ValueError(
                "Mask-Adapter and text transfer need a CLIP whose head takes single cells, such as a ConvNeXt: "
                "a ResNet pools by attention"
            )
        self.freeze()

    def freeze(self) -> None:
        """Leave the weights out of training: the losses of a segmenter do not reach them."""
        self.requires_grad_(False)

    def embed_cells(self, clip: ClipBackbone, dense: Tensor) -> Tensor:
        """Embed each cell of (B, C_5, h, w) by CLIP's head, (B, D, h, w), in the order that the network learned."""
        cells = dense.flatten(2).transpose(1, 2) if self.text_transfer is None else shuffled_cells(dense)
        return clip.project(cells).transpose(1, 2).unflatten(2, dense.shape[-2:])

    def forward(
        self,
        dense: Tensor,
        mask_logits: Tensor,
        valid: Tensor | None,
        text: TextEmbeddings,
        void_embed: Tensor,
        in_vocab_logits: Tensor,
        clip: ClipBackbone,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute out-of-vocabulary logits of masks; see `HardMaskPooling.forward` and `class_logits`.

        Returns:
            (B, Q, K + 1), and (B, Q) bool, masks whose logits count; None where all do.
        """
        cell_embeds = self.embed_cells(clip, dense) if self.needs_cell_embeds else None
        embeds, has_pixels = self.pooling(dense, cell_embeds, mask_logits, valid, in_vocab_logits, clip=clip)
        return self.compare_with_text(clip, embeds, text, void_embed, cell_embeds), has_pixels

    def compare_with_text(
        self,
        clip: ClipBackbone,
        embeds: Tensor,
        text: TextEmbeddings,
        void_embed: Tensor,
        cell_embeds: Tensor | None,
    ) -> Tensor:
        """Compute the class logits (B, Q, K + 1) of mask embeddings (B, Q, D) by CLIP's logit scale, void last."""
        if self.text_transfer is None or cell_embeds is None:
            return class_logits(embeds, text, void_embed, clip.logit_scale)
        # Logits are in the thousands, which half precision is too coarse for.
        with torch.autocast(embeds.device.type, enabled=False):
            rows = torch.cat([text.prompt_embeds, F.normalize(void_embed, dim=-1)])
            rows = self.text_transfer(rows, cell_embeds.to(void_embed.dtype)).float()
            scaled = clip.logit_scale.float() * F.normalize(embeds.float(), dim=-1)
            return compare(scaled, text, rows[:, :-1], rows[:, -1:])
