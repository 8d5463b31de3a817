"""Open-vocabulary classification: class logits, and the ensemble of the decoder's and CLIP's own.

In-vocabulary logits come from the decoder, which was trained on seen classes; out-of-vocabulary logits from CLIP's
dense feature pooled over each mask (`mask_pooling`), which knows every class (FC-CLIP, arXiv 2308.02487, section 3.3).
`ITAConfig.text_transfer` adds MAFT+'s text embeddings that depend on the image (Jiao et al., arXiv 2408.00744). Pooling
and transfer are frozen while a segmenter trains, as published.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .clip_backbone import ClipBackbone
from .configuration_ita import ITAConfig
from .image_text_aggregation import Attention
from .mask_pooling import AdapterMaskPooling, HardMaskPooling, MaskAdapter
from .ops import sine_position_embedding
from .text import TextEmbeddings

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
    """Multiply scaled embeddings (B, Q, D) with those of names, the maximum over a class's names: (B, Q, K + 1).

    Where each image has text embeddings of its own, they are (B, N, D) and (B, 1, D).
    """
    void_logit = scaled @ void_embed.mT
    return torch.cat([text.max_over_names(scaled @ prompt_embeds.mT), void_logit], dim=-1)


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


# --- out-of-vocabulary logits ---


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
    a transpose was meant. A piece mixes pixels of one channel or a few, padding among them, so that an image's result
    depends on the size it was padded to.
    """
    channels, height, width = dense.shape[1:]
    return dense.flatten(1).unflatten(1, (height * width, channels))


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
        """Compute the class logits (B, Q, K + 1) of mask embeddings (B, Q, D) by CLIP's logit scale, void last."""
        if self.text_transfer is None or cell_embeds is None:
            return class_logits(embeds, text, void_embed, clip.logit_scale)
        # Logits are in the thousands, which half precision is too coarse for.
        with torch.autocast(embeds.device.type, enabled=False):
            rows = torch.cat([text.prompt_embeds, F.normalize(void_embed, dim=-1)])
            rows = self.text_transfer(rows, cell_embeds.to(void_embed.dtype)).float()
            scaled = clip.logit_scale.float() * F.normalize(embeds.float(), dim=-1)
            return compare(scaled, text, rows[:, :-1], rows[:, -1:])
