"""DCU, dominant category unearthing: the image's nearest category names become queries (ITA, section 3.2).

Learned queries start random, and optimize randomly; what the image is about is a better start. The image's CLIP
embedding is compared with the embedding of every name of the vocabulary and of `other`; the k nearest names, nearest
first, times a learned matrix, are the text queries.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
            name_embeds: (M, D), unit embeddings of names without a template.

        Returns:
            Indices of the dominant categories, nearest first, (B, min(k, M)) int64.
        """
        similarity = F.normalize(image_embeds.float(), dim=-1) @ name_embeds.float().T
        return similarity.topk(min(self.num_categories, name_embeds.shape[0]), dim=-1).indices

    def forward(self, name_embeds: Tensor) -> Tensor:
        """Project the dominant categories' unit name embeddings (B, k, D) to text queries (B, k, C)."""
        return name_embeds.to(self.projection.dtype) @ self.projection
