"""What dominant categories do for a checkpoint: are the right ones selected, and are they used?

    python benchmarks/dominant_categories.py --model models/ita-tiny --limit 80
    python benchmarks/dominant_categories.py --model MODEL --benchmark ade20k-150 --data_dir data

Prints two Markdown tables. The first: of the classes in an image, the share that is among the k dominant categories; of
the queries that match a ground-truth segment (as in training), the share that are text queries, and of those the share
whose own category is the segment's. The second: scores with the dominant categories as computed, with the true ones of
each image, with random ones and with none. Where true ones score no better than random ones, the text queries carry
nothing.
"""

import argparse
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ita_segmentation.checkpoints import load_checkpoint
from ita_segmentation.evaluation.benchmarks import load_benchmark
from ita_segmentation.evaluation.evaluator import decode_sample
from ita_segmentation.evaluation.ita_predictor import ITAPredictor
from ita_segmentation.evaluation.scores import BenchmarkScores
from modeling_ita import normal_form

RANKS = (5, 10, 20)
TASKS = frozenset({"semantic", "panoptic"})


class WithDominantCategories:
    """A model whose calls get the dominant categories in `given`; it keeps the last output."""

    def __init__(self, model: Any):
        self.model = model
        self.given: list[list[str]] | None = None
        self.outputs: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, **inputs: Any) -> Any:
        self.outputs = self.model(**inputs, dominant_categories=self.given)
        return self.outputs


def true_classes(sample: dict[str, Any], ignore_index: int) -> list[int]:
    """The classes that have a pixel in an image, the largest first."""
    labels, counts = np.unique(sample["label"], return_counts=True)
    order = np.argsort(-counts)
    return [int(label) for label in labels[order] if label != ignore_index]


def count_matches(
    model: Any, processor: Any, sample: dict[str, Any], class_of: dict[str, int], counts: Counter
):
    """Match queries to the image's segments as training does, and count the text queries among them."""
    segments = {one["id"]: one["category_id"] for one in sample["segments"]}
    if not segments:
        return
    inputs = processor(
        images=[sample["image"]],
        segmentation_maps=[sample["panoptic"]],
        instance_id_to_semantic_id=segments,
        ignore_index=0,
        return_tensors="pt",
    )
    outputs, labels = model.outputs, inputs["class_labels"]
    matches = model.criterion.match(
        [outputs.class_queries_logits], [outputs.masks_queries_logits], inputs["mask_labels"], labels
    )
    selected = outputs.dominant_categories[0]
    for query, target in zip(*(side[0].tolist() for side in matches.of(0)), strict=True):
        counts["matched"] += 1
        if query < len(selected):
            counts["text"] += 1
            counts["own"] += class_of.get(normal_form(selected[query])) == int(labels[0][target])


def diagnose(model: Any, processor: Any, benchmark: Any, limit: int, seed: int) -> None:
    """Print both tables."""
    classes, seen = benchmark.classes, benchmark.seen or [True] * len(benchmark.classes)
    wrapped = WithDominantCategories(model)
    predictor = ITAPredictor(wrapped, processor, classes, benchmark.is_thing)
    class_of = {normal_form(name): index for index, names in enumerate(classes) for name in reversed(names)}
    k, names = model.config.num_dominant_categories, [synonyms[0] for synonyms in classes]
    chance = random.Random(seed)
    tasks = benchmark.tasks & TASKS
    variants = ("computed", "true", "random", "none")
    scores = {
        name: BenchmarkScores(len(classes), benchmark.ignore_index, benchmark.is_thing, tasks)
        for name in variants
    }
    found, matches = Counter[Any](), Counter[str]()
    for index, row in zip(range(limit), benchmark.rows(), strict=False):
        sample = decode_sample(benchmark, row)
        true = true_classes(sample, benchmark.ignore_index)
        given: dict[str, list[list[str]] | None] = {
            "computed": None,
            "true": [[names[label] for label in true[:k]]],
            "random": [chance.sample(names, min(k, len(names)))],
            "none": [[]],
        }
        for name in variants:
            wrapped.given = given[name]
            prediction = predictor([sample["image"]], [sample["label"].shape], tasks)[0]
            scores[name].update(index, sample, prediction)
            if name == "computed":
                ranked = [class_of.get(normal_form(one)) for one in wrapped.outputs.dominant_categories[0]]
                for label in true:
                    found["all", seen[label]] += 1
                    for rank in RANKS:
                        found[rank, seen[label]] += label in ranked[:rank]
                if "panoptic" in tasks:
                    count_matches(wrapped, processor, sample, class_of, matches)
    groups = [group for group in (True, False) if found["all", group]]
    print(f"| dominant categories | {' | '.join(f'recall at {rank}' for rank in RANKS)} |\n|{' --- |' * 4}")
    for group in groups:
        shares = (f"{found[rank, group] / found['all', group]:.3f}" for rank in RANKS)
        print(f"| {'seen' if group else 'unseen'} classes ({found['all', group]}) | {' | '.join(shares)} |")
    if matches["matched"]:
        own = matches["own"] / max(matches["text"], 1)
        print(
            f"\nOf {matches['matched']} matched queries {matches['text'] / matches['matched']:.1%} are text queries; "
            f"of those {own:.1%} match a segment of their own category.\n"
        )
    print("| dominant categories | mIoU | seen | unseen | PQ | PQ seen | PQ unseen |\n|" + " --- |" * 7)
    for name in variants:
        semantic = scores[name].confusion.compute(seen)
        row = [semantic["miou"], semantic.get("miou_seen"), semantic.get("miou_unseen")]
        if "panoptic" in tasks:
            panoptic = scores[name].metrics["panoptic"].compute(seen)
            row += [panoptic["pq"], panoptic.get("pq_seen"), panoptic.get("pq_unseen")]
        cells = ("" if value is None else f"{100 * value:.1f}" for value in [*row, *[None] * (6 - len(row))])
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--benchmark", default="scenes", help="scenes, or a prepared benchmark in --data_dir")
    parser.add_argument("--data_dir", type=Path, default=Path("data"))
    parser.add_argument("--limit", type=int, default=80, help="images")
    parser.add_argument(
        "--source", choices=("features", "thumbnail", "cells"), help="in place of the checkpoint's"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random categories")
    arguments = parser.parse_args()
    model, processor = load_checkpoint(Path(arguments.model))
    if arguments.source:
        model.config.dominant_category_source = arguments.source
    if not model.config.num_dominant_categories:
        parser.error("this checkpoint has no dominant categories")
    benchmark = load_benchmark(arguments.benchmark, arguments.data_dir, limit=arguments.limit)
    with torch.inference_mode():
        diagnose(model, processor, benchmark, arguments.limit, arguments.seed)


if __name__ == "__main__":
    main()
