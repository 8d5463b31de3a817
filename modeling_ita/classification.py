"""Open-vocabulary classification: class logits, mask pooling on the CLIP feature, and the ensemble of both.

In-vocabulary logits come from the decoder, which was trained on seen classes; out-of-vocabulary logits from CLIP's
dense feature pooled over each mask, which knows every class (FC-CLIP, arXiv 2308.02487, section 3.3).

`ITAConfig.mask_pooling` chooses between the mean over the cells that a mask covers (FC-CLIP, ITA) and Mask-Adapter's
learned weights; `ITAConfig.text_transfer` adds MAFT+'s text embeddings that depend on the image. In their published
forms all of them are frozen while a segmenter trains.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .clip_backbone import ClipBackbone
from .configuration_ita import ITAConfig
from .mask_adapter import MaskAdapter, binary_masks, weighted_means
from .ops import valid_cells
from .text_transfer import TextTransfer, shuffled_cells

IMPOSSIBLE = -1e4
"""A logit whose probability is zero in float32."""


def class_logits(embeds: Tensor, text: TextEmbeddings, void_embed: Tensor, scale: Tensor) -> Tensor:
    """Compare embeddings with a vocabulary: scaled cosine, the maximum over a class's names; void last.

    Args:
        embeds: (B, Q, D), of any length.
        text: K classes.
        void_embed: (1, D), of any length.
        scale: the logit scale, a scalar.

    Returns:
        (B, Q, K + 1).
    """
    void_embed = F.normalize(void_embed.to(embeds.dtype), dim=-1)
    return compare(scale * F.normalize(embeds, dim=-1), text, text.prompt_embeds.to(embeds.dtype), void_embed)


def compare(scaled: Tensor, text: TextEmbeddings, prompt_embeds: Tensor, void_embed: Tensor) -> Tensor:
    """Multiply with text embeddings, the maximum over a class's names; void last.

    Args:
        scaled: (B, Q, D), unit embeddings times the logit scale.
        text: says which names make a class.
        prompt_embeds: (N, D), or (B, N, D) where each image has its own.
        void_embed: (1, D) or (B, 1, D).

    Returns:
        (B, Q, K + 1).
    """
    void_logit = scaled @ void_embed.mT
    classes = names = scaled @ prompt_embeds.mT
    num_classes = text.is_seen.shape[0]
    # An exported graph is to serve vocabularies with synonyms, whether the one at hand has any or not.
    if torch.compiler.is_exporting() or len(text.class_of_name) > num_classes:
        index = text.class_of_name.expand_as(names)
        classes = names.new_full((*names.shape[:-1], num_classes), float("-inf"))
        classes = classes.scatter_reduce(-1, index, names, "amax", include_self=False)
    return torch.cat([classes, void_logit], dim=-1)


def masks_on_grid(mask_logits: Tensor, size: tuple[int, int], valid: Tensor | None) -> Tensor:
    """Find the cells of the dense CLIP feature that each mask covers: resize the logits first, threshold second.

    Args:
        mask_logits: (B, Q, H / 4, W / 4).
        size: (h, w) of the grid.
        valid: (B, H, W) bool, pixels that are not padding; None where all are.

    Returns:
        (B, Q, h, w) bool.
    """
    masks = F.interpolate(mask_logits, size=size, mode="bilinear", align_corners=False) > 0
    return masks if valid is None else masks & valid_cells(valid, size)[:, None]


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
        objectness_weight: how far CLIP says whether a mask shows something, in the place of the decoder, which takes
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


# --- out-of-vocabulary logits: how the dense CLIP feature is pooled, and with which text it is compared ---

MAX_CHUNK_ACTIVATIONS = 2**25
"""Largest activation of one chunk of masks, in numbers: 128 MiB in float32."""
TRACED_CHUNK = 25
"""Masks of an image in a chunk of a compiled or exported graph, where sizes may be unknown."""


class HardMaskPooling(nn.Module):
    """The mean over the cells that a mask covers, through CLIP's head (FC-CLIP, arXiv 2308.02487, section 3.3).

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
            cell_embeds: not used.
            mask_logits: (B, Q, H / 4, W / 4).
            valid: (B, H, W) bool, pixels that are not padding; None where all are.
            in_vocab_logits: not used.
            clip: the frozen CLIP; by name, so that accelerate does not move it like an input.

        Returns:
            (B, Q, D), not normalized, and (B, Q) bool, masks whose embedding counts; None where all do.
        """
        height, width = dense.shape[-2:]
        size = (height * self.upsample, width * self.upsample)
        masks = masks_on_grid(mask_logits, size, valid)
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
        """Embed masks.

        Args:
            dense: (B, C_5, h, w), the dense CLIP feature.
            cell_embeds: (B, D, h, w), what CLIP's head makes of each cell.
            mask_logits: (B, Q, H / 4, W / 4).
            valid: (B, H, W) bool, pixels that are not padding; None where all are.
            in_vocab_logits: (B, Q, K + 1), of the decoder.
            clip: the frozen CLIP; by name, so that accelerate does not move it like an input.

        Returns:
            (B, Q, D), not normalized, and None: the embeddings of all masks count.
        """
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
        """Embed masks chunk by chunk.

        Args:
            clip: has the head.
            dense: (B, C_5, h, w).
            context: (B, n, h, w), of the adapter.
            masks: (R, 4 h, 4 w) float, as from `binary_masks`.
            image_of_mask: (R,) int64, the image of each mask.
            valid: (B, H, W) bool or None.

        Returns:
            (R, D), not normalized.
        """
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
        """Embed each cell by CLIP's head, in the order in which the network was trained to read them.

        Args:
            clip: has the head.
            dense: (B, C_5, h, w).

        Returns:
            (B, D, h, w), not normalized.
        """
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
        """Compute out-of-vocabulary logits.

        Args:
            dense: (B, C_5, h, w), the dense CLIP feature.
            mask_logits: (B, Q, H / 4, W / 4).
            valid: (B, H, W) bool, pixels that are not padding; None where all are.
            text: the vocabulary, K classes.
            void_embed: (1, D), of any length.
            in_vocab_logits: (B, Q, K + 1), of the decoder.
            clip: the frozen CLIP; by name, so that accelerate does not move it like an input.

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
        """Compute the class logits of mask embeddings by CLIP's logit scale.

        Args:
            clip: the frozen CLIP.
            embeds: (B, Q, D), of any length.
            text: the vocabulary, K classes.
            void_embed: (1, D), of any length.
            cell_embeds: (B, D, h, w), what the text is transferred to; not used without a transfer.

        Returns:
            (B, Q, K + 1), void last.
        """
        if self.text_transfer is None or cell_embeds is None:
            return class_logits(embeds, text, void_embed, clip.logit_scale)
        # Logits are in the thousands, which half precision is too coarse for.
        with torch.autocast(embeds.device.type, enabled=False):
            rows = torch.cat([text.prompt_embeds, F.normalize(void_embed, dim=-1)])
            rows = self.text_transfer(rows, cell_embeds.to(void_embed.dtype)).float()
            scaled = clip.logit_scale.float() * F.normalize(embeds.float(), dim=-1)
            return compare(scaled, text, rows[:, :-1], rows[:, -1:])
