"""Out-of-vocabulary logits of masks: how the dense CLIP feature is pooled, and with which text it is compared.

`ITAConfig.mask_pooling` chooses between the mean over the cells that a mask covers (FC-CLIP, ITA) and Mask-Adapter's
learned weights; `ITAConfig.text_transfer` adds MAFT+'s text embeddings that depend on the image. In their published
forms all of them are frozen while a segmenter trains.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .classification import TextEmbeddings, class_logits, compare, masks_on_grid
from .clip_backbone import ClipBackbone
from .configuration_ita import ITAConfig
from .mask_adapter import MaskAdapter, binary_masks, weighted_means
from .ops import valid_cells
from .text_transfer import TextTransfer, shuffled_cells

MAX_CHUNK_ACTIVATIONS = 2**25
"""Largest activation of one chunk of masks, in numbers: 128 MiB in float32."""
TRACED_CHUNK = 25
"""Masks of an image in a chunk of a compiled or exported graph, where sizes may be unknown."""


class HardMaskPooling(nn.Module):
    """The mean over the cells that a mask covers, through CLIP's head (FC-CLIP, arXiv 2308.02487, section 3.3).

    Args:
        upsample: factor by which the dense feature is upsampled before masks are thresholded.
        needs_pixels: whether a mask that covers no cell has no out-of-vocabulary logits.
    """

    def __init__(self, upsample: int = 1, needs_pixels: bool = False):
        super().__init__()
        self.upsample = upsample
        self.needs_pixels = needs_pixels

    def forward(
        self,
        dense: Tensor,
        cell_embeds: Tensor | None,
        mask_logits: Tensor,
        valid: Tensor | None,
        in_vocab_logits: Tensor,
        clip: ClipBackbone,
    ) -> tuple[Tensor, Tensor | None]:
        """Embed masks.

        Args:
            dense: (B, C_5, h, w), the dense CLIP feature.
            cell_embeds: not used.
            mask_logits: (B, Q, H / 4, W / 4).
            valid: (B, H, W) bool, pixels that are not padding; None where all are.
            in_vocab_logits: not used.
            clip: the frozen CLIP; by name, so that accelerate does not move it like an input.

        Returns:
            (B, Q, D), not normalized, and (B, Q) bool, masks whose embedding counts; None where all do.
        """
        height, width = dense.shape[-2:]
        size = (height * self.upsample, width * self.upsample)
        masks = masks_on_grid(mask_logits, size, valid)
        if self.upsample > 1:
            dense = F.interpolate(dense, size=size, mode="bilinear", align_corners=False)
        return clip.pool_masks(dense, masks), masks.flatten(2).any(dim=-1) if self.needs_pixels else None


class AdapterMaskPooling(nn.Module):
    """Means weighted by Mask-Adapter's maps, each through CLIP's head; their mean (arXiv 2412.04533, section 3.2).

    The network costs several times the image tower, so it can be left out where little depends on it: a query adds at
    most (1 - p_void) times its largest mask probability to the score of any class in any pixel. Where that is at most
    `min_score`, as for void queries and empty masks, the mask is pooled as by `HardMaskPooling`. A compiled or exported
    graph, which cannot choose, runs the network for all queries.

    Args:
        adapter: the network.
        threshold: mask probability above which a pixel is in the mask.
        min_score: largest score up to which a query is left out; 0 leaves none out, as published.
    """

    def __init__(self, adapter: MaskAdapter, threshold: float = 0.5, min_score: float = 0.0):
        super().__init__()
        self.adapter = adapter
        self.threshold = threshold
        self.min_score = min_score
        self.hard = HardMaskPooling()

    def forward(
        self,
        dense: Tensor,
        cell_embeds: Tensor,
        mask_logits: Tensor,
        valid: Tensor | None,
        in_vocab_logits: Tensor,
        clip: ClipBackbone,
    ) -> tuple[Tensor, Tensor | None]:
        """Embed masks.

        Args:
            dense: (B, C_5, h, w), the dense CLIP feature.
            cell_embeds: (B, D, h, w), what CLIP's head makes of each cell.
            mask_logits: (B, Q, H / 4, W / 4).
            valid: (B, H, W) bool, pixels that are not padding; None where all are.
            in_vocab_logits: (B, Q, K + 1), of the decoder.
            clip: the frozen CLIP; by name, so that accelerate does not move it like an input.

        Returns:
            (B, Q, D), not normalized, and None: the embeddings of all masks count.
        """
        batch, queries = mask_logits.shape[:2]
        masks = binary_masks(mask_logits, dense.shape[-2:], self.threshold, valid)
        context = self.adapter.context(cell_embeds)
        images = torch.arange(batch, device=dense.device)[:, None].expand(-1, queries)
        if torch.compiler.is_compiling():
            parts = zip(masks.split(TRACED_CHUNK, dim=1), images.split(TRACED_CHUNK, dim=1), strict=True)
            embeds = [
                self._embed_chunk(clip, dense, context, part.flatten(0, 1), index.flatten(), valid).unflatten(
                    0, part.shape[:2]
                )
                for part, index in parts
            ]
            return torch.cat(embeds, dim=1), None
        if not self.min_score:
            every = self.embed(clip, dense, context, masks.flatten(0, 1), images.flatten(), valid)
            return every.unflatten(0, (batch, queries)), None
        class_probs = 1 - in_vocab_logits.float().softmax(dim=-1)[..., -1]
        matters = class_probs * mask_logits.flatten(2).amax(dim=-1).sigmoid() > self.min_score
        pooled, _ = self.hard(dense, None, mask_logits, valid, in_vocab_logits, clip=clip)
        chosen = self.embed(clip, dense, context, masks[matters], images[matters], valid)
        return pooled.masked_scatter(matters[..., None], chosen.to(pooled.dtype)), None

    def embed(
        self,
        clip: ClipBackbone,
        dense: Tensor,
        context: Tensor,
        masks: Tensor,
        image_of_mask: Tensor,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Embed masks chunk by chunk.

        Args:
            clip: has the head.
            dense: (B, C_5, h, w).
            context: (B, n, h, w), of the adapter.
            masks: (R, 4 h, 4 w) float, as from `binary_masks`.
            image_of_mask: (R,) int64, the image of each mask.
            valid: (B, H, W) bool or None.

        Returns:
            (R, D), not normalized.
        """
        chunk = max(1, MAX_CHUNK_ACTIVATIONS // (4 * context[0].numel()))
        embeds = [
            self._embed_chunk(clip, dense, context, part, images, valid)
            for part, images in zip(masks.split(chunk), image_of_mask.split(chunk), strict=True)
        ]
        return torch.cat(embeds)

    def _embed_chunk(
        self,
        clip: ClipBackbone,
        dense: Tensor,
        context: Tensor,
        masks: Tensor,
        image_of_mask: Tensor,
        valid: Tensor | None,
    ) -> Tensor:
        maps = self.adapter(context[image_of_mask], masks)
        cells = None if valid is None else valid_cells(valid, dense.shape[-2:])[image_of_mask]
        pooled = weighted_means(dense[image_of_mask], maps, cells)
        return clip.project(pooled.to(dense.dtype)).mean(dim=-2)


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
        """Embed each cell by CLIP's head, in the order in which the network was trained to read them.

        Args:
            clip: has the head.
            dense: (B, C_5, h, w).

        Returns:
            (B, D, h, w), not normalized.
        """
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
        """Compute the class logits of mask embeddings by CLIP's logit scale.

        Args:
            clip: the frozen CLIP.
            embeds: (B, Q, D), of any length.
            text: the vocabulary, K classes.
            void_embed: (1, D), of any length.
            cell_embeds: (B, D, h, w), what the text is transferred to; not used without a transfer.

        Returns:
            (B, Q, K + 1), void last.
        """
        if self.text_transfer is None or cell_embeds is None:
            return class_logits(embeds, text, void_embed, clip.logit_scale)
        # Logits are in the thousands, which half precision is too coarse for.
        with torch.autocast(embeds.device.type, enabled=False):
            rows = torch.cat([text.prompt_embeds, F.normalize(void_embed, dim=-1)])
            rows = self.text_transfer(rows, cell_embeds.to(void_embed.dtype)).float()
            scaled = clip.logit_scale.float() * F.normalize(embeds.float(), dim=-1)
            return compare(scaled, text, rows[:, :-1], rows[:, -1:])
