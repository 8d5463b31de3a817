"""New class names for a frozen CLIP: their token embeddings are tuned on the dataset's masks.

CLIP's own prediction has a large weight in the result, and for a name that CLIP never read it is arbitrary. As in
textual inversion (Gal et al., arXiv 2208.01618) everything stays frozen but the embeddings of some tokens: those of the
new names that no kept name and no prompt template uses. So the embeddings of all other names stay bitwise the same. The
tokens are trained to classify the images' masks, pooled from CLIP's dense feature, among all names.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, send_to_device
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

from ita_segmentation.training.checkpoints import FROZEN
from ita_segmentation.training.pseudo_labels import PseudoLabeler
from modeling_ita import ITAForOpenVocabSegmentation
from modeling_ita.text import OTHER, Vocabulary

logger = logging.get_logger(__name__)

NUM_IMAGES, BATCH_SIZE = 100, 4  # number of augmented images that are used, and the size of their batches
STEPS, LEARNING_RATE = 100, 0.01


def images_to_use(length: int) -> list[int]:
    """Choose `NUM_IMAGES` indices evenly from a dataset of `length`, whose indices continue over epochs."""
    return [index * max(length, NUM_IMAGES) // NUM_IMAGES for index in range(NUM_IMAGES)]


def own_tokens(model: ITAForOpenVocabSegmentation, names: Iterable[str], others: Iterable[str]) -> list[int]:
    """List the tokens of `names` that neither `others`, a prompt template nor the name `other` use, in order."""
    tokenizer = model.clip_backbone.tokenizer

    def tokens_of(texts: Iterable[str]) -> set[int]:
        return {token for text in texts for token in tokenizer.encode(text)}

    templates = [template.format("") for template in model.config.templates]
    return sorted(tokens_of(names) - tokens_of([*others, *templates, OTHER]))


@torch.no_grad()
def region_embeddings(model: ITAForOpenVocabSegmentation, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Pool CLIP's embeddings of a training batch's masks as at inference.

    Returns unit embeddings (R, D) float32 of the masks that cover a cell, and their classes (R,) int64 on the CPU.
    """
    dense = model.clip_backbone(batch["pixel_values"]).dense.float()
    size = [side * model.config.dense_upsample for side in dense.shape[-2:]]
    dense = F.interpolate(dense, size=size, mode="bilinear", align_corners=False)
    embeddings = [dense.new_zeros(0, model.clip_backbone.embed_dim)]
    classes = [torch.zeros(0, dtype=torch.int64)]
    for image, (masks, labels) in enumerate(zip(batch["mask_labels"], batch["class_labels"], strict=True)):
        if not len(masks):
            continue
        cells = F.interpolate(masks[None].float(), size=size, mode="area") > 0.5
        covers = cells[0].flatten(1).any(1)
        pooled = model.clip_backbone.pool_masks(dense[image : image + 1], cells)[0]
        embeddings.append(F.normalize(pooled[covers].float(), dim=-1))
        classes.append(labels[covers].cpu())
    return torch.cat(embeddings), torch.cat(classes)


def tune_class_names(
    model: ITAForOpenVocabSegmentation, new: Vocabulary, labeler: PseudoLabeler, dataset: Any, collator: Any
) -> None:
    """Tune the token embeddings of a dataset's class names; the result is the same in all processes.

    Args:
        model: The model, changed in place.
        new: The dataset's trained classes, in the order of their labels.
        labeler: Labels the rest of the images, and has the classes that are kept.
        dataset: Of the training run; examples are taken by index, with their augmentation.
        collator: Of the training run.
    """
    device, found = model.clip_backbone.device, []
    indices = images_to_use(len(dataset))
    for start in logging.tqdm(range(0, len(indices), BATCH_SIZE), desc="tuning class names", unit="batch"):
        batch = collator([dataset[index] for index in indices[start : start + BATCH_SIZE]])
        batch = labeler.add_pseudo_labels(send_to_device(batch, device))
        found.append(region_embeddings(model, batch))
    regions, classes = (torch.cat(parts) for parts in zip(*found, strict=True))
    tune_tokens(model, new, labeler.classes, regions, classes)
    table = model.clip_backbone.text_tower.token_embedding.weight
    with torch.no_grad():
        table.copy_(broadcast(table.clone()))


@torch.no_grad()
def load_tuned_names(model: ITAForOpenVocabSegmentation, checkpoint: Path) -> None:
    """Load the token embeddings of a run's checkpoint."""
    table = model.clip_backbone.text_tower.token_embedding.weight
    name = next(name for name, weight in model.named_parameters() if weight is table)
    with safe_open(checkpoint / FROZEN, framework="pt") as file:
        table.copy_(file.get_tensor(name))


def tune_tokens(
    model: ITAForOpenVocabSegmentation, new: Vocabulary, kept: Vocabulary, regions: Tensor, classes: Tensor
) -> list[float]:
    """Tune the new names' own tokens so that CLIP classifies the regions; the kept names stay unchanged.

    `regions` are (R, D) unit embeddings, `classes` (R,) int64 of the new classes and then of the kept ones. Returns the
    loss of each step; none where there is nothing to tune.
    """
    backbone = model.clip_backbone
    tokens = own_tokens(model, new.names, kept.names)
    if not tokens or not len(regions):
        logger.warning(
            "no class name is tuned: the new names have no token of their own, or there are no masks"
        )
        return []
    others = model.encode_vocabulary(kept).prompt_embeds
    class_of_name = [*new.class_of_name, *(len(new) + index for index in kept.class_of_name)]
    prompts = [text.format(name) for name in new.names for text in ("{}", *model.config.templates)]
    prompt_tokens = backbone.tokenize(prompts)[0].to(backbone.device)
    rows = torch.tensor(tokens, device=backbone.device)
    table = backbone.text_tower.token_embedding
    moves = torch.zeros(len(rows), table.weight.shape[1], device=backbone.device, requires_grad=True)
    optimizer = torch.optim.Adam([moves], lr=LEARNING_RATE)
    scale, classes = backbone.logit_scale.detach(), classes.to(backbone.device)
    owners = torch.tensor(class_of_name, device=backbone.device).expand(len(regions), -1)
    losses: list[float] = []

    def move(module: Any, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        return output + (arguments[0][..., None] == rows).to(moves) @ moves

    handle = table.register_forward_hook(move)
    try:
        for _ in range(STEPS):
            embeds = F.normalize(backbone.encode_tokens(prompt_tokens), dim=-1)
            embeds = embeds.unflatten(0, (len(new.names), -1))
            loss = moves.new_zeros(())
            for name_embeds in (embeds[:, 0], F.normalize(embeds[:, 1:].mean(1), dim=-1)):
                similarity = regions @ torch.cat([name_embeds, others]).T
                best = similarity.new_full((len(regions), len(new) + len(kept)), -1.0)
                best = best.scatter_reduce(1, owners, similarity, "amax")
                loss = loss + F.cross_entropy(scale * best, classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()) / 2)
    finally:
        handle.remove()
    with torch.no_grad():
        table.weight[rows] += moves.to(table.weight.dtype)
    return losses
