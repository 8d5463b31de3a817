"""The two kinds of run of `run_predict.py`: files (pictures and videos), and a data set shared by processes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from evaluation_ita.door import DoorError
from prediction_ita import pictures, shards, video
from prediction_ita.rows import open_rows
from prediction_ita.segmenter import Segmenter
from prediction_ita.sources import is_video, output_names


@dataclass
class Outcome:
    """What became of a run's files.

    Attributes:
        pictures, videos, frames: how many were done.
        passed_over: how many had been done before.
        failures: a line for each that failed.
    """

    pictures: int = 0
    videos: int = 0
    frames: int = 0
    passed_over: int = 0
    failures: list[str] = field(default_factory=list)


class FileRun:
    """Pictures and videos, and the files that they become.

    Raises:
        DoorError: if a result would take the place of something given.
    """

    def __init__(self, paths: Sequence[Path], arguments: argparse.Namespace):
        self.arguments = arguments
        self.every = arguments.every or 1
        self.formats = tuple(dict.fromkeys(arguments.format or pictures.DEFAULT_FORMATS))
        self.video_formats = tuple(dict.fromkeys(arguments.format or video.DEFAULT_VIDEO_FORMATS))
        bases = [arguments.output / name for name in output_names(paths)]
        named = list(zip(paths, bases, strict=True))
        self.pictures = [pictures.Item(path, base) for path, base in named if not is_video(path)]
        self.videos = [video.VideoItem(path, base) for path, base in named if is_video(path)]
        if arguments.every is not None and not self.videos:
            raise DoorError("--every is for videos, and there is none")
        files = [file for item in self.pictures for file in item.files(self.formats).values()]
        files += [file for item in self.videos for file in item.files(self.video_formats)]
        pictures.keep_inputs(
            [*self.pictures, *(pictures.Item(one.path, one.base) for one in self.videos)], files
        )

    def work(self, segmenter: Segmenter) -> Outcome:
        """Does what is to do; a picture or video that fails does not stop the others."""
        outcome = Outcome()
        self._segment_pictures(segmenter, outcome)
        for item in self.videos:
            self._segment_video(segmenter, item, outcome)
        return outcome

    def _segment_pictures(self, segmenter: Segmenter, outcome: Outcome) -> None:
        arguments, items = self.arguments, self.pictures
        if arguments.resume:
            items = [
                one for one in items if not pictures.is_done(one, self.formats, arguments.model, segmenter)
            ]
            outcome.passed_over += len(self.pictures) - len(items)
        results = pictures.segment_pictures(
            segmenter, items, self.formats, arguments.model, arguments.batch_size
        )
        place = 0
        with tqdm(total=len(items), unit="picture", disable=len(items) < 2) as bar:
            for errors in results:
                for item, error in zip(items[place : place + len(errors)], errors, strict=True):
                    if error is None:
                        outcome.pictures += 1
                    else:
                        outcome.failures.append(pictures.picture_error(item.path, error))
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
        except DoorError as failure:
            outcome.failures.append(pictures.picture_error(item.path, failure))
            return
        outcome.videos += 1
        outcome.frames += frames
        if error is not None:
            kept = f"{pictures.picture_error(item.path, error)}; its first {frames} frames are done"
            outcome.failures.append(kept)


def segment_dataset(segmenter: Segmenter, arguments: argparse.Namespace) -> shards.Counts:
    """This process's share of a data set -> parquet files.

    Raises:
        DoorError: what stops everything; files that are done stay.
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
    with tqdm(unit="picture", desc=f"process {rank}" if world > 1 else None, disable=rank != 0) as bar:
        for unit in rows.units(rank, world, folder.is_done):
            done = shards.segment_unit(segmenter, unit, formats, arguments.batch_size, bar.update)
            folder.write(unit, done)
            counts.pictures += len(done)
            counts.errors += sum("error" in one for one in done)
    return counts
