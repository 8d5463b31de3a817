"""Content-dependent transfer: text embeddings that depend on the image (MAFT+, Jiao et al., arXiv 2408.00744).

Each row of the text classifier attends to the image and is moved by what it finds there. Rows do not see each other,
so that classes can be left out, added or cut into chunks without a change for the rest.
"""

from torch import Tensor, nn

from .image_text_aggregation import Attention
from .ops import sine_position_embedding


class TextTransfer(nn.Module):
    """Cross-attention from text embeddings to an image, without the usual second layer.

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
