"""Segment images by the names of classes: `ita predict`.

    ita predict --model models/ita-tiny --images examples --classes "cat, sofa|couch, wall" --output out
    ita predict --model models/ita-tiny --images "photos/**/*.jpg" clip.mp4 --batch_size 4 --output out
    accelerate launch run_predict.py --model models/ita-tiny --dataset photos --output shards
    ita predict --model models/ita-tiny --dataset photos --engine ray --address auto --output shards

For an image NAME.jpg the output folder gets
- NAME_overlay.png: the image with its segments in color, and a legend;
- NAME_labels.png: one channel of 8 bits (16 where more are needed). Semantic: the index of the class in the
  vocabulary, and the highest value where there is none. Panoptic and instance: the segment's id, from 1; 0 is none;
- NAME_segments.json: the vocabulary, the image's dominant categories, and of each segment id, label, class index,
  score, area in pixels and box [x, y, width, height];
- files in other tools' formats where asked for, see `ita_segmentation.integrations.formats`.
A second image of the same name is NAME_2, and so on. An image that cannot be read is named at the end, the others
are done all the same, and the exit status is 1. Videos: `ita_segmentation.prediction.video`; datasets:
`ita_segmentation.prediction.dataset`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ita_segmentation.checkpoints import (
    checkpoint_digest,
    domain_notice,
    load_checkpoint,
    resolve_checkpoint,
    set_shortest_side,
)
from ita_segmentation.cli.predict_options import read_options
from ita_segmentation.errors import ITAError, UsageError
from ita_segmentation.files import output_folder

MAX_EMPTY_LINES = 20


def predict(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 1 where some of several images failed."""
    arguments = read_options(argv)
    return _predict_files(arguments) if arguments.dataset is None else _predict_dataset(arguments)


def _predict_files(arguments: argparse.Namespace) -> int:
    from ita_segmentation.integrations.formats import EXCHANGE_FORMATS, run_length_entries
    from ita_segmentation.prediction import RESULT_FORMATS, PredictionRun, find_sources

    paths = find_sources(arguments.images)
    output_folder(arguments.output)
    run = PredictionRun(paths, arguments.output, arguments.format, {**RESULT_FORMATS, **EXCHANGE_FORMATS})
    if arguments.every is not None and not run.videos:
        raise UsageError("--every is for videos, and there is none")
    summary = run.run(
        _segmenter(arguments, arguments.device, run.keeps_overlaps),
        _model_settings(arguments.model),
        every=arguments.every or 1,
        batch_size=1 if arguments.tiling else arguments.batch_size,
        resume=arguments.resume,
        run_lengths=run_length_entries,
    )
    if summary.images:
        shown = "*_overlay.png" if "overlay" in run.formats else "*"
        empty = f", {len(summary.empty)} of them without a segment" if summary.empty else ""
        print(f"{_count(summary.images, 'image')} segmented{empty}: see {arguments.output}/{shown}")
    if summary.videos:
        done = f"{_count(summary.videos, 'video')} ({_count(summary.frames, 'frame')})"
        print(f"{done} segmented: see {arguments.output}")
    if summary.skipped:
        print(f"{summary.skipped} skipped: done before")
    if summary.repeated:
        changed = ", ".join(sorted(summary.changed))
        print(f"{summary.repeated} not skipped: their results were made otherwise (different: {changed})")
    for line in summary.empty[:MAX_EMPTY_LINES]:
        print(line)
    if len(summary.empty) > MAX_EMPTY_LINES:
        print(f"... and {len(summary.empty) - MAX_EMPTY_LINES} more images without a segment")
    if not summary.failures:
        return 0
    if len(paths) == 1:
        raise ITAError(summary.failures[0])
    program, kind = Path(sys.argv[0]).name, "files" if run.videos else "images"
    print(f"{program}: error: {len(summary.failures)} of {len(paths)} {kind} failed:", file=sys.stderr)
    print("\n".join(f"  {failure}" for failure in summary.failures), file=sys.stderr)
    return 1


def _predict_dataset(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ita_segmentation.prediction import dataset, ray_engine, rows

    on_ray = arguments.engine == "ray"
    output_folder(arguments.output)
    rank, world_size, local_rank = dataset.process_of()
    if on_ray:
        ray_engine.import_ray()
    folder = dataset.ParquetFolder(arguments.output)
    device = "cpu" if on_ray else arguments.device or _device_of(local_rank)
    opened, worker, plan = open_dataset(arguments, device, folder.note_length, folder.part_length)
    processes = arguments.actors or 1 if on_ray else world_size
    if rank == 0 and isinstance(opened, rows.ParquetRows):
        _print_note(opened.sharing_notice(processes))
    with tqdm(unit="image", desc=f"process {rank}" if world_size > 1 else None, disable=rank != 0) as bar:
        if on_ray:
            del worker
            options = ray_engine.RayOptions(
                arguments.address, arguments.actors, arguments.cpus_per_actor or 1
            )
            open_work = actor_work(arguments, rows.UNIT_SIZE)
            counts = ray_engine.segment_on_ray(open_work, opened, folder, plan, options, bar.update)
        else:
            counts = dataset.segment_dataset(worker, opened, folder, plan, bar.update)
    share = f"process {rank} of {world_size}: " if world_size > 1 else ""
    errors = f", {counts.errors} of them with an error" if counts.errors else ""
    print(f"{share}{_count(counts.images, 'image')} segmented{errors}: see {arguments.output}/*.parquet")
    return 0


def open_dataset(
    arguments: argparse.Namespace,
    device: str | None,
    note_length: Callable[[int, int], None],
    part_length: Callable[[int], int | None] = lambda part: None,
    unit_size: int | None = None,
) -> tuple[Any, Any, dict[str, Any]]:
    """Open the dataset and load the model: the rows, what segments their units, and what decides the results."""
    from ita_segmentation.integrations.formats import run_length_entries
    from ita_segmentation.prediction.dataset import DEFAULT_DATASET_FORMATS, ParquetSegmenter
    from ita_segmentation.prediction.rows import open_rows

    formats = tuple(dict.fromkeys(arguments.format or DEFAULT_DATASET_FORMATS))
    columns = {"image_column": arguments.image_column or "image", "id_column": arguments.id_column}
    rows = open_rows(
        arguments.dataset,
        arguments.split,
        **columns,
        part_length=part_length,
        note_length=note_length,
        unit_size=unit_size,
    )
    segmenter = _segmenter(arguments, device, keep_overlaps="coco" in formats)
    plan = {
        "dataset": arguments.dataset,
        "split": arguments.split,
        **columns,
        "formats": sorted(formats),
        **_model_settings(arguments.model),
        **segmenter.settings,
    }
    batch_size = 1 if arguments.tiling else arguments.batch_size
    return rows, ParquetSegmenter(segmenter, formats, batch_size, run_length_entries), plan


def actor_work(arguments: argparse.Namespace, unit_size: int) -> Callable[..., Any]:
    """Give what opens the dataset in an actor of Ray, whose working directory is another one."""
    named = {"model": arguments.model, "dataset": arguments.dataset}
    absolute = {key: str(Path(name).absolute()) for key, name in named.items() if Path(name).exists()}
    return partial(_open_in_actor, argparse.Namespace(**{**vars(arguments), **absolute}), named, unit_size)


def _open_in_actor(
    arguments: argparse.Namespace,
    named: dict[str, str],
    unit_size: int,
    note_length: Callable[[int, int], None],
) -> tuple[Any, Any, dict[str, Any]]:
    # Ray shows a process no GPUs but its own.
    rows, worker, plan = open_dataset(arguments, _device_of(0), note_length, unit_size=unit_size)
    return rows, worker, plan | named  # the plan has the names as they were given


def _device_of(local_rank: int) -> str | None:
    import torch

    return f"cuda:{local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else None


def _segmenter(arguments: argparse.Namespace, device: str | None, keep_overlaps: bool) -> Any:
    from ita_segmentation.prediction.segmenter import Segmenter

    model, processor = load_checkpoint(arguments.model, device, arguments.dtype)
    _print_note(domain_notice(model.config))
    set_shortest_side(processor, arguments.size)
    if arguments.vocabulary is None and model.default_vocabulary is None:
        raise ITAError(
            f"the checkpoint {arguments.model} has no classes of its own: give --classes or --vocabulary"
        )
    return Segmenter(
        model,
        processor,
        arguments.vocabulary,
        task=arguments.task,
        threshold=arguments.threshold,
        stuff=arguments.stuff,
        keep_overlaps=keep_overlaps,
        distractors=not arguments.no_distractors,
        tiling=arguments.tiling,
        tiles_at_once=arguments.batch_size,
        examples=arguments.examples,
        example_weight=arguments.example_weight,
    )


def _model_settings(model: str) -> dict[str, str]:
    return {"model": model, "checkpoint": checkpoint_digest(resolve_checkpoint(model))}


def _print_note(notice: str | None) -> None:
    if notice is not None:
        print(f"note: {notice}", file=sys.stderr)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
