"""The small CLIP of Scenes, trained from scratch: first the text tower, then an image tower that learns to match it.

This is locked-image tuning (arXiv 2111.07991) with the roles of the towers exchanged. An image trunk with BatchNorm
learns, by cross-entropy over the names of all classes and a contrastive loss within the batch (arXiv 2103.00020), first
from single things and textures at 64 px, then alternately from

* captioned images of all classes. A caption says what is in an image but not where: each cell of the dense feature must
  be one of the named classes, and each named class must be predicted by some cell;
* regions of scenes of *seen* classes, pooled over their masks, with the names of seen classes only.

So no mask of an unseen class is ever used; it is learned from captions alone. Towards the end BatchNorm's statistics
are measured again and then kept, so that training ends with the statistics that evaluation uses.
"""

import hashlib
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
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from ita_segmentation.data.scenes import SPLITS, object_image, scenes_vocabulary, stuff_image
from ita_segmentation.files import write_files
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
VALIDATION_SEED = SPLITS["validation"].seed
MAX_LOGIT_SCALE = 100.0


def build_clip(config: dict[str, Any]) -> CustomTextCLIP:
    """Build the untrained model of an open_clip configuration, with a logit scale of 15."""
    clip = CustomTextCLIP(**config)
    nn.init.constant_(clip.logit_scale, math.log(15.0))
    clip.visual.to(memory_format=torch.channels_last)
    return clip


def dense_embeddings(clip: CustomTextCLIP, pixel_values: Tensor) -> Tensor:
    """Embed each cell of the trunk's last stage: (B, 3, H, W) to (B, D, H / 32, W / 32).

    The head (average pool, projection without bias) is linear, so cells may be projected before they are pooled.
    """
    features = clip.visual.trunk.forward_features(pixel_values)
    return F.conv2d(features, clip.visual.head.proj.weight[:, :, None, None])


def pool_regions(cells: Tensor, weights: Tensor, images: Tensor) -> Tensor:
    """Average cells (B, D, h, w) over regions with weights (R, 4h, 4w) in images (R,): (R, D)."""
    fine = F.interpolate(cells, size=weights.shape[-2:], mode="bilinear", align_corners=False)
    pooled = torch.einsum("rdhw,rhw->rd", fine[images], weights)
    return pooled / weights.sum((1, 2)).clamp_min(1e-6)[:, None]


def caption_set_loss(log_probabilities: Tensor, named: Tensor) -> Tensor:
    """Ask that every cell shows one of the named classes and that each of them is shown somewhere.

    `log_probabilities` are (B, N, K) of N cells over K classes, `named` (B, K) bool. Returns the negative log
    probability that a cell has a named class, plus that the best cell of a class has it.
    """
    outside = log_probabilities.masked_fill(~named[:, None], -1e4)
    inside = -torch.logsumexp(outside, dim=-1).mean()
    best = log_probabilities.amax(1)
    return inside - (best * named).sum() / named.sum()


class ScenesClipTrainer:
    """Train and evaluate one model: call `train_text`, `train_vision`, `evaluate` and `save` in this order."""

    def __init__(self, recipe: ScenesClipRecipe):
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

    def train_text(
        self, folder: Path | None = None, on_step: Callable[[int, float], None] | None = None
    ) -> list[float]:
        """Train the text tower, lock it, and encode the classes; return the losses.

        A tower that was trained with the same classes and settings is reused from the folder, in which it is saved.
        """
        recipe, losses = self.recipe, []
        path = None if folder is None else folder / TEXT_NAME
        settings = [recipe.text_steps, recipe.text_batch_size, recipe.seed, recipe.text_learning_rate]
        content = json.dumps([self.vocabulary.classes, recipe.clip, *settings])
        trained_for = {"settings": hashlib.sha256(content.encode()).hexdigest()}
        if path is not None and _metadata(path) == trained_for:
            self.clip.text.load_state_dict(load_file(path))
        else:
            options = {"steps": recipe.text_steps, "batch_size": recipe.text_batch_size, "seed": recipe.seed}
            rate, tower = recipe.text_learning_rate, self.clip.text
            losses = train_text_tower(
                tower, self.tokenize, self.sampler, **options, learning_rate=rate, on_step=on_step
            )
            if path is not None:
                write_files({path: _safetensors(self.clip.text, trained_for)})
        self.clip.text.requires_grad_(False).eval()
        self.bank = encode_names(
            self.clip.encode_text, self.tokenize, self.vocabulary.classes, VILD_TEMPLATES
        )
        return losses

    # Losses

    def logit_scale(self) -> Tensor:
        """Compute the logit scale, at most 100."""
        return self.clip.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)

    def logits(self, embeddings: Tensor, bank: Tensor | None = None) -> Tensor:
        """Compute scaled cosines (..., K) of embeddings (..., D) with the class embeddings."""
        return self.logit_scale() * F.normalize(embeddings, dim=-1) @ (self.bank if bank is None else bank).T

    def captioned_loss(self, batch: CaptionedImages, dense: bool) -> Tensor:
        """Compute the losses of captioned images: names, captions and, if `dense`, cells."""
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
        """Draw a prompt for one class, or a caption for several."""
        return self.sampler.prompt(ids[0], self.rng) if len(ids) == 1 else self.sampler.caption(ids, self.rng)

    def region_loss(self, batch: Regions) -> Tensor:
        """Compute the cross-entropy of mask-pooled regions over the seen classes; refuses an unseen class."""
        if not self.seen[batch.class_ids].all():
            raise ValueError("a region batch contains an unseen class, whose masks must not be used")
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
        """Train the image tower; return the losses.

        `on_step` is called after each step with the share of the schedule done and the losses, `checkpoint` every
        `checkpoint_minutes`.
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
        decay = self.recipe.weight_decay
        groups = [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]
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
        """Measure BatchNorm's statistics on captioned images and seen scenes of all sizes, equally weighted."""
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
        """Measure zero-shot accuracy over all classes, in percent, on images of another seed.

        Single images (96 px) and mask-pooled segments of crowded scenes (`evaluation_size`; masks of 8 px cells,
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
        results: dict[str, Any] = {key: round(100 * sum(h) / len(h), 2) for key, h in sorted(hits.items())}
        results["num_regions"] = len(hits.get("region_thing", [])) + len(hits.get("region_stuff", []))
        classes = self.vocabulary.classes
        named = synonym_accuracy(self.clip.encode_text, self.tokenize, classes, self.bank)
        return results | {"synonyms": round(100 * named, 2)}

    def save(self, output: Path, results: dict[str, Any] | None = None) -> None:
        """Write the weights, the configuration and, if given, the results; all files or none."""
        files = {
            output / WEIGHTS_NAME: _safetensors(self.clip, {"format": "pt"}),
            output / CONFIG_NAME: _json(self.recipe.clip),
        }
        if results is not None:
            recipe = {key: value for key, value in asdict(self.recipe).items() if key != "clip"}
            files[output / RESULTS_NAME] = _json({**results, "recipe": recipe})
        write_files(files)


def load_clip(folder: Path) -> CustomTextCLIP:
    """Load the model that `ScenesClipTrainer.save` wrote, in eval mode."""
    clip = CustomTextCLIP(**json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")))
    clip.load_state_dict(load_file(folder / WEIGHTS_NAME))
    return clip.eval()


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _safetensors(module: nn.Module, metadata: dict[str, str]) -> bytes:
    state = {name: tensor.detach().clone().contiguous() for name, tensor in module.state_dict().items()}
    return save(state, metadata)


def _metadata(path: Path) -> dict[str, str] | None:
    """Read the metadata of a safetensors file; None if it is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata()
    except (OSError, SafetensorError):
        return None
