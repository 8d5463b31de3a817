"""A video: an overlay video whose colours stay with what they mean, a line of JSON for each frame, label maps.

For a video NAME.mp4 the output folder gets
- NAME_overlay.mp4: the frames with their segments in colour, and the legend of each at the right;
- NAME_frames.jsonl: a line for each frame: number, time in seconds, segments;
- NAME_segments.json: what is common to all frames; how many there are; "error" if the video ended in one;
- NAME_labels/000042.png on request: the label map of frame 42.
Ids of panoptic and instance segments last from frame to frame (see `Tracks`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.files import read_text, write_files
from ita_segmentation.prediction.images import json_bytes, label_png
from ita_segmentation.prediction.segmenter import Prediction, Segmenter
from ita_segmentation.prediction.tracks import Tracks
from ita_segmentation.prediction.video_files import Frame, VideoReader, VideoWriter
from ita_segmentation.visualization import LegendEntry, color_of, paint_segments

DEFAULT_VIDEO_FORMATS = ("overlay", "segments")
TEXT_SIZE, ROW_HEIGHT, MARGIN = 15, 22, 8  # of the legend, pixels
MAX_LEGEND_CHARACTERS = 24


@dataclass(frozen=True)
class VideoItem:
    """A video, and the output folder with its name there."""

    path: Path
    base: Path

    def named(self, ending: str) -> Path:
        return self.base.with_name(self.base.name + ending)

    def files(self, formats: Sequence[str]) -> list[Path]:
        endings = {
            "overlay": ("_overlay.mp4",),
            "labels": ("_labels",),
            "segments": ("_frames.jsonl", "_segments.json"),
            "coco": ("_frames.jsonl", "_segments.json"),
        }
        return list(dict.fromkeys(self.named(ending) for one in formats for ending in endings[one]))


def segment_video(
    segmenter: Segmenter,
    item: VideoItem,
    formats: Sequence[str],
    model: Path,
    every: int = 1,
    batch_size: int = 1,
    progress: Callable[[int], None] = lambda frames: None,
) -> tuple[int, ITAError | None]:
    """Segments a video; what is done of a video that breaks off is kept.

    Args:
        formats: of "overlay", "segments", "labels", and "coco" (run lengths in each line of NAME_frames.jsonl).
        every: frames 0, `every`, 2 `every`, ... are segmented; the overlay plays as long as the video.
        progress: called with the number of frames done since it was called last.

    Returns:
        the number of frames done, and what was wrong, if anything.

    Raises:
        ITAError: if there is not one frame, or nothing can be written; no file is left then.
    """
    reader = VideoReader(item.path)
    outputs = _Outputs(item, formats, reader.rate / every, segmenter)
    done, failure = 0, None
    try:
        try:
            for frame, prediction in _predictions(segmenter, reader.frames(every), batch_size):
                outputs.add(frame, prediction)
                done += 1
                progress(1)
        except _FrameError as error:
            failure = ITAError(one_line(error))
        if not done:
            raise failure or ITAError(f"{item.path} holds no frame")
        outputs.finish(_document(item, model, segmenter, reader.rate, every, done, failure))
    finally:
        outputs.close()
        reader.close()
    return done, failure


def is_done(item: VideoItem, formats: Sequence[str], model: Path, segmenter: Segmenter, every: int) -> bool:
    """Whether a video's files are there, of this model, task and vocabulary as far as they say, and without error."""
    files = item.files(formats)
    if not all(path.exists() for path in files):
        return False
    if item.named("_segments.json") not in files:
        return True
    try:
        document = json.loads(read_text(item.named("_segments.json")))
    except (ITAError, ValueError):
        return False
    expected = {
        "video": str(item.path),
        "model": str(model),
        "task": segmenter.task,
        "vocabulary": segmenter.classes,
        "every": every,
        "error": None,
    }
    return isinstance(document, dict) and all(document.get(key, 0) == one for key, one in expected.items())


class _FrameError(Exception):
    """A frame that could not be read or segmented: what was done before is kept."""


def _predictions(
    segmenter: Segmenter, frames: Iterator[Frame], batch_size: int
) -> Iterator[tuple[Frame, Prediction]]:
    batch: list[Frame] = []
    failure: ITAError | None = None
    while failure is None:
        try:
            frame = next(frames, None)
        except ITAError as error:
            frame, failure = None, error
        if frame is not None:
            batch.append(frame)
        if batch and (frame is None or len(batch) == batch_size):
            results = segmenter.segment([one.image for one in batch])
            for one, result in zip(batch, results, strict=True):
                if isinstance(result, ITAError):
                    raise _FrameError(f"frame {one.index}: {result}") from result
                yield one, result
            batch = []
        if frame is None and failure is None:
            return
    raise _FrameError(str(failure)) from failure


def _document(
    item: VideoItem,
    model: Path,
    segmenter: Segmenter,
    rate: Fraction,
    every: int,
    done: int,
    failure: ITAError | None,
) -> dict[str, Any]:
    return {
        "video": str(item.path),
        "model": str(model),
        "task": segmenter.task,
        "vocabulary": segmenter.classes,
        "frame_rate": round(float(rate), 4),
        "every": every,
        "frames": done,
        "error": None if failure is None else one_line(failure),
    }


class _Outputs:
    """A video's files under temporary names, renamed at the end."""

    def __init__(self, item: VideoItem, formats: Sequence[str], rate: Fraction, segmenter: Segmenter):
        self._item, self._formats, self._rate = item, formats, rate
        self._labels = [names[0] for names in segmenter.classes]
        self._tracks = None if segmenter.task == "semantic" else Tracks()
        self._video: VideoWriter | None = None
        self._size = (0, 0)
        self._stack = ExitStack()
        try:
            item.base.parent.mkdir(parents=True, exist_ok=True)
            if self._describes:
                self._lines = self._stack.enter_context(
                    self._temporary("_frames.jsonl").open("w", encoding="utf-8")
                )
            if "labels" in formats:
                shutil.rmtree(self._temporary("_labels"), ignore_errors=True)
                self._temporary("_labels").mkdir()
        except OSError as error:
            raise ITAError(f"cannot write {error.filename}: {error.strerror or error}") from error

    @property
    def _describes(self) -> bool:
        return "segments" in self._formats or "coco" in self._formats

    def _temporary(self, ending: str) -> Path:
        path = self._item.named(ending)
        return path.with_name(f".{path.name}.tmp")

    def add(self, frame: Frame, prediction: Prediction) -> None:
        label_map, segments = prediction.label_map, prediction.document["segments"]
        if self._tracks is not None:
            label_map, segments = self._tracks.follow(label_map, segments)
        if "overlay" in self._formats:
            self._add_overlay(frame.image, label_map, segments)
        if "labels" in self._formats:
            write_files({self._temporary("_labels") / f"{frame.index:06d}.png": label_png(label_map)})
        if self._describes:
            line = {"frame": frame.index, "time": frame.time, "segments": segments}
            if "coco" in self._formats:
                line["run_lengths"] = prediction.run_lengths
            try:
                self._lines.write(json.dumps(line, ensure_ascii=False) + "\n")
            except OSError as error:
                raise ITAError(f"cannot write {self._lines.name}: {error.strerror or error}") from error

    def _add_overlay(self, image: Image.Image, label_map: Any, segments: list[dict[str, Any]]) -> None:
        entries = [(one["id"], one["label"], one["score"]) for one in segments]
        painted, present = paint_segments(image, label_map, entries)
        if self._video is None:
            self._size = painted.size
            path = self._temporary("_overlay.mp4")
            self._video = VideoWriter(path, self._rate, self._canvas_size())
        if painted.size != self._size:  # a stream may change its size; a file of ours does not
            painted = painted.resize(self._size)
        canvas = Image.new("RGB", self._canvas_size(), (255, 255, 255))
        canvas.paste(painted, (0, 0))
        draw_legend(canvas, self._size[0], present)
        self._video.write(canvas)

    def _canvas_size(self) -> tuple[int, int]:
        """The frame and a strip for the longest name that may come, even as the encoders need it."""
        width = self._size[0] + legend_width(self._labels)
        return width + width % 2, self._size[1] + self._size[1] % 2

    def finish(self, document: dict[str, Any]) -> None:
        """Gives the files their names; the description comes last."""
        if self._video is not None:
            self._video.close()
        self._stack.close()
        endings = {"overlay": "_overlay.mp4", "labels": "_labels"}
        moved = [endings[one] for one in self._formats if one in endings]
        try:
            for ending in [*moved, *(["_frames.jsonl"] if self._describes else [])]:
                target = self._item.named(ending)
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(self._temporary(ending), target)
        except OSError as error:
            raise ITAError(f"cannot write {error.filename}: {error.strerror or error}") from error
        if self._describes:
            write_files({self._item.named("_segments.json"): json_bytes(document)})

    def close(self) -> None:
        """Leaves nothing temporary."""
        self._stack.close()
        shutil.rmtree(self._temporary("_labels"), ignore_errors=True)
        for ending in ("_overlay.mp4", "_frames.jsonl"):
            self._temporary(ending).unlink(missing_ok=True)


def legend_width(labels: Iterable[str]) -> int:
    """Pixels that a legend of any of these names needs."""
    font = ImageFont.load_default(TEXT_SIZE)
    longest = max((font.getlength(f"{_short(label)}  0.00") for label in labels), default=0)
    return int(longest) + 3 * MARGIN + TEXT_SIZE


def draw_legend(canvas: Image.Image, left: int, entries: Sequence[LegendEntry]) -> None:
    """Writes as many entries as there is room for, right of `left`; largest areas are chosen, in the order of ids, so
    that a line does not jump from frame to frame.

    entries: largest first.
    """
    rows = max(1, (canvas.height - MARGIN) // ROW_HEIGHT)
    font, draw = ImageFont.load_default(TEXT_SIZE), ImageDraw.Draw(canvas)
    for row, (index, label, score) in enumerate(sorted(entries[:rows], key=lambda entry: entry[0])):
        x, y = left + MARGIN, MARGIN + row * ROW_HEIGHT
        draw.rectangle((x, y, x + TEXT_SIZE, y + TEXT_SIZE), fill=color_of(index))
        text = _short(label) if score is None else f"{_short(label)}  {score:.2f}"
        draw.text(
            (x + TEXT_SIZE + MARGIN, y + TEXT_SIZE // 2), text, fill=(24, 24, 24), font=font, anchor="lm"
        )


def _short(label: str) -> str:
    label = " ".join(label.split())
    return label if len(label) <= MAX_LEGEND_CHARACTERS else label[: MAX_LEGEND_CHARACTERS - 1] + "…"
