"""DCU, dominant category unearthing: the image's nearest category names become queries.

Learned queries start random, and optimise randomly; what the image is about is a better start. The image's CLIP
embedding is compared with the bare embedding of every name of the vocabulary and of the word `other`; the k nearest
names, nearest first, times a learned matrix, are the text queries (ITA, section 3.2).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DominantCategories(nn.Module):
    """Text queries from names.

    Args:
        embed_dim: D, CLIP's embedding width.
        hidden_dim: C, the decoder's width.
        num_categories: k, the most text queries an image gets.
    """

    def __init__(self, embed_dim: int, hidden_dim: int, num_categories: int):
        super().__init__()
        self.num_categories = num_categories
        self.projection = nn.Parameter(torch.empty(embed_dim, hidden_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.projection)

    def nearest(self, image_embeddings: Tensor, candidates: Tensor) -> Tensor:
        """Indices of the dominant categories, nearest first.

        Args:
            image_embeddings: (B, D), any length.
            candidates: (M, D), unit bare embeddings of names.

        Returns: (B, min(k, M)) int64.
        """
        similarity = F.normalize(image_embeddings.float(), dim=-1) @ candidates.float().T
        return similarity.topk(min(self.num_categories, candidates.shape[0]), dim=-1).indices

    def forward(self, embeddings: Tensor) -> Tensor:
        """Text queries (B, k, C) of the dominant names' unit bare embeddings (B, k, D)."""
        return embeddings.to(self.projection.dtype) @ self.projection
