"""DCU, dominant category unearthing: the image's nearest category names become queries (ITA, section 3.2).

Learned queries start random, and optimize randomly; what the image is about is a better start. The image's CLIP
embedding is compared with the embedding of every name of the vocabulary and of `other`; the k nearest names, nearest
first, times a learned matrix, are the text queries. `ITAConfig.dominant_category_source` has other ways to select.

Ours, and off by default: a text query may answer for the class it was selected for. `text_query_matching="own_class"`
matches it with segments of that class alone; `text_query_class_bias` adds a learned bias to the class's logit; with
`text_query_regions` the decoder's first layer looks where the dense CLIP feature shows the class.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .clip_backbone import ClipBackbone
from .configuration_ita import ITAConfig
from .ops import integer_matrix
from .text import TextEmbeddings, Vocabulary, VocabularyKey, max_over_names, normal_form

NO_OWN_CLASS, ANY_CLASS = -2, -1
"""Instead of the class that a query answers for: none of the vocabulary's, and whichever it finds."""
REGION_LEVEL = 0.5
"""A text query's region: cells where its class has at least this share of its highest probability."""
REGION_LOGITS = 4.0
"""And where the class's logit is at most so far below its highest one."""


@dataclass
class TextQueries:
    """The dominant categories of images of one size, as queries.

    Attributes:
        queries: (B, k, C); None without dominant categories.
        names: (B, k) int64, indices of the selected names; None if they came from outside.
        classes: (B, k) int64, the class that each answers for, or `NO_OWN_CLASS`; None if they answer for none.
        regions: (B, k, h w) bool, cells of the dense feature where the decoder looks first; None for where masks are.
        class_bias: (B, k), added to the logit of the own class; None for nothing.
    """

    queries: Tensor | None = None
    names: Tensor | None = None
    classes: Tensor | None = None
    regions: Tensor | None = None
    class_bias: Tensor | None = None

    def query_classes(self, num_queries: int) -> Tensor | None:
        """Give the class that each of Q queries answers for, `ANY_CLASS` for learned ones: (B, Q) int64."""
        if self.classes is None:
            return None
        return F.pad(self.classes, (0, num_queries - self.classes.shape[1]), value=ANY_CLASS)

    def add_class_bias(self, logits: Tensor) -> Tensor:
        """Add each query's bias to the logit of its own class, (B, Q, K + 1)."""
        if self.classes is None or self.class_bias is None:
            return logits
        count = self.classes.shape[1]
        is_own = self.classes[..., None] == torch.arange(logits.shape[-1], device=logits.device)
        bias = (self.class_bias[..., None] * is_own).to(logits.dtype)
        return torch.cat([logits[:, :count] + bias, logits[:, count:]], dim=1)


def no_text_queries(*_: Any, **__: Any) -> TextQueries:
    """Stand in for `DominantCategories` where a model has none."""
    return TextQueries()


def classes_of_names(
    vocabulary: VocabularyKey, names: Sequence[Sequence[str]] | None, device: torch.device
) -> Tensor | None:
    """Give the class of each name, (B, k) int64, `NO_OWN_CLASS` for names of no class; None without names."""
    if names is None:
        return None
    return integer_matrix(_class_rows(vocabulary, tuple(map(tuple, names))), device)


@torch.compiler.assume_constant_result
def _class_rows(vocabulary: VocabularyKey, names: tuple[tuple[str, ...], ...]) -> list[list[int]]:
    class_of = Vocabulary(vocabulary).class_of_normal_form
    return [[class_of.get(normal_form(name), NO_OWN_CLASS) for name in row] for row in names]


class DominantCategories(nn.Module):
    """Select dominant categories, and make text queries of them.

    Args:
        config: of the model, with k = `num_dominant_categories`, the most text queries that an image gets.
        embed_dim: D, CLIP's embedding width.
    """

    def __init__(self, config: ITAConfig, embed_dim: int):
        super().__init__()
        self.config = config
        self.num_categories = config.num_dominant_categories
        self.projection = nn.Parameter(torch.empty(embed_dim, config.hidden_dim))
        self.class_bias = nn.Parameter(torch.empty(())) if config.text_query_class_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the projection by Xavier's rule, the bias by 2."""
        nn.init.xavier_uniform_(self.projection)
        if self.class_bias is not None:
            nn.init.constant_(self.class_bias, 2.0)

    def select(self, image_embeds: Tensor, name_embeds: Tensor) -> Tensor:
        """Select the names (M, D) that are nearest to each image (B, D) by cosine similarity.

        Returns:
            Indices of names, nearest first, (B, min(k, M)) int64. Rows of zeros are padding, selected last.
        """
        similarity = F.normalize(image_embeds.float(), dim=-1) @ name_embeds.float().T
        similarity = similarity.masked_fill(~name_embeds.any(dim=-1), float("-inf"))
        return similarity.topk(min(self.num_categories, name_embeds.shape[0]), dim=-1).indices

    def classify_cells(
        self, cell_embeds: Tensor, is_valid: Tensor, text: TextEmbeddings, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Classify each of S cells of the dense feature by itself, as `ClipBackbone.embed_cells` gives them.

        Returns:
            Class probabilities (B, S, K), zero in cells that are not valid and for duplicates; class logits (B, S, K),
            -inf there; and each name's highest logit over the cells, (B, N); float32.
        """
        names = scale * F.normalize(cell_embeds.float(), dim=-1) @ text.prompt_embeds.float().T
        names = names.masked_fill(~is_valid[..., None], float("-inf"))
        classes = max_over_names(names, text).masked_fill(text.is_duplicate, float("-inf"))
        probs = classes.softmax(dim=-1).masked_fill(~is_valid[..., None] | text.is_duplicate, 0)
        return probs, classes, names.amax(dim=1)

    def select_by_cells(
        self, cell_probs: Tensor, name_logits: Tensor, text: TextEmbeddings
    ) -> tuple[Tensor, Tensor]:
        """Select the classes that some cell of the dense feature shows best, and of each class its nearest name.

        The mean over an image shows little but its largest region. A class scores its highest probability over the
        cells. (Ours; not in the published code.)

        Returns:
            Indices of names, the best class first, (B, min(k, K)) int64 into the N names, and their classes.
        """
        scores = cell_probs.amax(dim=1).masked_fill(text.is_duplicate, -1)
        classes = scores.topk(min(self.num_categories, scores.shape[1]), dim=-1).indices
        best_of_name = name_logits[:, None].expand(-1, classes.shape[1], -1)
        is_own = text.class_of_name == classes[..., None]
        return best_of_name.masked_fill(~is_own, float("-inf")).argmax(dim=-1), classes

    def forward(
        self,
        dense: Tensor,
        text: TextEmbeddings,
        valid: Tensor | None,
        image_embeds: Tensor | None,
        given_embeds: Tensor | None,
        given_classes: Tensor | None,
        clip: ClipBackbone,
    ) -> TextQueries:
        """Make text queries of selected or given dominant categories.

        Args:
            dense: (B, C_5, h, w), the dense CLIP feature.
            text: K classes, N names, M candidate names.
            valid: (B, H, W) bool, pixels that are not padding; None where all are.
            image_embeds: (B, D), to select by; None for those of the dense feature.
            given_embeds: (B, k', D), unit embeddings of dominant categories from outside; None to select them.
            given_classes: (B, k') int64, their classes, or `NO_OWN_CLASS`.
            clip: the frozen CLIP; by name, so that accelerate does not move it like an input.
        """
        names, classes, regions, bias = None, given_classes, None, None
        by_cells, embeds = self.config.dominant_category_source == "cells", given_embeds
        if by_cells and (embeds is None or self.config.text_query_regions):
            cell_embeds, is_valid = clip.embed_cells(dense, valid)
            cells, cell_logits, name_logits = self.classify_cells(
                cell_embeds, is_valid, text, clip.logit_scale
            )
        if embeds is None and by_cells:
            names, classes = self.select_by_cells(cells, name_logits, text)
            embeds = text.prompt_embeds[names]
        elif embeds is None:
            image_embeds = clip.embed_images(dense, valid) if image_embeds is None else image_embeds
            names = self.select(image_embeds, text.name_embeds)
            embeds = text.name_embeds[names]
        if classes is not None and self.config.text_query_regions:
            index = classes.clamp(min=0)[:, None].expand(-1, cells.shape[1], -1)
            own, logits = cells.gather(2, index).mT, cell_logits.gather(2, index).mT
            regions = (own >= REGION_LEVEL * own.amax(dim=-1, keepdim=True)) & is_valid[:, None]
            # Among few classes a probability says little.
            regions &= logits >= logits.amax(dim=-1, keepdim=True) - REGION_LOGITS
            regions |= (classes == NO_OWN_CLASS)[..., None] & is_valid[:, None]
        if classes is not None and self.class_bias is not None:
            bias = self.class_bias.expand(classes.shape)
        return TextQueries(self.project(embeds), names, classes if by_cells else None, regions, bias)

    def project(self, name_embeds: Tensor) -> Tensor:
        """Project unit name embeddings (B, k, D) to text queries (B, k, C)."""
        return name_embeds.to(self.projection.dtype) @ self.projection
