"""The rows of docs/ablation.md: small networks on Scenes, each trained on the same images with the same frozen CLIP.

    python benchmarks/ablation.py --clip models/ita-tiny --rows fc-clip ita ita-own-class --seeds 0 1 2

The CLIP is frozen, so its features of the training images are computed once, in half precision, and every row and seed
learns from them. A seed decides initial weights and the order of images. Scores are of validation images of the same
size: with dominant categories as computed, the true ones, random ones and none. A line of JSON for each run goes to
`OUTPUT/results.jsonl`.
"""

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from dominant_categories import VARIANTS, score_variants

from ita_segmentation.checkpoints import load_checkpoint
from ita_segmentation.data.scenes import scenes_dataset
from ita_segmentation.data.training.classes import scenes_classes
from ita_segmentation.data.training.examples import ScenesTraining
from ita_segmentation.errors import ITAError
from ita_segmentation.evaluation.benchmarks import load_benchmark
from modeling_ita import ITAConfig, ITAForOpenVocabSegmentation, normalize_vocabulary

SIZE, BATCH, LEARNING_RATE, WARMUP = 128, 8, 1.4e-3, 60
NETWORK = {
    "hidden_dim": 64,
    "mask_dim": 64,
    "num_attention_heads": 4,
    "encoder_layers": 2,
    "encoder_ffn_dim": 256,
    "decoder_layers": 3,
    "decoder_ffn_dim": 256,
    "dense_upsample": 4,
    "train_num_points": 512,
    "ensemble_alpha": 0.6,
    "ensemble_beta": 0.95,
}
CELLS = {"dominant_category_source": "cells"}
OWN_CLASS = CELLS | {"text_query_matching": "own_class", "text_query_class_bias": True}
GROUNDED = OWN_CLASS | {"text_query_regions": True}
ROWS: dict[str, dict[str, Any]] = {
    "fc-clip": {
        "num_dominant_categories": 0,
        "num_learned_queries": 40,
        "decoder_self_attention": True,
    },
    "no-self-attention": {"num_dominant_categories": 0, "num_learned_queries": 40},
    "dcu": {"decoder_self_attention": True},
    "ita": {},
    "ita-cells": CELLS,
    "ita-bias-regions": CELLS | {"text_query_class_bias": True, "text_query_regions": True},
    "ita-matching-bias": OWN_CLASS,
    "ita-own-class-20": GROUNDED,
    "ita-own-class": GROUNDED | {"num_dominant_categories": 10, "num_learned_queries": 30},
}


class CachedFeatures:
    """CLIP's features and the labels of training images, in memory-mapped files of a folder."""

    def __init__(self, model: Any, processor: Any, folder: Path, num_images: int):
        self.folder, self.num_images = folder, num_images
        if not (folder / "labels.pt").is_file():
            self._write(model, processor)
        self.labels = torch.load(folder / "labels.pt", weights_only=True)
        self.levels = [np.load(folder / f"level{index}.npy", mmap_mode="r") for index in range(4)]

    def _write(self, model: Any, processor: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        images, labels = ScenesTraining(seed=0, size=SIZE), []
        files: list[np.ndarray] = []
        for index in range(self.num_images):
            example = images[index]
            inputs = processor(images=[example["image"]], do_resize=False, return_tensors="pt")
            with torch.inference_mode():
                levels = model.clip_backbone(inputs["pixel_values"]).levels
            if not files:
                files = [
                    np.lib.format.open_memmap(
                        self.folder / f"level{number}.npy",
                        mode="w+",
                        dtype=np.float16,
                        shape=(self.num_images, *level.shape[1:]),
                    )
                    for number, level in enumerate(levels)
                ]
            for file, level in zip(files, levels, strict=True):
                file[index] = level[0].half().numpy()
            labels.append((example["mask_labels"].bool(), example["class_labels"]))
        torch.save(labels, self.folder / "labels.pt")

    def of(self, indices: list[int]) -> SimpleNamespace:
        """Give features as the image tower does."""
        levels = [torch.from_numpy(level[indices]).float() for level in self.levels]
        return SimpleNamespace(levels=levels, dense=levels[-1])


def build(row: str, source: Any, seed: int) -> ITAForOpenVocabSegmentation:
    """Build a row's network on the CLIP of `source`."""
    queries = {"num_dominant_categories": 20, "num_learned_queries": 20}
    config = ITAConfig(
        clip_model_config=source.config.clip_model_config,
        templates=source.config.templates,
        train_vocabulary=[list(names) for names in normalize_vocabulary(scenes_classes().seen_classes)],
        **NETWORK | queries | ROWS[row],
    )
    prefix = "clip_backbone.clip."
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in source.state_dict().items()
        if name.startswith(prefix)
    }
    torch.manual_seed(seed)
    model = ITAForOpenVocabSegmentation.from_clip(config, weights)
    model.clip_backbone.freeze()
    return model


def train(model: Any, features: CachedFeatures, steps: int, seed: int) -> None:
    """Train on cached features: AdamW, cosine schedule, gradient clipping as in recipes/scenes_ita_tiny.yaml."""
    vocabulary = normalize_vocabulary(scenes_classes().seen_classes)
    order = np.random.RandomState(seed).permutation(features.num_images)
    learning = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    plain = [
        weight
        for name, weight in learning.items()
        if weight.ndim < 2 or "quer" in name or "embedding" in name
    ]
    kept = {id(weight) for weight in plain}
    decayed = [weight for weight in learning.values() if id(weight) not in kept]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    encode = model.clip_backbone.forward
    pixels = torch.zeros(BATCH, 3, SIZE, SIZE)
    model.train()
    for step in range(steps):
        indices = [int(order[(step * BATCH + item) % len(order)]) for item in range(BATCH)]
        model.clip_backbone.forward = lambda _, indices=indices: features.of(indices)
        masks, classes = zip(*(features.labels[index] for index in indices), strict=True)
        output = model(pixels, vocabulary=vocabulary, mask_labels=list(masks), class_labels=list(classes))
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(learning.values(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if not (step + 1) % 100:
            print(f"step {step + 1}/{steps}  loss {float(output.loss.detach()):.2f}", flush=True)
    model.clip_backbone.forward = encode
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clip", default="models/ita-tiny", help="a checkpoint with the frozen CLIP")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--images", type=int, default=9600, help="training images, 0.25 MB each on disk")
    parser.add_argument("--limit", type=int, default=150, help="validation images")
    parser.add_argument("--output", type=Path, default=Path("outputs/ablation"))
    arguments = parser.parse_args()
    try:
        source, processor = load_checkpoint(Path(arguments.clip))
    except ITAError as error:
        parser.error(str(error))
    features = CachedFeatures(
        source, processor, arguments.output / f"features-{arguments.images}", arguments.images
    )
    images = scenes_dataset("validation", num_images=arguments.limit, size=SIZE)
    benchmark = dataclasses.replace(
        load_benchmark("scenes", limit=1), rows=lambda: images, num_images=arguments.limit
    )
    processor.do_resize = False
    for seed in arguments.seeds:
        for row in arguments.rows:
            start, model = time.monotonic(), build(row, source, seed)
            train(model, features, arguments.steps, seed)
            variants = VARIANTS if model.config.num_dominant_categories else VARIANTS[:1]
            with torch.inference_mode():
                scores = score_variants(
                    model, processor, benchmark, arguments.limit, seed=0, variants=variants
                )
            minutes = round((time.monotonic() - start) / 60, 1)
            result = {
                "row": row,
                "seed": seed,
                "steps": arguments.steps,
                "minutes": minutes,
                "scores": scores.table(),
            }
            with (arguments.output / "results.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
