"""Open-vocabulary classification: class logits, mask pooling on the CLIP feature, and the ensemble of both.

In-vocabulary logits come from the decoder, which was trained on seen classes; out-of-vocabulary logits from CLIP's
dense feature pooled over each mask, which knows every class (FC-CLIP, arXiv 2308.02487, section 3.3).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops import valid_cells

IMPOSSIBLE = -1e4
"""A logit whose probability is zero in float32."""


@dataclass
class TextEmbeddings:
    """A vocabulary as the network takes it: tensors alone, so that it can be an input of a compiled graph.

    K classes, N names (a class has one or more), M candidate names, D CLIP's embedding width.

    Attributes:
        prompt_embeds: (N, D), a unit row per name, the mean over the prompt templates.
        class_of_name: (N,) int64, the class of each name; increasing.
        name_embeds: (M, D), unit embeddings of the candidate names without a template; what dominant categories are
            selected from.
        is_seen: (K,) bool, classes that share a name with the training vocabulary.
        is_duplicate: (K,) bool, classes that stand in the vocabulary once more.
    """

    prompt_embeds: Tensor
    class_of_name: Tensor
    name_embeds: Tensor
    is_seen: Tensor
    is_duplicate: Tensor


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
    total = torch.logaddexp(any_class, void_logit)
    return torch.cat([log_classes + any_class - total, void_logit - total], dim=-1)
