"""The images that a model did worst and best on, as a person would look at them."""

from __future__ import annotations

import numpy as np

from ita_segmentation.evaluation.benchmarks import Benchmark
from ita_segmentation.evaluation.evaluator import decoded
from ita_segmentation.evaluation.predictors import Predictor
from ita_segmentation.evaluation.reporting.examples import ExampleImage, example_image
from ita_segmentation.evaluation.scores import BenchmarkScores


def worst_and_best(
    predictor: Predictor, benchmark: Benchmark, scores: BenchmarkScores, count: int
) -> list[ExampleImage]:
    """The `count` images of the lowest and of the highest mean IoU, predicted once more.

    Images without a label have no score and are left out; none is in both groups. Among equals the earlier one
    goes first.
    """
    numbers, ious = scores.image_scores
    scored = ~np.isnan(ious)
    numbers, ious = numbers[scored], ious[scored]
    order = ious.argsort(kind="stable")
    worst = order[: min(count, -(-len(order) // 2))]
    best = [place for place in (-ious).argsort(kind="stable") if place not in worst][:count]
    wanted = {int(numbers[place]): ("worst", float(ious[place])) for place in worst}
    wanted |= {int(numbers[place]): ("best", float(ious[place])) for place in best}
    chosen = sorted(wanted)
    names = [words[0] for words in benchmark.classes]
    found = {}
    for number, row in zip(chosen, benchmark.samples(chosen), strict=True):
        sample = decoded(benchmark, row)
        size = sample["label"].shape
        prediction = predictor([sample["image"]], [size], frozenset({"semantic"}))[0]
        group, score = wanted[number]
        found[number] = example_image(
            sample["image_id"],
            group,
            score,
            sample["image"],
            sample["label"],
            np.asarray(prediction.semantic),
            names,
            benchmark.ignore_index,
        )
    in_order = [*(int(numbers[place]) for place in worst), *(int(numbers[place]) for place in best)]
    return [found[number] for number in in_order]
