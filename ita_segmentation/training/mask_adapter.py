"""Training of Mask-Adapter on a frozen segmenter (Li et al., CVPR 2025, arXiv 2412.04533, section 3.3).

First with ground-truth masks alone, then with predicted masks mixed in: a prediction that overlaps a ground-truth mask
enough is classified like it, and its embedding is drawn to the ground-truth mask's. Only the adapter learns.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from ita_segmentation.training.trainer import ITATrainer
from modeling_ita import ITAForOpenVocabSegmentation
from modeling_ita.batching import Group, batch_vocabularies, check_images, group_images
from modeling_ita.classification import AdapterMaskPooling, binary_masks
from modeling_ita.set_criterion import Matches

MAX_TRUE_MASKS, MAX_PAIRS = 16, 8
"""Ground-truth masks of an image in a step, and pairs of a predicted and a ground-truth mask."""
MIN_IOU = 0.7
CLASS_WEIGHT, CONSISTENCY_WEIGHT = 2.0, 5.0
NO_TARGET = -100  # the class of a mask that takes no part in `cross_entropy`


class MaskAdapterTraining(nn.Module):
    """A segmenter, all of it frozen but its mask adapter, whose call gives the adapter's losses.

    With `mixed`, predicted masks are mixed in. Raises ValueError if the network has no adapter.
    """

    def __init__(self, network: ITAForOpenVocabSegmentation, mixed: bool):
        super().__init__()
        pooling = network.mask_classifier.pooling
        if not isinstance(pooling, AdapterMaskPooling):
            raise ValueError('the model has no mask adapter: set model_config.mask_pooling to "adapter"')
        self.network = network
        self.mixed = mixed
        network.requires_grad_(False)
        pooling.adapter.requires_grad_(True)

    @property
    def pooling(self) -> AdapterMaskPooling:
        """What learns."""
        return cast(AdapterMaskPooling, self.network.mask_classifier.pooling)

    def forward(
        self,
        pixel_values: Tensor,
        mask_labels: list[Tensor],
        class_labels: list[Tensor],
        vocabulary: Any,
        pixel_mask: Tensor | None = None,
    ) -> ModelOutput:
        """Compute the adapter's losses; arguments are the segmenter's own.

        Returns `loss`, the sum of `loss_dict`: `loss_ce`, the cross-entropy of masks over classes and void, and, where
        predictions are mixed in, `loss_cosine`, one minus the cosine of the embeddings of pairs; both weighted.
        """
        self.network.eval()  # nothing that is frozen behaves otherwise in training
        sizes = check_images(pixel_values, pixel_mask)
        vocabularies = batch_vocabularies(vocabulary, None, None, len(sizes))
        images = [
            image
            for group in group_images(pixel_values, pixel_mask, sizes, vocabularies)
            for image in self._images_of(group, mask_labels, class_labels)
        ]
        logits, targets, distances = (torch.cat(parts) for parts in zip(*images, strict=True))
        num_masks = (targets >= 0).sum().clamp(min=1)
        loss_dict = {"loss_ce": CLASS_WEIGHT * F.cross_entropy(logits, targets, reduction="sum") / num_masks}
        if self.mixed:
            loss_dict["loss_cosine"] = CONSISTENCY_WEIGHT * distances.sum() / (MAX_PAIRS * len(pixel_values))
        return ModelOutput(
            loss=torch.stack(list(loss_dict.values())).sum(),
            loss_dict=loss_dict,
            dominant_categories=[[] for _ in vocabularies],
            vocabulary=vocabularies,
        )

    def _images_of(
        self, group: Group, mask_labels: list[Tensor], class_labels: list[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Give for each image class logits (R, K + 1) of its masks, their classes (R,), and the distances of pairs."""
        network, classifier = self.network, self.network.mask_classifier
        clip, pooling = network.clip_backbone, self.pooling
        text = network.encode_vocabulary(group.vocabulary)
        with torch.no_grad():
            dense, mask_logits = self._predict(group)
            cell_embeds = classifier.embed_cells(clip, dense)
        context = pooling.adapter.context(cell_embeds)
        predicted = None
        if mask_logits is not None:
            predicted = binary_masks(mask_logits, dense.shape[-2:], pooling.threshold)
        for row, index in enumerate(group.indices):
            own = slice(row, row + 1)
            masks, labels = choose_masks(mask_labels[index], class_labels[index])
            masks = on_canvas(masks, group.pixel_values.shape[-2:])
            size = (4 * dense.shape[-2], 4 * dense.shape[-1])
            small = F.interpolate(masks[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
            pairs = torch.zeros(0, 2, dtype=torch.int64, device=dense.device)
            if predicted is not None and mask_logits is not None:
                pairs = match_predictions(mask_logits[row], masks)
            queries, truth = pairs.unbind(1)
            if predicted is not None:
                small = torch.cat([small, predicted[row, queries]])
            targets = torch.cat([labels, labels[truth], labels[truth]])
            if not len(small):  # every process needs a gradient, so an empty mask of no class goes through
                small, targets = small.new_zeros(1, *small.shape[1:]), labels.new_full((1,), NO_TARGET)
            of_image = torch.zeros(len(small), dtype=torch.int64, device=dense.device)
            embeds = pooling.embed(clip, dense[own], context[own], small, of_image)
            logits = classifier.compare_with_text(
                clip, embeds[None], text, network.void_embedding, cell_embeds[own]
            )
            # The ground-truth mask of a pair counts once more, as published.
            logits = torch.cat([logits[0], logits[0, truth]]).float()
            of_predictions = embeds[len(embeds) - len(pairs) :]
            yield logits, targets, 1 - F.cosine_similarity(of_predictions, embeds[truth].detach())

    def _predict(self, group: Group) -> tuple[Tensor, Tensor | None]:
        """Give the dense feature and, where predictions are mixed in, the mask logits (B, Q, H / 4, W / 4)."""
        network, seen = self.network, {}
        if not self.mixed:
            return network.clip_backbone(group.pixel_values).dense, None

        def keep(module: nn.Module, arguments: tuple) -> None:
            seen["dense"], seen["mask_logits"] = arguments[:2]

        hook = network.mask_classifier.register_forward_pre_hook(keep)
        chosen, self.pooling.min_score = self.pooling.min_score, 1.0  # classes are not needed here
        try:
            network.segment(group.pixel_values, network.encode_vocabulary(group.vocabulary), group.valid)
        finally:
            hook.remove()
            self.pooling.min_score = chosen
        return seen["dense"], seen["mask_logits"]


def choose_masks(masks: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Choose at most `MAX_TRUE_MASKS` of an image's masks (n, H, W) at random, none of them empty."""
    filled = masks.flatten(1).any(dim=1).nonzero()[:, 0] if len(masks) else torch.zeros(0, dtype=torch.int64)
    if len(filled) > MAX_TRUE_MASKS:
        filled = filled[torch.randperm(len(filled), device=filled.device)[:MAX_TRUE_MASKS]]
    return masks[filled].float(), labels[filled]


def on_canvas(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Cut or pad masks (n, H, W) to the network's input size."""
    masks = masks[:, : size[0], : size[1]]
    return F.pad(masks, (0, size[1] - masks.shape[2], 0, size[0] - masks.shape[1]))


@torch.no_grad()
def match_predictions(mask_logits: Tensor, masks: Tensor) -> Tensor:
    """Pair ground-truth masks (n, H, W) with predictions (Q, h, w) that overlap them by more than `MIN_IOU`.

    Returns (P, 2) int64, a prediction and its ground-truth mask: of several that overlap enough, one at random; at most
    `MAX_PAIRS`, at random.
    """
    if not len(masks):
        return torch.zeros(0, 2, dtype=torch.int64, device=mask_logits.device)
    truth = (
        F.interpolate(masks[None], size=mask_logits.shape[-2:], mode="bilinear", align_corners=False)[0] > 0.5
    )
    predicted, truth = (mask_logits > 0).flatten(1).float(), truth.flatten(1).float()
    common = predicted @ truth.T
    iou = common / (predicted.sum(1)[:, None] + truth.sum(1) - common).clamp(min=1)
    chance = torch.rand_like(iou).masked_fill(iou <= MIN_IOU, -1)
    best, query = chance.max(dim=0)
    found = (best >= 0).nonzero()[:, 0]
    found = found[torch.randperm(len(found), device=found.device)[:MAX_PAIRS]]
    return torch.stack([query[found], found], dim=1)


class MaskAdapterTrainer(ITATrainer):
    """Trains the mask adapter of a model; with `mixed`, on predicted masks, too. ValueError without an adapter."""

    def __init__(self, *, mixed: bool, **kwargs: Any) -> None:
        network = kwargs["model"]
        training = MaskAdapterTraining(network, mixed)
        super().__init__(**kwargs)
        if self.is_fsdp_enabled:
            raise ValueError("train_adapter does not work with FSDP's sharded weights: use DDP")
        # Each process reads the frozen weights from the same file: DDP need not broadcast them.
        training._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]
            name
            for name, tensor in (*training.named_parameters(), *training.named_buffers())
            if not tensor.requires_grad
        ]
        nothing = torch.zeros(1, 0, dtype=torch.int64, device=self.args.device)
        network.criterion.matches = Matches(nothing, nothing, [], 1)  # queries are not matched
        self.model = self.model_wrapped = training

    @property
    def network(self) -> Any:
        """The `ITAForOpenVocabSegmentation` whose adapter learns."""
        return super().network.network
