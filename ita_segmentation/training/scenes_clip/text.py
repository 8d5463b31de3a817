"""The text tower of the small CLIP of Scenes: maps names, synonyms and captions to fixed vectors.

Trained together with the images, a tower takes a shortcut and learns the names of stuff and little else. Here it is
trained first and then locked (as in arXiv 2111.07991): each class of Scenes gets a fixed unit vector, as far from all
others as the width allows; every name of a class, alone or in a prompt template, maps to its vector; a caption that
names several classes maps to their normalized sum. Other names map to one more vector, that of "other".
"""

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OTHER_NAMES = ["other", "background", "thing", "something"]


def concept_vectors(num_concepts: int, width: int, seed: int = 0, steps: int = 150) -> Tensor:
    """Make (num_concepts, width) unit vectors far from each other: random ones, then descent on the largest cosines."""
    generator = torch.Generator().manual_seed(seed)
    vectors = F.normalize(torch.randn(num_concepts, width, generator=generator), dim=-1).requires_grad_(True)
    optimizer = torch.optim.Adam([vectors], lr=0.02)
    for _ in range(steps):
        unit = F.normalize(vectors, dim=-1)
        cosines = unit @ unit.T - torch.eye(num_concepts)
        optimizer.zero_grad()
        cosines.pow(4).sum().backward()
        optimizer.step()
    return F.normalize(vectors.detach(), dim=-1)


def caption_of(things: Sequence[str], stuff: Sequence[str]) -> str:
    """Write a sentence that names all things and stuff: "a cat, a dog and a cup on grass, sky"."""
    named = [f"a {name}" for name in things]
    sentence = " and ".join([", ".join(named[:-1]), named[-1]]) if len(named) > 1 else "".join(named)
    ground = ", ".join(stuff)
    return f"{sentence} on {ground}" if sentence and ground else sentence or ground


class CaptionSampler:
    """Draws prompts and captions with the classes that each one names; templates have one `{}`."""

    def __init__(self, classes: Sequence[Sequence[str]], is_thing: Sequence[bool], templates: Sequence[str]):
        self.classes = [list(names) for names in classes]
        self.things = [index for index, thing in enumerate(is_thing) if thing]
        self.stuff = [index for index, thing in enumerate(is_thing) if not thing]
        self.templates = ["{}", *templates]

    def name(self, concept: int, rng: random.Random) -> str:
        """Draw one of the concept's names; the first as often as all others together."""
        names = self.classes[concept]
        return names[0] if rng.random() < 0.5 else rng.choice(names)

    def prompt(self, concept: int, rng: random.Random) -> str:
        """Draw a name of the concept, alone or in a template."""
        template = "{}" if rng.random() < 0.2 else rng.choice(self.templates)
        return template.format(self.name(concept, rng))

    def caption(self, concepts: Sequence[int], rng: random.Random) -> str:
        """Write a sentence that names all concepts, things first."""
        stuff = set(self.stuff)
        return caption_of(
            [self.name(c, rng) for c in concepts if c not in stuff],
            [self.name(c, rng) for c in concepts if c in stuff],
        )

    def sample(self, rng: random.Random) -> tuple[str, list[int]]:
        """Draw a prompt of one concept or, two times in five, a caption of several; with its concepts."""
        if rng.random() < 0.6:
            concept = rng.randrange(len(self.classes))
            return self.prompt(concept, rng), [concept]
        concepts = rng.sample(self.things, min(rng.choice((1, 1, 2, 3, 4)), len(self.things)))
        concepts += rng.sample(self.stuff, min(rng.choice((0, 1, 1, 2)), len(self.stuff)))
        return self.caption(concepts, rng), concepts


@torch.no_grad()
def encode_names(
    encode_text: Callable[[Tensor], Tensor],
    tokenize: Callable[[list[str]], Tensor],
    classes: Sequence[Sequence[str]],
    templates: Sequence[str],
) -> Tensor:
    """Encode the K classes: names in all templates, normalized, averaged, normalized; (K, D) float32."""
    rows = []
    for names in classes:
        prompts = [template.format(name) for name in names for template in ("{}", *templates)]
        rows.append(F.normalize(F.normalize(encode_text(tokenize(prompts)).float(), dim=-1).mean(0), dim=-1))
    return torch.stack(rows)


def train_text_tower(
    text_tower: nn.Module,
    tokenize: Callable[[list[str]], Tensor],
    sampler: CaptionSampler,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train the tower on random prompts and captions to map them to their concepts' vectors.

    `text_tower` maps tokens (B, L) int64, as `tokenize` makes them of strings, to embeddings (B, D). Returns the loss
    (one minus the mean cosine) of each step, with which `on_step` is called.
    """
    rng = random.Random(seed)
    width = text_tower(tokenize(["other"])).shape[-1]
    vectors = concept_vectors(len(sampler.classes) + 1, width, seed)
    other = len(sampler.classes)
    used = set(
        tokenize([name for names in sampler.classes for name in names] + sampler.templates).unique().tolist()
    )
    vocabulary_size = len(text_tower.token_embedding.weight)  # type: ignore[union-attr, arg-type]
    end_token = int(tokenize(["other"]).max())

    decayed = [p for n, p in text_tower.named_parameters() if p.ndim > 1 and "embedding" not in n]
    plain = [p for n, p in text_tower.named_parameters() if not (p.ndim > 1 and "embedding" not in n)]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.1)

    losses = []
    text_tower.train()
    for step in range(steps):
        texts, targets, unknown = [], [], []
        for row in range(batch_size):
            if rng.random() < 0.06:
                texts.append(rng.choice(sampler.templates).format(rng.choice(OTHER_NAMES)))
                targets.append(vectors[other])
                if rng.random() < 0.7:
                    unknown.append(row)
                continue
            text, concepts = sampler.sample(rng)
            texts.append(text)
            targets.append(vectors[concepts].sum(0))
        tokens = tokenize(texts)
        # Other texts: any token that no name and no template uses, in place of "other".
        for row in unknown:
            for place in range(1, int((tokens[row] == end_token).nonzero()[0])):
                if int(tokens[row, place]) not in used:
                    token = rng.randrange(512, vocabulary_size - 2)
                    tokens[row, place] = token if token not in used else tokens[row, place]
        loss = 1 - F.cosine_similarity(text_tower(tokens), torch.stack(targets), dim=-1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(text_tower.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if on_step is not None:
            on_step(step, losses[-1])
    text_tower.eval()
    return losses


@torch.no_grad()
def synonym_accuracy(
    encode_text: Callable[[Tensor], Tensor],
    tokenize: Callable[[list[str]], Tensor],
    classes: Sequence[Sequence[str]],
    bank: Tensor,
) -> float:
    """Compute the share of all names whose nearest row of `bank` (K, D) is their own class."""
    names = [(name, index) for index, synonyms in enumerate(classes) for name in synonyms]
    embeddings = F.normalize(encode_text(tokenize([name for name, _ in names])), dim=-1)
    nearest = (embeddings @ bank.T).argmax(-1)
    return float((nearest == torch.tensor([index for _, index in names])).float().mean())
