"""The pictures that a model did worst and best on, as a person would look at them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from evaluation_ita.benchmarks import Benchmark
from evaluation_ita.evaluator import decoded
from evaluation_ita.example_pictures import ExamplePicture
from evaluation_ita.overlay import draw_overlay
from evaluation_ita.predictors import Predictor
from evaluation_ita.scores import BenchmarkScores


def worst_and_best(
    predictor: Predictor, benchmark: Benchmark, scores: BenchmarkScores, count: int
) -> list[ExamplePicture]:
    """The `count` pictures of the lowest and of the highest mean IoU, predicted once more.

    Pictures without a label have no score and are left out; none is in both groups. Among equals the earlier one
    goes first.
    """
    numbers, ious = scores.picture_scores
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
        found[number] = ExamplePicture(
            image_id=sample["image_id"],
            group=group,
            score=score,
            picture=sample["image"],
            reference=_painted(sample["image"], sample["label"], names),
            prediction=_painted(sample["image"], prediction.semantic, names),
        )
    in_order = [*(int(numbers[place]) for place in worst), *(int(numbers[place]) for place in best)]
    return [found[number] for number in in_order]


def _painted(picture: Image.Image, labels: Any, names: Sequence[str]) -> Image.Image:
    return draw_overlay(picture, labels, [(index, name, None) for index, name in enumerate(names)])
