"""Segment image files and videos; the files of each image are written before the next batch is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.files import path_text, read_text, write_files
from ita_segmentation.images import read_image
from ita_segmentation.prediction import video
from ita_segmentation.prediction.formats import DEFAULT_FORMATS, RESULT_FORMATS, ResultFormat
from ita_segmentation.prediction.segmenter import SegmentedImage, Segmenter
from ita_segmentation.prediction.sources import InputFile, is_video, output_names


@dataclass
class PredictionSummary:
    """What became of the files of a run.

    Attributes:
        images: number of images segmented.
        videos: number of videos segmented.
        frames: number of frames segmented of them.
        skipped: number of images and videos that had been done before.
        repeated: number of those whose results were there, but made with other settings.
        changed: those settings.
        failures: a line for each that failed.
        empty: a line for each image without a segment.
    """

    images: int = 0
    videos: int = 0
    frames: int = 0
    skipped: int = 0
    repeated: int = 0
    changed: set[str] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)

    def is_done(self, files: Sequence[Path], described: Path, expected: Mapping[str, object]) -> bool:
        """Tell whether files are there and, as far as the file `described` says, made as `expected`; count that."""
        changed: list[str] = []
        if not all(path.exists() for path in files):
            return False
        if described in files:
            try:
                document = json.loads(read_text(described))
                changed = [key for key, value in expected.items() if document.get(key, ...) != value]
            except (ITAError, ValueError, AttributeError):
                return False
        self.skipped += not changed
        self.repeated += bool(changed)
        self.changed.update(changed)
        return not changed


class PredictionRun:
    """Images and videos, and the files that they become.

    Args:
        paths: the images and videos.
        output: the folder for the results.
        formats: names of `known` formats; None for the default ones.
        known: the formats that there are.

    Raises:
        ITAError: a result would take the place of an input, or a video is asked for in a format of images alone.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        output: Path,
        formats: Sequence[str] | None = None,
        known: Mapping[str, ResultFormat] = RESULT_FORMATS,
    ):
        self.formats = {name: known[name] for name in formats or DEFAULT_FORMATS}
        self.video_formats = tuple(dict.fromkeys(formats or video.DEFAULT_VIDEO_FORMATS))
        named = [
            InputFile(path, output / name) for path, name in zip(paths, output_names(paths), strict=True)
        ]
        self.images = [file for file in named if not is_video(file.path)]
        self.videos = [file for file in named if is_video(file.path)]
        foreign = [name for name in self.video_formats if name not in video.VIDEO_FORMATS]
        if self.videos and foreign:
            raise ITAError(
                f"--format {foreign[0]} is for images, and {path_text(self.videos[0].path)} is a video"
            )
        results = [result for file in self.images for result in self._results(file)]
        results += [result for file in self.videos for result in video.video_files(file, self.video_formats)]
        inputs = {path.resolve() for path in paths}
        for path in results:
            if path.resolve() in inputs:
                raise ITAError(
                    f"{path_text(path)} is one of the inputs and would be overwritten: choose another --output"
                )

    @property
    def keeps_overlaps(self) -> bool:
        """Whether a format needs the overlaps of instances."""
        return any(one.keeps_overlaps for one in self.formats.values())

    def run(
        self,
        segmenter: Segmenter,
        model: Mapping[str, str],
        every: int = 1,
        batch_size: int = 1,
        resume: bool = False,
        run_lengths: Callable[[SegmentedImage], list[dict[str, Any]]] | None = None,
    ) -> PredictionSummary:
        """Segment everything; an image or video that fails does not stop the others.

        Args:
            segmenter: what segments them.
            model: what the files say of the model: where it came from, and what tells its content from another's.
            every: of a video, every N-th frame is segmented.
            batch_size: images in one pass.
            resume: skip images and videos whose results are there and were made the same way.
            run_lengths: see `segment_video`.
        """
        summary, settings = PredictionSummary(), {**model, **segmenter.settings}

        def is_done(file: InputFile, results: Sequence[Path], **expected: object) -> bool:
            described = file.result("_segments.json")
            return resume and summary.is_done(results, described, {**expected, **settings})

        files = [
            file for file in self.images if not is_done(file, self._results(file), image=path_text(file.path))
        ]
        with tqdm(total=len(files), unit="image", disable=len(files) < 2) as bar:
            for file, result in segment_files(segmenter, files, self.formats, settings, batch_size):
                if isinstance(result, ITAError):
                    summary.failures.append(_failure_line(file, result))
                else:
                    summary.images += 1
                    if not result.segments:
                        summary.empty.append(f"{path_text(file.path)}: {empty_line(result, segmenter)}")
                bar.update()
        for file in self.videos:
            results = video.video_files(file, self.video_formats)
            if is_done(file, results, video=path_text(file.path), every=every, error=None):
                continue
            try:
                with tqdm(unit="frame", desc=path_text(file.path.name)) as bar:
                    frames, error = video.segment_video(
                        segmenter,
                        file,
                        self.video_formats,
                        settings,
                        every=every,
                        batch_size=batch_size,
                        progress=bar.update,
                        run_lengths=run_lengths if "coco" in self.video_formats else None,
                    )
            except ITAError as failure:
                summary.failures.append(_failure_line(file, failure))
                continue
            summary.videos += 1
            summary.frames += frames
            if error is not None:
                summary.failures.append(f"{_failure_line(file, error)}; its first {frames} frames are done")
        return summary

    def _results(self, image: InputFile) -> list[Path]:
        return [image.result(one.ending) for one in self.formats.values()]


def segment_files(
    segmenter: Segmenter,
    files: Sequence[InputFile],
    formats: Mapping[str, ResultFormat],
    settings: Mapping[str, Any],
    batch_size: int = 1,
) -> Iterator[tuple[InputFile, SegmentedImage | ITAError]]:
    """Segment image files and write their results.

    Args:
        segmenter: what segments them.
        files: the images.
        formats: what is written of each, by name.
        settings: what the results say of how they were made: "model" and the segmenter's settings.
        batch_size: images in one pass.

    Yields:
        each image with its segments, or with what was wrong with it.
    """
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        outcomes: dict[InputFile, SegmentedImage | ITAError] = {}
        images = {}
        for file in batch:
            try:
                images[file] = read_image(file.path)
            except ITAError as error:
                outcomes[file] = error
        for file, result in zip(images, segmenter.segment_images(list(images.values())), strict=True):
            outcomes[file] = result
            if isinstance(result, SegmentedImage):
                try:
                    write_files(
                        {
                            file.result(one.ending): one.encode(result, file, images[file], settings)
                            for one in formats.values()
                        }
                    )
                except ITAError as error:
                    outcomes[file] = error
        yield from ((file, outcomes[file]) for file in batch)


def _failure_line(file: InputFile, error: ITAError) -> str:
    message, name = one_line(error), path_text(file.path)
    return message if name in message or str(file.path) in message else f"{name}: {message}"


def empty_line(result: SegmentedImage, segmenter: Segmenter) -> str:
    """Return what is said of an image without a segment, with the best guesses."""
    guesses = ", ".join(f"{name} {score:.2f}" for name, score in result.best_guesses)
    above = "" if segmenter.threshold is None else f" above {segmenter.threshold:g}"
    lost = any(score >= (segmenter.threshold or 1.1) for _, score in result.best_guesses)
    why = "; those above it won too few pixels" if lost else ""
    return f"0 segments{above}; best guesses: {guesses}{why}"
