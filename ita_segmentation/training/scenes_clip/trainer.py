"""The small CLIP of Scenes, trained from scratch: text tower first, then an image tower that learns to meet it.

The road is that of locked-text tuning turned around (arXiv 2111.07991): `scenes_clip_text` gives every concept a
place; here a trunk with BatchNorm learns, by cross-entropy over the names of all classes and a contrastive loss
within the batch (arXiv 2103.00020), first single things and textures at 64 px, then in turn

* captioned images of all classes. A caption says what is there and not where: each cell of the dense feature must
  be one of the named classes, and each named class must be the answer of some cell;
* regions of scenes of *seen* classes, pooled over their masks, against the seen names alone.

So no mask of an unseen class is ever used, and nothing but its captions teaches it. Towards the end BatchNorm's
statistics are measured anew and then kept, so that training ends with what evaluation computes.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CustomTextCLIP
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ita_segmentation.data.scenes import object_image, scenes_vocabulary, stuff_image
from ita_segmentation.training.scenes_clip.images import (
    CaptionedImages,
    ImageSource,
    Regions,
    to_pixel_values,
)
from ita_segmentation.training.scenes_clip.recipe import ScenesClipRecipe
from ita_segmentation.training.scenes_clip.text import (
    CaptionSampler,
    encode_names,
    synonym_accuracy,
    train_text_tower,
)
from modeling_ita.configuration_ita import VILD_TEMPLATES

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
RESULTS_NAME = "results.json"
TEXT_NAME = "text_tower.safetensors"
VALIDATION_SEED = 1_000_003
MAX_LOGIT_SCALE = 100.0


def build_clip(config: dict[str, Any]) -> CustomTextCLIP:
    """The untrained model of an open_clip configuration, its logit scale at 15."""
    clip = CustomTextCLIP(**config)
    nn.init.constant_(clip.logit_scale, math.log(15.0))
    clip.visual.to(memory_format=torch.channels_last)
    return clip


def dense_embeddings(clip: CustomTextCLIP, pixel_values: Tensor) -> Tensor:
    """(B, 3, H, W) -> the embedding of each cell of the trunk's last stage, (B, D, H / 32, W / 32).

    The head (average pool, linear projection without bias) is linear, so projecting cells first and pooling them
    after gives the embedding of the pooled cells.
    """
    features = clip.visual.trunk.forward_features(pixel_values)
    return F.conv2d(features, clip.visual.head.proj.weight[:, :, None, None])


def pool_regions(cells: Tensor, weights: Tensor, images: Tensor) -> Tensor:
    """Cells (B, D, h, w) averaged over regions: weights (R, 4h, 4w), images (R,) -> (R, D)."""
    fine = F.interpolate(cells, size=weights.shape[-2:], mode="bilinear", align_corners=False)
    pooled = torch.einsum("rdhw,rhw->rd", fine[images], weights)
    return pooled / weights.sum((1, 2)).clamp_min(1e-6)[:, None]


def caption_set_loss(log_probabilities: Tensor, named: Tensor) -> Tensor:
    """Where the caption's things are is not known; that every cell shows one, and each shows somewhere, is.

    Args:
        log_probabilities: (B, N, K) of N cells over K classes.
        named: (B, K) bool, the classes that the caption names.

    Returns:
        Scalar: minus log probability that a cell is of a named class, plus that the best cell of a class is of it.
    """
    outside = log_probabilities.masked_fill(~named[:, None], -1e4)
    inside = -torch.logsumexp(outside, dim=-1).mean()
    best = log_probabilities.amax(1)
    return inside - (best * named).sum() / named.sum()


class ScenesClipTrainer:
    """Trains and measures one model; `train_text`, `train_vision`, `evaluate`, `save`, in this order."""

    def __init__(self, recipe: ScenesClipRecipe):
        recipe.check()
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.vocabulary = scenes_vocabulary()
        self.clip = build_clip(recipe.clip)
        self.tokenize = SimpleTokenizer(context_length=self.clip.context_length)
        self.sampler = CaptionSampler(self.vocabulary.classes, self.vocabulary.is_thing, VILD_TEMPLATES)
        self.rng = random.Random(recipe.seed)
        self.seen = torch.tensor(self.vocabulary.seen)
        self.bank = torch.empty(0)
        self.images_seen = 0
        self.steps = 0
        self.frozen_statistics = False

    # Text

    def train_text(self, on_step: Callable[[int, float], None] | None = None) -> list[float]:
        """Trains the text tower, locks it, and encodes the classes; returns the losses."""
        losses = train_text_tower(
            self.clip.text,
            self.tokenize,
            self.sampler,
            steps=self.recipe.text_steps,
            batch_size=self.recipe.text_batch_size,
            learning_rate=self.recipe.text_learning_rate,
            seed=self.recipe.seed,
            on_step=on_step,
        )
        self.lock_text()
        return losses

    def load_text(self, path: Path) -> None:
        """Takes a text tower trained before instead."""
        self.clip.text.load_state_dict(load_file(path))
        self.lock_text()

    def lock_text(self) -> None:
        """Freezes the text tower and encodes the classes."""
        self.clip.text.requires_grad_(False).eval()
        self.bank = encode_names(
            self.clip.encode_text, self.tokenize, self.vocabulary.classes, VILD_TEMPLATES
        )

    # Losses

    def logit_scale(self) -> Tensor:
        return self.clip.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)

    def logits(self, embeddings: Tensor, bank: Tensor | None = None) -> Tensor:
        """(..., D) -> (..., K) scaled cosines with the class rows."""
        return self.logit_scale() * F.normalize(embeddings, dim=-1) @ (self.bank if bank is None else bank).T

    def captioned_loss(self, batch: CaptionedImages, dense: bool) -> Tensor:
        """Name, caption and, if `dense`, cell losses of captioned images."""
        cells = dense_embeddings(self.clip, batch.pixel_values)
        pooled = cells.mean((2, 3))
        named = torch.zeros(len(batch.named), len(self.vocabulary.classes))
        target = torch.zeros_like(named)
        for row, ids in enumerate(batch.named):
            named[row, ids] = 1.0
            target[row, ids] = 1.0 / len(ids)
            if batch.single[row] and len(ids) > 1:
                target[row, ids] = 0.15 / (len(ids) - 1)
                target[row, ids[0]] = 0.85
        loss = F.cross_entropy(self.logits(pooled), target)
        captions = [self.caption(ids) for ids in batch.named]
        with torch.no_grad():
            texts = F.normalize(self.clip.encode_text(self.tokenize(captions)), dim=-1)
        similarity = self.logits(pooled, texts)
        same = (named @ named.T == named.sum(1)) & (named @ named.T == named.sum(1)[:, None])
        share = same / same.sum(1, keepdim=True)
        contrast = F.cross_entropy(similarity, share) + F.cross_entropy(similarity.T, share)
        loss = loss + self.recipe.caption_weight * contrast / 2
        if dense:
            log_probabilities = F.log_softmax(self.logits(cells.flatten(2).transpose(1, 2)), dim=-1)
            loss = loss + self.recipe.dense_weight * caption_set_loss(log_probabilities, named > 0)
        return loss

    def caption(self, ids: list[int]) -> str:
        return self.sampler.prompt(ids[0], self.rng) if len(ids) == 1 else self.sampler.caption(ids, self.rng)

    def region_loss(self, batch: Regions) -> Tensor:
        """Cross-entropy of mask-pooled regions of seen classes over the seen names.

        Raises:
            ValueError: the batch holds a region of an unseen class.
        """
        if not self.seen[batch.class_ids].all():
            raise ValueError("a region batch holds an unseen class, whose masks must not be used")
        embeddings = pool_regions(
            dense_embeddings(self.clip, batch.pixel_values), batch.weights, batch.images
        )
        logits = self.logits(embeddings).masked_fill(~self.seen, float("-inf"))
        return F.cross_entropy(logits, batch.class_ids)

    # Training

    def train_vision(
        self,
        on_step: Callable[[float, dict[str, float]], None] | None = None,
        checkpoint: Callable[[], None] | None = None,
        checkpoint_minutes: float = 5.0,
    ) -> list[float]:
        """Trains the image tower; returns the losses.

        Args:
            on_step: called after each step with the share of the schedule done and what was measured.
            checkpoint: called every `checkpoint_minutes`.
        """
        recipe = self.recipe
        optimizer = self._optimizer()
        source = ImageSource(recipe.seed)
        start = saved = time.monotonic()
        losses: list[float] = []
        while True:
            elapsed = time.monotonic() - start
            done = max(elapsed / (60 * recipe.minutes), len(losses) / recipe.max_steps)
            if done >= 1:
                break
            if done >= recipe.fixed_statistics_from and not self.frozen_statistics:
                self.calibrate(source)
                self.frozen_statistics = True
            self.clip.visual.train(not self.frozen_statistics)
            ramp = done / recipe.warmup if done < recipe.warmup else 1.0
            cosine = 0.5 * (1 + math.cos(math.pi * max(done - recipe.warmup, 0) / (1 - recipe.warmup)))
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * max(min(ramp, cosine), 1e-3)

            kind, loss = self._step_loss(source, done)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.clip.visual.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
            self.steps += 1
            if on_step is not None:
                on_step(done, {kind: losses[-1], "scale": float(self.logit_scale().detach())})
            if checkpoint is not None and time.monotonic() - saved > 60 * checkpoint_minutes:
                checkpoint()
                saved = time.monotonic()
        if not self.frozen_statistics:
            self.calibrate(source)
        self.clip.eval()
        return losses

    def _optimizer(self) -> torch.optim.AdamW:
        named = [*self.clip.visual.named_parameters(), ("logit_scale", self.clip.logit_scale)]
        decayed = [p for _, p in named if p.ndim > 1]
        plain = [p for _, p in named if p.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": self.recipe.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.recipe.learning_rate, betas=(0.9, 0.98))

    def _step_loss(self, source: ImageSource, done: float) -> tuple[str, Tensor]:
        recipe = self.recipe
        if done < recipe.single_share:
            batch = source.singles(recipe.batch_size(size := self.rng.choice(recipe.single_sizes)), size)
            self.images_seen += len(batch.named)
            return "single", self.captioned_loss(batch, dense=False)
        if self.steps % 2:
            batch = source.captioned(recipe.batch_size(size := self.rng.choice(recipe.captioned_sizes)), size)
            self.images_seen += len(batch.named)
            return "captioned", self.captioned_loss(batch, dense=True)
        regions = source.regions(recipe.batch_size(size := self.rng.choice(recipe.region_sizes)), size)
        self.images_seen += len(regions.pixel_values)
        return "regions", self.region_loss(regions)

    @torch.no_grad()
    def calibrate(self, source: ImageSource) -> None:
        """Measures BatchNorm's statistics over captioned images and seen scenes of all sizes, each alike."""
        norms = [m for m in self.clip.visual.modules() if isinstance(m, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        self.clip.visual.train()
        for number in range(self.recipe.calibration_batches):
            sizes = self.recipe.region_sizes if number % 2 else self.recipe.captioned_sizes
            size = sizes[number // 2 % len(sizes)]
            draw = source.regions if number % 2 else source.captioned
            self.clip.visual(draw(self.recipe.batch_size(size), size).pixel_values)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        self.clip.visual.eval()

    # Measuring and saving

    @torch.no_grad()
    def evaluate(self, images: int | None = None) -> dict[str, float | int]:
        """Zero-shot accuracy over all names of the vocabulary, in percent, on images of a seed of their own.

        Single images (96 px) and mask-pooled segments of crowded scenes (`evaluation_size`, masks at 8 px cells
        thresholded at one half as the segmenter's classifier does with `dense_upsample=4`).
        """
        self.clip.visual.eval()
        images = images or self.recipe.evaluation_images
        hits: dict[str, list[bool]] = {}
        is_thing, seen = self.vocabulary.is_thing, self.vocabulary.seen

        def count(kind: str, embeddings: Tensor, class_ids: list[int]) -> None:
            for answer, truth in zip(self.logits(embeddings).argmax(-1).tolist(), class_ids, strict=True):
                group = "thing" if is_thing[truth] else "stuff"
                for key in (f"{kind}_{group}", f"{kind}_{group}_{'seen' if seen[truth] else 'unseen'}"):
                    hits.setdefault(key, []).append(answer == truth)

        for draw, share in ((object_image, 1.0), (stuff_image, 0.4)):
            for start in range(0, int(images * share), 50):
                drawn = [draw(VALIDATION_SEED, start + i, 96, "all") for i in range(50)]
                embeddings = self.clip.encode_image(to_pixel_values([p.image for p in drawn]))
                count("single", embeddings, [p.class_id for p in drawn])
        source = ImageSource(VALIDATION_SEED)
        for _ in range(0, images, 10):
            regions = source.regions(10, self.recipe.evaluation_size, classes="all")
            hard = (regions.weights > 0.5).float()
            weights = torch.where(hard.sum((1, 2), keepdim=True) > 0, hard, regions.weights)
            cells = dense_embeddings(self.clip, regions.pixel_values)
            count("region", pool_regions(cells, weights, regions.images), regions.class_ids.tolist())
        results: dict[str, float | int] = {
            key: round(100 * sum(h) / len(h), 2) for key, h in sorted(hits.items())
        }
        results["num_regions"] = len(hits.get("region_thing", [])) + len(hits.get("region_stuff", []))
        results["synonyms"] = round(
            100 * synonym_accuracy(self.clip.encode_text, self.tokenize, self.vocabulary.classes, self.bank),
            2,
        )
        return results

    def save(self, output: Path, results: dict[str, Any] | None = None) -> None:
        """Writes the configuration, the weights and, if given, the results; each file whole or not at all."""
        output.mkdir(parents=True, exist_ok=True)
        state = {
            name: tensor.detach().clone().contiguous() for name, tensor in self.clip.state_dict().items()
        }
        _replace(output / WEIGHTS_NAME, lambda path: save_file(state, path, metadata={"format": "pt"}))
        _replace(output / CONFIG_NAME, lambda path: _write_json(path, self.recipe.clip))
        if results is not None:
            recipe = {key: value for key, value in asdict(self.recipe).items() if key != "clip"}
            _replace(output / RESULTS_NAME, lambda path: _write_json(path, {**results, "recipe": recipe}))


def load_clip(folder: Path) -> CustomTextCLIP:
    """The model that `ScenesClipTrainer.save` wrote, in eval mode; every tensor must fit."""
    clip = CustomTextCLIP(**json.loads((folder / CONFIG_NAME).read_text()))
    clip.load_state_dict(load_file(folder / WEIGHTS_NAME))
    return clip.eval()


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Writes beside `path`, then moves the finished file into place."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    partial.replace(path)
