"""Mask pooling by mask pooling: hard, hard on an upsampled feature, and a trained mask adapter, on the same masks.

    python benchmarks/mask_pooling.py --heads runs/head_0 runs/head_1 --adapters runs/adapter_0 runs/adapter_1
    python benchmarks/mask_pooling.py --heads models/ita-photo --adapters runs/photo --tune 0 --benchmark data/camvid

--heads are checkpoints with hard mask pooling, --adapters with `mask_pooling="adapter"`, one for each seed. The weights
of the ensemble are chosen for each checkpoint and pooling by mIoU on other images: scenes of another seed, or the
benchmark's images behind --limit. Where there is panoptic ground truth, so are PQ and the share of things under 32 x 32
pixels that are found (a panoptic segment of the class, IoU above 0.5). Prints each checkpoint's row, and the table of
means and standard deviations over checkpoints.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from dominant_categories import score_variants
from lost_objects import OUTCOMES, count_image
from measure import at_least

from ita_segmentation.checkpoints import load_checkpoint
from ita_segmentation.data.scenes import scenes_dataset
from ita_segmentation.errors import ITAError
from ita_segmentation.evaluation.benchmarks import load_benchmark
from ita_segmentation.evaluation.evaluator import decode_sample
from ita_segmentation.evaluation.ita_predictor import ITAPredictor
from modeling_ita.classification import HardMaskPooling

ALPHAS, BETAS = (0.3, 0.5, 0.7), (0.8, 0.9, 0.97)
COLUMNS = ("miou", "miou_seen", "miou_unseen", "pq", "pq_seen", "pq_unseen", "small_seen", "small_unseen")
HEADS = ("mIoU", "seen", "unseen", "PQ", "seen", "unseen", "small, seen", "small, unseen")


def poolings(model: Any, factors: list[int]) -> Iterator[str]:
    """Set each kind of pooling that a checkpoint can do, and give its name."""
    pooling = model.mask_classifier.pooling
    if not isinstance(pooling, HardMaskPooling):
        yield "adapter"
        return
    for factor in factors:
        pooling.upsample = factor
        yield f"hard, `dense_upsample` {factor}"


def other_images(benchmark: Any, arguments: argparse.Namespace) -> Any:
    """Give the images that the ensemble's weights are chosen on."""
    if arguments.benchmark == "scenes":
        images = scenes_dataset("validation", num_images=arguments.tune, seed=777)
        return dataclasses.replace(benchmark, rows=lambda: images, num_images=arguments.tune)
    return dataclasses.replace(
        benchmark, rows=lambda: itertools.islice(benchmark.rows(), arguments.limit, None)
    )


def choose_weights(model: Any, processor: Any, benchmark: Any, limit: int) -> tuple[float, float]:
    """Choose the ensemble's alpha and beta by mIoU."""
    best: list[tuple[float, float, float]] = []
    for alpha, beta in itertools.product(ALPHAS, BETAS):
        model.config.ensemble_alpha, model.config.ensemble_beta = alpha, beta
        semantic = dataclasses.replace(benchmark, tasks=frozenset({"semantic"}))
        scores = score_variants(model, processor, semantic, limit, seed=0, variants=("computed",))
        best.append((scores.table()["computed"]["miou"], alpha, beta))
    return max(best)[1:]


def small_things_found(model: Any, processor: Any, benchmark: Any, limit: int) -> dict[str, float]:
    """Share of things under 32 x 32 pixels that are found, per cent, of seen and of unseen classes."""
    counts = Counter[Any]()
    for row in itertools.islice(benchmark.rows(), limit):
        count_image(model, processor, decode_sample(benchmark, row), benchmark, 0.0, counts)
    shares = {}
    for name, seen in (("small_seen", True), ("small_unseen", False)):
        total = sum(counts["small", seen, outcome] for outcome in (*OUTCOMES, "no good mask"))
        shares[name] = 100 * counts["small", seen, "found"] / max(total, 1)
    return shares


def rows_of(path: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Score a checkpoint with each kind of pooling.

    Raises:
        ITAError: the checkpoint or the benchmark cannot be loaded, or its pooling is not what the option promises.
    """
    model, processor = load_checkpoint(path)
    if (path in arguments.adapters) != (model.config.mask_pooling == "adapter"):
        raise ITAError(
            f"{path} has mask_pooling {model.config.mask_pooling!r}: --heads are hard, --adapters not"
        )
    benchmark = load_benchmark(arguments.benchmark, arguments.data_dir)
    if benchmark.seen is None:
        predictor = ITAPredictor(model, processor, benchmark.classes, benchmark.is_thing)
        benchmark = dataclasses.replace(benchmark, seen=predictor.seen)
    for pooling in poolings(model, arguments.upsample):
        alpha, beta = model.config.ensemble_weights()
        if arguments.tune:
            others = other_images(benchmark, arguments)
            alpha, beta = choose_weights(model, processor, others, arguments.tune)
        model.config.ensemble_alpha, model.config.ensemble_beta = alpha, beta
        scores = score_variants(model, processor, benchmark, arguments.limit, seed=0, variants=("computed",))
        row = {"model": str(path), "pooling": pooling, "alpha": alpha, "beta": beta}
        row |= scores.table()["computed"]
        if "panoptic" in benchmark.tasks and benchmark.is_thing is not None:
            row |= small_things_found(model, processor, benchmark, arguments.limit)
        yield row


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print means and, of several checkpoints, standard deviations."""
    columns = [index for index, name in enumerate(COLUMNS) if name in rows[0]]
    print(f"\n| mask pooling | checkpoints | {' | '.join(HEADS[index] for index in columns)} |")
    print("|" + " --- |" * (2 + len(columns)))
    for pooling in dict.fromkeys(row["pooling"] for row in rows):
        own = [row for row in rows if row["pooling"] == pooling]
        cells = [pooling, str(len(own))]
        for index in columns:
            values = [row[COLUMNS[index]] for row in own]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--heads", nargs="+", type=Path, default=[], help="checkpoints with hard mask pooling"
    )
    parser.add_argument(
        "--adapters", nargs="+", type=Path, default=[], help="checkpoints with a mask adapter"
    )
    parser.add_argument(
        "--upsample", nargs="+", type=at_least(1), default=[1, 4], help="`dense_upsample` of --heads"
    )
    parser.add_argument("--benchmark", default="scenes", help="scenes, or a prepared benchmark in --data_dir")
    parser.add_argument("--data_dir", type=Path, default=Path("data"))
    parser.add_argument("--limit", type=at_least(1), default=200, help="images to score")
    parser.add_argument(
        "--tune",
        type=at_least(0),
        default=40,
        help="images to choose the ensemble's weights on; 0 keeps them",
    )
    arguments = parser.parse_args()
    if not arguments.heads + arguments.adapters:
        parser.error("name checkpoints: --heads, --adapters, or both")
    rows = []
    try:
        with torch.inference_mode():
            for path in (*arguments.heads, *arguments.adapters):
                for row in rows_of(path, arguments):
                    rows.append(row)
                    print(json.dumps(row), flush=True)
    except ITAError as error:
        parser.error(str(error))
    print_table(rows)


if __name__ == "__main__":
    main()
