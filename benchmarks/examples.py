"""What examples do for classes that were not seen in training: names alone, examples alone, both.

    python benchmarks/examples.py --model models/ita-tiny --limit 100
    python benchmarks/examples.py --model models/ita-tiny --limit 50 --tune --weights 0.3 0.5 0.7 1

Every unseen class of Scenes is given by examples, segments of at least 1% of scenes drawn for this; the seen classes
are given by their names. Each image is segmented with other examples, so that the scores do not depend on a lucky
choice. `--tune` takes images of another seed in the place of the validation images. Prints a Markdown table of mIoU.
"""

import random
from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ita_segmentation.checkpoints import load_checkpoint
from ita_segmentation.data.scenes import IGNORE_INDEX, scene, scenes_vocabulary
from ita_segmentation.errors import ITAError
from ita_segmentation.evaluation.benchmarks import load_benchmark
from ita_segmentation.evaluation.evaluator import decode_sample
from ita_segmentation.evaluation.ita_predictor import ITAPredictor
from ita_segmentation.evaluation.scores import BenchmarkScores
from modeling_ita.class_examples import encode_class_examples

SIZE = 192
EXAMPLE_SEED, TUNING_SEED = 3_000_017, 2_000_003
"""Of the scenes that examples are taken from, and of the images to tune by: neither split of Scenes has them."""
MIN_SHARE = 0.01
SEMANTIC = frozenset({"semantic"})


class WithExamples:
    """A model whose calls get `options`."""

    def __init__(self, model: Any):
        self.model = model
        self.options: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, **inputs: Any) -> Any:
        return self.model(**inputs, **self.options)


def draw_examples(model: Any, processor: Any, wanted: int) -> dict[int, Tensor]:
    """Draw scenes until each unseen class has so many examples; gives the embeddings (n, D) of each class."""
    seen = scenes_vocabulary().seen
    unseen = [index for index, was_seen in enumerate(seen) if not was_seen]
    found: dict[int, list[Tensor]] = defaultdict(list)
    index = 0
    while any(len(found[label]) < wanted for label in unseen):
        drawn = scene(EXAMPLE_SEED, index, SIZE, sorted({*scenes_vocabulary().stuff_ids, *unseen}))
        index += 1
        for segment in drawn.segments:
            label, mask = segment["class_id"], drawn.panoptic == segment["id"]
            if seen[label] or len(found[label]) >= wanted or mask.mean() < MIN_SHARE:
                continue
            found[label].append(encode_class_examples(model, processor, {"_": [(drawn.image, mask)]})["_"])
    return {label: torch.cat(found[label]) for label in unseen}


def tuning_samples(limit: int) -> Iterator[dict[str, Any]]:
    """Draw images with labels that are in no split."""
    for index in range(limit):
        drawn = scene(TUNING_SEED, index, SIZE, "all")
        yield {"image": drawn.image, "label": np.asarray(drawn.semantic)}


def validation_samples(limit: int) -> Iterator[dict[str, Any]]:
    """Decode the first images of the validation split."""
    benchmark = load_benchmark("scenes", Path("data"), limit=limit)
    return (decode_sample(benchmark, row) for row in benchmark.rows())


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--limit", type=int, default=100, help="images")
    parser.add_argument("--examples", type=int, nargs="+", default=[1, 5], help="of each class")
    parser.add_argument(
        "--weights", type=float, nargs="+", help="of the examples (default: 1 and the model's)"
    )
    parser.add_argument("--tune", action="store_true", help="images of another seed")
    arguments = parser.parse_args()
    try:
        model, processor = load_checkpoint(Path(arguments.model))
        samples = tuning_samples(arguments.limit) if arguments.tune else validation_samples(arguments.limit)
    except ITAError as error:
        parser.error(str(error))
    classes, seen = scenes_vocabulary().classes, scenes_vocabulary().seen
    wrapped = WithExamples(model)
    predictor = ITAPredictor(wrapped, processor, classes)
    weights = arguments.weights or [1.0, None]
    variants = [(0, None), *((count, weight) for count in arguments.examples for weight in weights)]
    scores = {one: BenchmarkScores(len(classes), IGNORE_INDEX, None, SEMANTIC) for one in variants}
    with torch.inference_mode():
        pool = draw_examples(model, processor, 2 * max(arguments.examples))
        for index, sample in zip(range(arguments.limit), samples, strict=False):
            chance = random.Random(index)
            order = {label: chance.sample(range(len(own)), len(own)) for label, own in pool.items()}
            for count, weight in variants:
                given = {classes[label][0]: own[order[label][:count]] for label, own in pool.items()}
                wrapped.options = {"examples": given, "example_weight": weight} if count else {}
                [prediction] = predictor([sample["image"]], [sample["label"].shape], SEMANTIC)
                scores[count, weight].update(index, sample, prediction)
    print("| unseen classes are given by | mIoU unseen | mIoU seen |\n| --- | --- | --- |")
    for (count, weight), result in scores.items():
        name = f"{count} example{'s' * (count > 1)}" if count else "name"
        name += " and name" if count and weight != 1 else ""
        name += "" if weight in (1, None) else f", weight {weight:g}"
        found = result.confusion.compute(seen)
        print(f"| {name} | {100 * found['miou_unseen']:.1f} | {100 * found['miou_seen']:.1f} |")


if __name__ == "__main__":
    main()
