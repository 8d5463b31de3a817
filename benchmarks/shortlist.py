"""What a shortlist of classes costs and saves: scenes segmented with thousands of classes and lists of several lengths.

The vocabulary is the Scenes world's classes, the benchmarks' categories, and those with adjectives before them up to
`--classes`. Prints a Markdown table.
"""

import argparse
import datetime
import itertools
import time
from pathlib import Path
from typing import Any

import torch
from speed import machine
from tqdm import tqdm

from ita_segmentation.data.categories import load_categories
from ita_segmentation.data.scenes import scene, scenes_vocabulary
from ita_segmentation.data.scenes.dataset import SPLITS
from ita_segmentation.evaluation import ConfusionMatrix
from modeling_ita import ITAForOpenVocabSegmentation, ITAImageProcessor, Vocabulary, normalize_vocabulary

BENCHMARKS = ("ade20k-847", "pascal-context-459", "coco-panoptic")
ADJECTIVES = ("red", "green", "wooden", "old", "small", "broken", "shiny", "striped", "wet", "toy")


def large_vocabulary(num_classes: int) -> Vocabulary:
    """The Scenes world's classes first, and then other ones."""
    classes = [list(names) for names in scenes_vocabulary().classes]
    known = {name for names in classes for name in names}
    plain = [category.name for benchmark in BENCHMARKS for category in load_categories(benchmark)]
    words = itertools.chain(plain, (f"{a} {name}" for a in ADJECTIVES for name in plain))
    for word in dict.fromkeys(name.split(",")[0].strip() for name in words):
        if len(classes) < num_classes and word not in known:
            classes.append([word])
    return normalize_vocabulary(classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/ita-tiny"))
    parser.add_argument("--classes", type=int, default=10_000)
    parser.add_argument("--lists", type=int, nargs="+", default=[1000, 300, 100, 30])
    parser.add_argument("--limit", type=int, default=40, help="images")
    args = parser.parse_args()
    model = ITAForOpenVocabSegmentation.from_pretrained(args.model).eval()
    processor: Any = ITAImageProcessor.from_pretrained(args.model)
    vocabulary = large_vocabulary(args.classes)
    model.text_classifier(vocabulary)
    lengths: list[int | None] = [None, *args.lists]
    own = len(scenes_vocabulary().classes)  # all other words count as one more class, which is never right
    scores = {length: ConfusionMatrix(own + 1) for length in lengths}
    seconds = dict.fromkeys(lengths, 0.0)
    agreement = dict.fromkeys(lengths, 0.0)
    seed, size = SPLITS["validation"].seed, processor.size["shortest_edge"]
    for index in tqdm(range(args.limit), unit="image"):
        drawn = scene(seed, index, size, classes="all")
        inputs = processor(images=drawn.image, return_tensors="pt")
        reference = None
        for length in lengths:
            start = time.perf_counter()
            with torch.inference_mode():
                outputs = model(**inputs, vocabulary=vocabulary, class_shortlist=length)
                [found] = processor.post_process_semantic_segmentation(
                    outputs, target_sizes=[drawn.semantic.shape]
                )
            seconds[length] += (time.perf_counter() - start) / args.limit
            reference = found if reference is None else reference
            agreement[length] += found.eq(reference).float().mean().item() / args.limit
            scores[length].update(found.clamp(max=own), drawn.semantic)
    print("| names on the list | ms an image | times faster | same pixels, % | mIoU |\n" + "|" + " --- |" * 5)
    for length in lengths:
        miou = 100 * scores[length].compute()["miou_present"]
        cells = [
            "all" if length is None else f"{length:,}",
            f"{1000 * seconds[length]:.0f}",
            f"{seconds[None] / seconds[length]:.1f}",
            f"{100 * agreement[length]:.1f}",
            f"{miou:.1f}",
        ]
        print(f"| {' | '.join(cells)} |")
    print(
        f"\n*{len(vocabulary):,} classes, {len(vocabulary.names):,} names, {args.model}, {args.limit} scenes; "
        f"{machine(torch.get_num_threads())}, {datetime.date.today().isoformat()}.*"
    )


if __name__ == "__main__":
    main()
