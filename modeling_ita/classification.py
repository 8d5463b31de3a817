"""Classification at inference: the decoder's opinion and the frozen CLIP's, in a geometric ensemble.

In-vocabulary probabilities come from the decoder, which was trained on seen classes; out-of-vocabulary ones from
CLIP's dense feature pooled over each mask, which knows every class (FC-CLIP, arXiv 2308.02487, section 3.3).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .vocabulary import TextClassifier, Vocabulary, WordTensors

IMPOSSIBLE = -1e4
"""A logit whose probability is zero in float32."""


def masks_on_dense_feature(mask_logits: Tensor, dense: Tensor, upsample: int, valid: Tensor | None) -> Tensor:
    """Which cells of the dense feature each mask covers.

    Logits are resized first and thresholded second.

    Args:
        mask_logits: (B, Q, H / 4, W / 4). dense: (B, C, h, w).
        upsample: the finer grid is (h upsample, w upsample); 1 is the published form.
        valid: (B, H, W) bool, pixels that are no padding, or None.

    Returns: (B, Q, h upsample, w upsample) bool.
    """
    size = (dense.shape[-2] * upsample, dense.shape[-1] * upsample)
    masks = F.interpolate(mask_logits, size=size, mode="bilinear", align_corners=False) > 0
    if valid is None:
        return masks
    cells = F.max_pool2d(valid[:, None].float(), (valid.shape[-2] // size[0], valid.shape[-1] // size[1])) > 0
    return masks & cells


def ensemble_log_probabilities(
    in_vocab_logits: Tensor,
    out_vocab_logits: Tensor,
    seen: Tensor,
    repeats: Tensor,
    alpha: float,
    beta: float,
    counts: Tensor | None = None,
) -> Tensor:
    """Log of the final class probabilities.

    `p_in^(1 - w) p_out^w` in log space, with w = alpha for classes seen in training and beta for others; softmax over
    the classes; times one minus the decoder's void probability, which comes last itself.

    Args:
        in_vocab_logits, out_vocab_logits: (B, Q, K + 1), void last.
        seen: (K,) bool.
        repeats: (K,) bool, classes that stand in the vocabulary once more; all their probability goes to the first.
        counts: (B, Q) bool, masks for which CLIP's opinion counts; None where it does for all.

    Returns: (B, Q, K + 1) float32.
    """
    void_logit = in_vocab_logits[..., -1:].float()
    in_vocab_logits = in_vocab_logits[..., :-1].float().masked_fill(repeats, IMPOSSIBLE)
    out_vocab_logits = out_vocab_logits[..., :-1].float().masked_fill(repeats, IMPOSSIBLE)
    log_in = in_vocab_logits.log_softmax(dim=-1)
    log_out = out_vocab_logits.log_softmax(dim=-1)
    weight = torch.where(seen, alpha, beta).to(log_in)
    if counts is not None:
        weight = weight * counts[..., None]
    log_classes = ((1 - weight) * log_in + weight * log_out).log_softmax(dim=-1)
    any_class = in_vocab_logits.logsumexp(dim=-1, keepdim=True)
    total = torch.logaddexp(any_class, void_logit)
    return torch.cat([log_classes + any_class - total, void_logit - total], dim=-1)


@dataclass
class Opinions:
    """What the decoder and CLIP each make of the queries, before a vocabulary is known.

    Attributes:
        in_vocab, out_vocab: (B, Q, D), the decoder's class embeddings and CLIP's of the masks, any length.
        counts: (B, Q) bool, masks for which CLIP's opinion counts; None where it does for all.
        void: (1, D), the void embedding.
        scales: logit scales of the decoder and of CLIP. weights: alpha and beta of the ensemble.
    """

    in_vocab: Tensor
    out_vocab: Tensor
    counts: Tensor | None
    void: Tensor
    scales: tuple[Tensor, Tensor]
    weights: tuple[float, float]

    def classify(self, words: WordTensors) -> Tensor:
        """Log of the final class probabilities, (B, Q, K + 1) float32, void last."""
        in_scale, out_scale = self.scales
        return ensemble_log_probabilities(
            words.logits(self.in_vocab, self.void, in_scale),
            words.logits(self.out_vocab, self.void, out_scale),
            words.seen,
            words.repeats,
            *self.weights,
            counts=self.counts,
        )

    def classify_shortlists(
        self,
        classifier: TextClassifier,
        train_vocabulary: Vocabulary | None,
        shortlists: list[list[int]],
    ) -> Tensor:
        """As `classify`, but classes that are not on an image's list get -inf, as if its vocabulary had no others.

        train_vocabulary: the classes that were seen in training. shortlists: for each image the classes that it can
        have at all, as increasing indices.
        """
        batch, queries = self.in_vocab.shape[:2]
        result = self.in_vocab.new_full(
            (batch, queries, classifier.num_classes + 1), float("-inf"), dtype=torch.float32
        )
        for image, classes in enumerate(shortlists):
            one = slice(image, image + 1)
            columns = torch.tensor([*classes, classifier.num_classes], device=result.device)
            own = replace(
                self,
                in_vocab=self.in_vocab[one],
                out_vocab=self.out_vocab[one],
                counts=None if self.counts is None else self.counts[one],
            )
            result[one, :, columns] = own.classify(classifier.shortlist(classes).tensors(train_vocabulary))
        return result
