"""What the network gives: tensors of one group of images, and of a batch what users get.

Symbols in shapes: B images, Q queries, K classes, C the decoder's width, k text queries.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class ITAForOpenVocabSegmentationOutput(ModelOutput):
    """What the model says of a batch.

    In a batch with a vocabulary per image, classes are padded to the largest K with -inf (void stays last), and
    queries with rows that are certainly void.

    Attributes:
        loss: scalar, the sum of `loss_dict`, when labels are given.
        class_queries_logits: (B, Q, K + 1), void last. In eval mode log-probabilities of the ensemble, in training the
            decoder's logits.
        masks_queries_logits: (B, Q, H / 4, W / 4) of the padded image.
        loss_dict: the weighted losses by name: `loss_ce`, `loss_mask`, `loss_dice` of the last prediction, and the same
            with `_0`, `_1`, ... of the earlier ones.
        dominant_categories: for each image its dominant categories, nearest first; None in a graph being traced.
        image_sizes: (B, 2) int64, height and width of each image within the padded one.
        stuff_ids: for each image the indices of its classes that are stuff.
        vocabulary: for each image its classes, each a list of names.
        encoder_hidden_states: with `output_hidden_states` the features of the image tower at strides 4, 8, 16, 32,
            (B, C_l, H / s, W / s); the same for the next two.
        pixel_decoder_hidden_states: the enhanced features at strides 32, 16, 8, (B, C, H / s, W / s).
        transformer_decoder_hidden_states: the queries before the first layer of the decoder and after each, (B, Q, C).
        hidden_states: the same as `transformer_decoder_hidden_states`.
        attentions: with `output_attentions` the weights of each cross-attention (B, heads, Q, S) and, where there is
            any, self-attention (B, heads, Q, Q) of the decoder, in order.
    """

    loss: Tensor | None = None
    class_queries_logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    dominant_categories: list[list[str]] | None = None
    image_sizes: Tensor | None = None
    stuff_ids: list[list[int]] | None = None
    vocabulary: list[list[list[str]]] | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    pixel_decoder_hidden_states: tuple[Tensor, ...] | None = None
    transformer_decoder_hidden_states: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class SegmentOutput:
    """What the network makes of images of one size with one vocabulary, or, merged, of a batch.

    Attributes:
        class_logits: of the decoder, (B, Q, K + 1) of each prediction, the last one last.
        mask_logits: (B, Q, H / 4, W / 4) of each prediction.
        log_probs: (B, Q, K + 1) of the ensemble; None in training.
        mask_embeds: (B, Q, C_mask) of each prediction; None after merging.
        mask_features: (B, C_mask, H / 4, W / 4); None after merging.
        dominant: (B, k) int64, indices of the selected names; None if there was no selection, or after merging.
        encoder_hidden_states: of the image tower, if asked for, at strides 4, 8, 16, 32.
        pixel_decoder_hidden_states: if asked for, at strides 32, 16, 8.
        hidden_states: of the decoder, if asked for.
        attentions: of the decoder, if asked for.
    """

    class_logits: list[Tensor]
    mask_logits: list[Tensor]
    log_probs: Tensor | None = None
    mask_embeds: list[Tensor] | None = None
    mask_features: Tensor | None = None
    dominant: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    pixel_decoder_hidden_states: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
