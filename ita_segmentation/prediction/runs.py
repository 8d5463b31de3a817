"""The two kinds of run of `run_predict.py`: files (images and videos), and a data set shared by processes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from ita_segmentation.errors import ITAError
from ita_segmentation.prediction import images as images
from ita_segmentation.prediction import shards, video
from ita_segmentation.prediction.rows import open_rows
from ita_segmentation.prediction.segmenter import Segmenter
from ita_segmentation.prediction.sources import is_video, output_names


@dataclass
class Outcome:
    """What became of a run's files.

    Attributes:
        images, videos, frames: how many were done.
        passed_over: how many had been done before.
        failures: a line for each that failed.
    """

    images: int = 0
    videos: int = 0
    frames: int = 0
    passed_over: int = 0
    failures: list[str] = field(default_factory=list)


class FileRun:
    """Images and videos, and the files that they become.

    Raises:
        ITAError: if a result would take the place of something given.
    """

    def __init__(self, paths: Sequence[Path], arguments: argparse.Namespace):
        self.arguments = arguments
        self.every = arguments.every or 1
        self.formats = tuple(dict.fromkeys(arguments.format or images.DEFAULT_FORMATS))
        self.video_formats = tuple(dict.fromkeys(arguments.format or video.DEFAULT_VIDEO_FORMATS))
        bases = [arguments.output / name for name in output_names(paths)]
        named = list(zip(paths, bases, strict=True))
        self.images = [images.Item(path, base) for path, base in named if not is_video(path)]
        self.videos = [video.VideoItem(path, base) for path, base in named if is_video(path)]
        if arguments.every is not None and not self.videos:
            raise ITAError("--every is for videos, and there is none")
        files = [file for item in self.images for file in item.files(self.formats).values()]
        files += [file for item in self.videos for file in item.files(self.video_formats)]
        images.keep_inputs([*self.images, *(images.Item(one.path, one.base) for one in self.videos)], files)

    def work(self, segmenter: Segmenter) -> Outcome:
        """Does what is to do; an image or video that fails does not stop the others."""
        outcome = Outcome()
        self._segment_images(segmenter, outcome)
        for item in self.videos:
            self._segment_video(segmenter, item, outcome)
        return outcome

    def _segment_images(self, segmenter: Segmenter, outcome: Outcome) -> None:
        arguments, items = self.arguments, self.images
        if arguments.resume:
            items = [
                one for one in items if not images.is_done(one, self.formats, arguments.model, segmenter)
            ]
            outcome.passed_over += len(self.images) - len(items)
        results = images.segment_images(segmenter, items, self.formats, arguments.model, arguments.batch_size)
        place = 0
        with tqdm(total=len(items), unit="image", disable=len(items) < 2) as bar:
            for errors in results:
                for item, error in zip(items[place : place + len(errors)], errors, strict=True):
                    if error is None:
                        outcome.images += 1
                    else:
                        outcome.failures.append(images.image_error(item.path, error))
                place += len(errors)
                bar.update(len(errors))

    def _segment_video(self, segmenter: Segmenter, item: video.VideoItem, outcome: Outcome) -> None:
        arguments, formats = self.arguments, self.video_formats
        if arguments.resume and video.is_done(item, formats, arguments.model, segmenter, self.every):
            outcome.passed_over += 1
            return
        try:
            with tqdm(unit="frame", desc=item.path.name) as bar:
                frames, error = video.segment_video(
                    *(segmenter, item, formats, arguments.model),
                    every=self.every,
                    batch_size=arguments.batch_size,
                    progress=bar.update,
                )
        except ITAError as failure:
            outcome.failures.append(images.image_error(item.path, failure))
            return
        outcome.videos += 1
        outcome.frames += frames
        if error is not None:
            kept = f"{images.image_error(item.path, error)}; its first {frames} frames are done"
            outcome.failures.append(kept)


def segment_dataset(segmenter: Segmenter, arguments: argparse.Namespace) -> shards.Counts:
    """This process's share of a data set -> parquet files.

    Raises:
        ITAError: what stops everything; files that are done stay.
    """
    rank, world, _ = shards.process_of()
    formats = tuple(dict.fromkeys(arguments.format or shards.DEFAULT_DATASET_FORMATS))
    columns = (arguments.image_column or "image", arguments.id_column)
    folder = shards.ShardFolder(arguments.output)
    rows = open_rows(arguments.dataset, arguments.split, *columns, folder.part_length, folder.note_length)
    plan = shards.plan_of(
        *(arguments.dataset, arguments.split, columns, rows.description),
        *(arguments.model, segmenter, formats, segmenter.processor.size),
    )
    folder.begin(plan)
    counts = shards.Counts()
    with tqdm(unit="image", desc=f"process {rank}" if world > 1 else None, disable=rank != 0) as bar:
        for unit in rows.units(rank, world, folder.is_done):
            done = shards.segment_unit(segmenter, unit, formats, arguments.batch_size, bar.update)
            folder.write(unit, done)
            counts.images += len(done)
            counts.errors += sum("error" in one for one in done)
    return counts
