"""Segments images by the words typed: an overlay with its legend, a label map and a JSON file for each.

    python run_predict.py --model models/ita-tiny --images examples --classes "cat, sofa|couch, wall" --output out
    python run_predict.py --model models/ita-tiny --images "photos/**/*.jpg" clip.mp4 --batch_size 4 --output out
    accelerate launch run_predict.py --model models/ita-tiny --dataset photos --output shards

For an image NAME.jpg the output folder gets
- NAME_overlay.png: the image with its segments in colour, and a legend;
- NAME_labels.png: one channel of 8 bits (16 where more are needed). Semantic: the index of the class in the
  vocabulary. Panoptic and instance: the segment's id, from 1; 0 is no segment;
- NAME_segments.json: the vocabulary, the image's dominant categories, and of each segment id, label, class index,
  score (null for semantic, which has none), area in pixels and box [x, y, width, height];
- NAME_coco.json where asked for: a COCO document with run-length masks.
A second image of the same name is NAME_2, and so on. An image that cannot be read is named at the end, the others
are done all the same, and the exit status is 1. Videos: ita_segmentation/prediction/video.py; data sets: ita_segmentation/prediction/shards.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from ita_segmentation.checkpoints import load_checkpoint, set_shortest_side
from ita_segmentation.cli.parser import run_command
from ita_segmentation.errors import ITAError
from ita_segmentation.files import output_folder
from ita_segmentation.prediction.options import read_options
from ita_segmentation.prediction.sources import find_sources, output_names

__all__ = ["main", "output_names", "predict"]


def main() -> NoReturn:
    """The door: the process's arguments in, its exit status out."""
    run_command(predict)


def predict(argv: Sequence[str] | None = None) -> int:
    """Does what the arguments say. Returns 0, or 1 where some of several images failed.

    Raises:
        ITAError: what stops everything, in one line.
    """
    arguments, vocabulary = read_options(argv)
    if arguments.dataset is not None:
        return _predict_dataset(arguments, vocabulary)
    return _predict_files(arguments, vocabulary)


def _predict_files(arguments: argparse.Namespace, vocabulary: list[list[str]] | None) -> int:
    from ita_segmentation.prediction.runs import FileRun

    paths = find_sources(arguments.images)
    output_folder(arguments.output)
    run = FileRun(paths, arguments)
    outcome = run.work(_segmenter(arguments, vocabulary, arguments.device))
    if outcome.images:
        shown = "*_overlay.png" if "overlay" in run.formats else "*"
        print(f"{_count(outcome.images, 'image')} segmented: see {arguments.output}/{shown}")
    if outcome.videos:
        done = f"{_count(outcome.videos, 'video')} ({_count(outcome.frames, 'frame')})"
        print(f"{done} segmented: see {arguments.output}")
    if outcome.passed_over:
        print(f"{outcome.passed_over} passed over: done before")
    if not outcome.failures:
        return 0
    if len(paths) == 1:
        raise ITAError(outcome.failures[0])
    kind = "files" if run.videos else "images"
    print(f"run_predict.py: error: {len(outcome.failures)} of {len(paths)} {kind} failed:", file=sys.stderr)
    print("\n".join(f"  {failure}" for failure in outcome.failures), file=sys.stderr)
    return 1


def _predict_dataset(arguments: argparse.Namespace, vocabulary: list[list[str]] | None) -> int:
    import torch

    from ita_segmentation.prediction.runs import segment_dataset
    from ita_segmentation.prediction.shards import process_of

    rank, world, local_rank = process_of()
    device = arguments.device
    if device is None and torch.cuda.is_available():
        device = f"cuda:{local_rank % torch.cuda.device_count()}"
    output_folder(arguments.output)
    counts = segment_dataset(_segmenter(arguments, vocabulary, device), arguments)
    share = f"process {rank} of {world}: " if world > 1 else ""
    errors = f", {counts.errors} of them with an error" if counts.errors else ""
    print(f"{share}{_count(counts.images, 'image')} segmented{errors}: see {arguments.output}/*.parquet")
    return 0


def _segmenter(arguments: argparse.Namespace, vocabulary: list[list[str]] | None, device: str | None):
    from ita_segmentation.prediction.segmenter import Segmenter

    model, processor = load_checkpoint(arguments.model, device)
    set_shortest_side(processor, arguments.size)
    if vocabulary is None and model.default_vocabulary is None:
        raise ITAError(
            f"the checkpoint {arguments.model} has no classes of its own: give --classes or --vocabulary"
        )
    with_run_lengths = "coco" in (arguments.format or ())
    return Segmenter(model, processor, vocabulary, arguments.task, arguments.threshold, with_run_lengths)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
