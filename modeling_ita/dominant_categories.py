"""DCU, dominant category unearthing: the image's nearest category names become queries (ITA, section 3.2).

Learned queries start random, and optimize randomly; what the image is about is a better start. The image's CLIP
embedding is compared with the embedding of every name of the vocabulary and of `other`; the k nearest names, nearest
first, times a learned matrix, are the text queries. `ITAConfig.dominant_category_source` has other ways to select.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .classification import TextEmbeddings


class DominantCategories(nn.Module):
    """Select dominant categories, and make text queries of them.

    Args:
        embed_dim: D, CLIP's embedding width.
        hidden_dim: C, the decoder's width.
        num_categories: k, the most text queries that an image gets.
    """

    def __init__(self, embed_dim: int, hidden_dim: int, num_categories: int):
        super().__init__()
        self.num_categories = num_categories
        self.projection = nn.Parameter(torch.empty(embed_dim, hidden_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize by Xavier's rule."""
        nn.init.xavier_uniform_(self.projection)

    def select(self, image_embeds: Tensor, name_embeds: Tensor) -> Tensor:
        """Select the names that are nearest to each image by cosine similarity.

        Args:
            image_embeds: (B, D), of any length.
            name_embeds: (M, D), unit embeddings of names without a template; rows of zeros are padding, selected last.

        Returns:
            Indices of the dominant categories, nearest first, (B, min(k, M)) int64.
        """
        similarity = F.normalize(image_embeds.float(), dim=-1) @ name_embeds.float().T
        similarity = similarity.masked_fill(~name_embeds.any(dim=-1), float("-inf"))
        return similarity.topk(min(self.num_categories, name_embeds.shape[0]), dim=-1).indices

    def select_by_cells(
        self, cell_embeds: Tensor, is_valid: Tensor, text: TextEmbeddings, scale: Tensor
    ) -> Tensor:
        """Select the classes that some cell of the dense feature shows best, and of each class its nearest name.

        The mean over an image shows little but its largest region. Each cell is classified by itself, and a class
        scores its highest probability over the cells. (Ours; not in the published code.)

        Args:
            cell_embeds: (B, S, D), CLIP's embeddings of the cells, of any length.
            is_valid: (B, S) bool, cells that hold at least one pixel of the image.
            text: K classes, N names.
            scale: CLIP's logit scale, a scalar.

        Returns:
            Indices of names, the best class first, (B, min(k, K)) int64 into the N names.
        """
        names = scale * F.normalize(cell_embeds.float(), dim=-1) @ text.prompt_embeds.float().T
        names = names.masked_fill(~is_valid[..., None], float("-inf"))
        num_classes = text.is_duplicate.shape[0]
        index = text.class_of_name.expand_as(names)
        classes = names.new_full((*names.shape[:-1], num_classes), float("-inf"))
        classes = classes.scatter_reduce(-1, index, names, "amax", include_self=False)
        classes = classes.masked_fill(text.is_duplicate, float("-inf"))
        probs = classes.softmax(dim=-1).masked_fill(~is_valid[..., None], 0).amax(dim=1)
        probs = probs.masked_fill(text.is_duplicate, -1)
        chosen = probs.topk(min(self.num_categories, num_classes), dim=-1).indices
        best_of_name = names.amax(dim=1)[:, None].expand(-1, chosen.shape[1], -1)
        is_own = text.class_of_name == chosen[..., None]
        return best_of_name.masked_fill(~is_own, float("-inf")).argmax(dim=-1)

    def forward(self, name_embeds: Tensor) -> Tensor:
        """Project the dominant categories' unit name embeddings (B, k, D) to text queries (B, k, C)."""
        return name_embeds.to(self.projection.dtype) @ self.projection
