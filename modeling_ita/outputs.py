"""What a call asks of the network, and what comes out. Symbols in shapes as in `modeling_ita.py`."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from .classification import Opinions
from .image_text_aggregation import Prediction
from .vocabulary import Vocabulary


@dataclass
class ITAForOpenVocabSegmentationOutput(ModelOutput):
    """What a segmented batch is.

    Attributes:
        loss: scalar, the sum of `loss_dict`, when labels were given.
        loss_dict: the weighted losses by name: `loss_ce`, `loss_mask`, `loss_dice` of the last prediction, and the
            same with `_0`, `_1`, ... of the earlier ones.
        class_queries_logits: (B, Q, K + 1), void last. In eval mode log probabilities of the ensemble, in training
            the decoder's logits.
        masks_queries_logits: (B, Q, H / 4, W / 4) of the padded image.
        dominant_categories: for each image its dominant names, nearest first.
        image_sizes: (B, 2) int64, height and width of each image within the padded one.
        stuff_ids: for each image the indices of its classes that are stuff.
        vocabulary: for each image its classes, each a list of names.

    In a batch with a vocabulary per image, classes are padded to the largest K with -inf (void stays last), and
    queries with rows that are certainly void.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    class_queries_logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    dominant_categories: list[list[str]] | None = None
    image_sizes: Tensor | None = None
    stuff_ids: list[list[int]] | None = None
    vocabulary: list[list[list[str]]] | None = None


@dataclass
class Request:
    """What a call asks for beside images; the same for all images of the call."""

    templates: Sequence[str]
    train_vocabulary: Vocabulary | None
    alpha: float
    beta: float
    shortlist: int | None
    with_loss: bool


@dataclass
class NetworkResult:
    """What the network makes of images of one size and one vocabulary: tensors alone.

    Attributes:
        predictions: of the decoder, the last one last. mask_features: (B, C_mask, H / 4, W / 4).
        class_logits: the decoder's (B, Q, K + 1) of each prediction, if losses are wanted; otherwise empty.
        nearest: (B, k) int64, the dominant candidates, if they were looked for.
        whole: (B, D), CLIP's embeddings of the images, if needed.
        opinions: at inference, what classes are made of.
        log_probabilities: (B, Q, K + 1), at inference, unless each image has classes of its own.
    """

    predictions: list[Prediction]
    mask_features: Tensor
    class_logits: list[Tensor]
    nearest: Tensor | None
    whole: Tensor | None
    opinions: Opinions | None
    log_probabilities: Tensor | None
