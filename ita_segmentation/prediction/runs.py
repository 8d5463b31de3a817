"""Segment files, images and videos alike, and count what became of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ita_segmentation.errors import ITAError
from ita_segmentation.files import path_text
from ita_segmentation.prediction import images, video
from ita_segmentation.prediction.formats import DEFAULT_FORMATS, FORMATS, ImageFormat, Item
from ita_segmentation.prediction.segmenter import SegmentedImage, Segmenter
from ita_segmentation.prediction.sources import is_video, output_names


@dataclass
class RunOutcome:
    """What became of a run's files."""

    images: int = 0
    videos: int = 0
    frames: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)


class FileRun:
    """Images and videos, and the files that they become."""

    def __init__(
        self,
        paths: Sequence[Path],
        output: Path,
        formats: Sequence[str] | None = None,
        known: Mapping[str, ImageFormat] = FORMATS,
    ):
        self.formats = {name: known[name] for name in formats or DEFAULT_FORMATS}
        self.video_formats = tuple(dict.fromkeys(formats or video.DEFAULT_VIDEO_FORMATS))
        named = [Item(path, output / name) for path, name in zip(paths, output_names(paths), strict=True)]
        self.images = [item for item in named if not is_video(item.path)]
        self.videos = [item for item in named if is_video(item.path)]
        foreign = [name for name in self.video_formats if name not in video.VIDEO_FORMATS]
        if self.videos and foreign:
            raise ITAError(
                f"--format {foreign[0]} is for images, and {path_text(self.videos[0].path)} is a video"
            )
        results = [item.file(one.ending) for item in self.images for one in self.formats.values()]
        results += [file for item in self.videos for file in video.video_files(item, self.video_formats)]
        images.refuse_overwriting(paths, results)

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
    ) -> RunOutcome:
        """Segment everything; an image or video that fails does not stop the others."""
        outcome = RunOutcome()
        settings = {**model, **segmenter.settings}
        items = self.images
        if resume:
            items = [one for one in items if not images.is_done(one, self.formats, settings)]
            outcome.skipped = len(self.images) - len(items)
        with tqdm(total=len(items), unit="image", disable=len(items) < 2) as bar:
            for item, result in images.segment_images(segmenter, items, self.formats, settings, batch_size):
                if isinstance(result, ITAError):
                    outcome.failures.append(images.failure_line(item.path, result))
                else:
                    outcome.images += 1
                    if not result.segments:
                        outcome.empty.append(f"{path_text(item.path)}: {empty_line(result, segmenter)}")
                bar.update()
        for item in self.videos:
            if resume and video.is_done(item, self.video_formats, settings, every):
                outcome.skipped += 1
                continue
            try:
                with tqdm(unit="frame", desc=path_text(item.path.name)) as bar:
                    frames, error = video.segment_video(
                        segmenter,
                        item,
                        self.video_formats,
                        settings,
                        every=every,
                        batch_size=batch_size,
                        progress=bar.update,
                        run_lengths=run_lengths if "coco" in self.video_formats else None,
                    )
            except ITAError as failure:
                outcome.failures.append(images.failure_line(item.path, failure))
                continue
            outcome.videos += 1
            outcome.frames += frames
            if error is not None:
                line = images.failure_line(item.path, error)
                outcome.failures.append(f"{line}; its first {frames} frames are done")
        return outcome


def empty_line(result: SegmentedImage, segmenter: Segmenter) -> str:
    """Return what is said of an image without a segment, with the best guesses."""
    guesses = ", ".join(f"{name} {score:.2f}" for name, score in result.best_guesses)
    above = "" if segmenter.threshold is None else f" above {segmenter.threshold:g}"
    lost = any(score >= (segmenter.threshold or 1.1) for _, score in result.best_guesses)
    why = "; those above it won too few pixels" if lost else ""
    return f"0 segments{above}; best guesses: {guesses}{why}"
