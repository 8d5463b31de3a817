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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ita_segmentation.checkpoints import load_checkpoint
from ita_segmentation.errors import ITAError
from ita_segmentation.evaluation.benchmarks import load_benchmark
from ita_segmentation.evaluation.evaluator import decode_sample
from ita_segmentation.evaluation.ita_predictor import ITAPredictor
from ita_segmentation.evaluation.scores import BenchmarkScores
from modeling_ita import normal_form
from modeling_ita.dominant_categories import ANY_CLASS

RANKS = (5, 10, 20)
SCORES = ("miou", "miou_seen", "miou_unseen", "pq", "pq_seen", "pq_unseen")
VARIANTS = ("computed", "true", "random", "none")
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


def query_classes(model: Any, outputs: Any, class_of: dict[str, int]) -> torch.Tensor | None:
    """Give the class that each query answers for, (1, Q); None where they answer for none."""
    if model.config.text_query_matching != "own_class":
        return None
    own = [class_of[normal_form(name)] for name in outputs.dominant_categories[0]]
    learned = outputs.class_queries_logits.shape[1] - len(own)
    return torch.tensor([own + [ANY_CLASS] * learned])


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
        [outputs.class_queries_logits],
        [outputs.masks_queries_logits],
        inputs["mask_labels"],
        labels,
        query_classes(model, outputs, class_of),
    )
    selected = outputs.dominant_categories[0]
    for query, target in zip(*(side[0].tolist() for side in matches.of(0)), strict=True):
        counts["matched"] += 1
        if query < len(selected):
            counts["text"] += 1
            counts["own"] += class_of.get(normal_form(selected[query])) == int(labels[0][target])


@dataclass
class VariantScores:
    """Scores with dominant categories from several sources.

    Attributes:
        scores: of each variant.
        seen: (K,) whether a class was seen in training.
        found: classes in images ("all"), and those among the first so many dominant categories, by (rank, seen).
        matches: matched queries, those that are text queries, and those matched to their own class.
    """

    scores: dict[str, BenchmarkScores]
    seen: list[bool]
    found: Counter[Any]
    matches: Counter[str]

    def table(self) -> dict[str, dict[str, float]]:
        """mIoU and PQ of each variant, over all, seen and unseen classes, 0..100."""
        rows = {}
        for name, scores in self.scores.items():
            semantic = scores.confusion.compute(self.seen)
            row = {key: semantic.get(key) for key in ("miou", "miou_seen", "miou_unseen")}
            if "panoptic" in scores.metrics:
                panoptic = scores.metrics["panoptic"].compute(self.seen)
                row |= {key: panoptic.get(key) for key in ("pq", "pq_seen", "pq_unseen")}
            rows[name] = {
                key: round(100 * float(value), 1) for key, value in row.items() if value is not None
            }
        return rows


def score_variants(
    model: Any,
    processor: Any,
    benchmark: Any,
    limit: int,
    seed: int,
    variants: Sequence[str] = VARIANTS,
) -> VariantScores:
    """Score a model with dominant categories from each source.

    Args:
        model: in eval mode.
        processor: its image processor.
        benchmark: images with labels.
        limit: number of images.
        seed: of the random categories.
        variants: some of `VARIANTS`, "computed" among them.
    """
    classes, seen = benchmark.classes, benchmark.seen or [True] * len(benchmark.classes)
    wrapped = WithDominantCategories(model)
    predictor = ITAPredictor(wrapped, processor, classes, benchmark.is_thing)
    class_of = {normal_form(name): index for index, names in enumerate(classes) for name in reversed(names)}
    k, names = model.config.num_dominant_categories, [synonyms[0] for synonyms in classes]
    chance = random.Random(seed)
    tasks = benchmark.tasks & TASKS
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
    return VariantScores(scores, seen, found, matches)


def print_tables(result: VariantScores) -> None:
    """Print both tables."""
    found, matches = result.found, result.matches
    print(f"| dominant categories | {' | '.join(f'recall at {rank}' for rank in RANKS)} |\n|{' --- |' * 4}")
    for group in (True, False):
        if total := found["all", group]:
            shares = " | ".join(f"{found[rank, group] / total:.3f}" for rank in RANKS)
            print(f"| {'seen' if group else 'unseen'} classes ({total}) | {shares} |")
    if matches["matched"]:
        own = matches["own"] / max(matches["text"], 1)
        print(
            f"\nOf {matches['matched']} matched queries {matches['text'] / matches['matched']:.1%} are text queries; "
            f"of those {own:.1%} match a segment of their own category.\n"
        )
    print("| dominant categories | mIoU | seen | unseen | PQ | PQ seen | PQ unseen |\n|" + " --- |" * 7)
    for name, row in result.table().items():
        cells = [f"{row[key]:.1f}" if key in row else "" for key in SCORES]
        print(f"| {name} | {' | '.join(cells)} |")


def benchmark_parser(description: str, limit: int) -> argparse.ArgumentParser:
    """Build a parser of the options that say which model and which images."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--benchmark", default="scenes", help="scenes, or a prepared benchmark in --data_dir")
    parser.add_argument("--data_dir", type=Path, default=Path("data"))
    parser.add_argument("--limit", type=int, default=limit, help="images")
    return parser


def load(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Load the model, its processor and the images that the options name, or end with one line that says why not."""
    try:
        model, processor = load_checkpoint(Path(arguments.model))
        return (
            model,
            processor,
            load_benchmark(arguments.benchmark, arguments.data_dir, limit=arguments.limit),
        )
    except ITAError as error:
        parser.error(str(error))


def main() -> None:
    parser = benchmark_parser(__doc__ or "", limit=80)
    parser.add_argument(
        "--source", choices=("features", "thumbnail", "cells"), help="in place of the checkpoint's"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random categories")
    arguments = parser.parse_args()
    model, processor, benchmark = load(parser, arguments)
    if arguments.source and arguments.source != "cells":  # which the options of text queries need
        model.config.text_query_matching, model.config.text_query_regions = "any", False
        model.config.text_query_class_bias = False
    if arguments.source:
        model.config.dominant_category_source = arguments.source
    if not model.config.num_dominant_categories:
        parser.error("this checkpoint has no dominant categories")
    with torch.inference_mode():
        print_tables(score_variants(model, processor, benchmark, arguments.limit, arguments.seed))


if __name__ == "__main__":
    main()
