"""New words for a frozen CLIP: the token embeddings of a data set's names are moved to where its images are.

CLIP's own opinion has a large share in every answer, and of a name that it never read it is arbitrary. As in textual
inversion (Gal et al., arXiv 2208.01618) everything stays frozen but the embeddings of some tokens: those of the new
names that no name which is kept, and no prompt template, has. So other words keep their embeddings to the bit. They
are learned by classifying the images' masks, pooled from CLIP's dense feature, among all names.
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

from ita_segmentation.training.pseudo_labels import KeptVocabulary
from ita_segmentation.training.weights import FROZEN
from modeling_ita import ITAForOpenVocabSegmentation
from modeling_ita.vocabulary import OTHER, Vocabulary

logger = logging.get_logger(__name__)

NUM_IMAGES, BATCH_SIZE = 100, 4
"""So many augmented images are looked at."""
STEPS, LEARNING_RATE = 100, 0.01


def images_to_look_at(length: int) -> list[int]:
    """Indices of examples of a data set of `length`, whose indices count on over epochs; all of it, evenly."""
    return [index * max(length, NUM_IMAGES) // NUM_IMAGES for index in range(NUM_IMAGES)]


def own_tokens(model: ITAForOpenVocabSegmentation, names: Iterable[str], others: Iterable[str]) -> list[int]:
    """Tokens of `names` that neither `others`, a prompt template nor the word `other` have, in rising order."""
    tokenizer = model.clip_backbone.tokenizer

    def tokens_of(words: Iterable[str]) -> set[int]:
        return {token for word in words for token in tokenizer.encode(word)}

    templates = [template.format("") for template in model.config.templates]
    return sorted(tokens_of(names) - tokens_of([*others, *templates, OTHER]))


@torch.no_grad()
def region_embeddings(model: ITAForOpenVocabSegmentation, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """CLIP's unit embeddings (R, D) of a training batch's masks, pooled as at inference, and their classes (R,)."""
    dense = model.clip_backbone(batch["pixel_values"]).dense.float()
    size = [side * model.config.dense_upsample for side in dense.shape[-2:]]
    dense = F.interpolate(dense, size=size, mode="bilinear", align_corners=False)
    embeddings, classes = [dense.new_zeros(0, model.clip_backbone.embed_dim)], []
    for image, (masks, labels) in enumerate(zip(batch["mask_labels"], batch["class_labels"], strict=True)):
        if not len(masks):
            continue
        cells = F.interpolate(masks[None].float(), size=size, mode="area") > 0.5
        there = cells[0].flatten(1).any(1)
        pooled = model.clip_backbone.pool_masks(dense[image : image + 1], cells)[0]
        embeddings.append(F.normalize(pooled[there].float(), dim=-1))
        classes.append(labels[there])
    return torch.cat(embeddings), torch.cat([torch.zeros(0, dtype=torch.int64), *(c.cpu() for c in classes)])


def learn_words_of(
    dataset: Any, collator: Any, kept: KeptVocabulary, model: ITAForOpenVocabSegmentation, new: Vocabulary
) -> None:
    """Teaches the model the words of a data set, the same in all processes.

    Args:
        dataset, collator: of the training run; examples are taken by index, and their augmentation with them.
        kept: what labels the rest of the images.
        new: classes of the data set, in the order of its training labels.
    """
    device, found = model.clip_backbone.device, []
    indices = images_to_look_at(len(dataset))
    for start in logging.tqdm(range(0, len(indices), BATCH_SIZE), desc="learning words", unit="batch"):
        batch = collator([dataset[index] for index in indices[start : start + BATCH_SIZE]])
        found.append(region_embeddings(model, kept.complete(send_to_device(batch, device))))
    regions, classes = (torch.cat(parts) for parts in zip(*found, strict=True))
    learn_words(model, new, kept.classes, regions, classes)
    table = model.clip_backbone.text_tower.token_embedding.weight
    with torch.no_grad():
        table.copy_(broadcast(table.clone()))


@torch.no_grad()
def take_words(model: ITAForOpenVocabSegmentation, checkpoint: Path) -> None:
    """The words as a run had learned them, from one of its checkpoints."""
    table = model.clip_backbone.text_tower.token_embedding.weight
    name = next(name for name, weight in model.named_parameters() if weight is table)
    with safe_open(checkpoint / FROZEN, framework="pt") as file:
        table.copy_(file.get_tensor(name))


def learn_words(
    model: ITAForOpenVocabSegmentation, new: Vocabulary, kept: Vocabulary, regions: Tensor, classes: Tensor
) -> list[float]:
    """Moves the new names' own tokens so that CLIP tells the regions apart; returns the losses.

    Args:
        new: classes whose names are learned. kept: classes that stay as they are.
        regions: (R, D) unit embeddings. classes: (R,) int64, of the new ones and then of those kept.
    """
    backbone = model.clip_backbone
    tokens = own_tokens(model, new.names, kept.names)
    if not tokens or not len(regions):
        logger.warning(
            "no word is learned: the new names have no token of their own, or no mask is in the images"
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
            prompted = F.normalize(backbone.encode_tokens(prompt_tokens), dim=-1)
            prompted = prompted.unflatten(0, (len(new.names), -1))
            loss = moves.new_zeros(())
            for words in (prompted[:, 0], F.normalize(prompted[:, 1:].mean(1), dim=-1)):
                similarity = regions @ torch.cat([words, others]).T
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
