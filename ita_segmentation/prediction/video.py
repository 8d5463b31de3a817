"""Segment a video: an overlay video whose colors stay, a line of JSON for each frame, label maps.

For a video NAME.mp4 the output folder gets
- NAME_overlay.mp4: the frames with their segments in color, and the legend of each at the right;
- NAME_frames.jsonl: a line for each frame: number, time in seconds, segments;
- NAME_segments.json: what is common to all frames; how many there are; "error" if the video ended in one;
- NAME_labels/000042.png on request: the label map of frame 42.
Ids of panoptic and instance segments last from frame to frame (see `Tracks`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image, ImageFont

from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.files import atomic_path, json_bytes, path_text, write_files
from ita_segmentation.prediction.formats import label_png, legend_of
from ita_segmentation.prediction.segmenter import SegmentedImage, Segmenter
from ita_segmentation.prediction.sources import InputFile
from ita_segmentation.prediction.tracks import Tracks
from ita_segmentation.prediction.video_files import Frame, VideoReader, VideoWriter
from ita_segmentation.visualization import (
    Color,
    LegendEntry,
    assign_colors,
    draw_legend_line,
    legend_text,
    paint_segments,
)

VIDEO_FORMATS = {
    "overlay": ("_overlay.mp4",),
    "labels": ("_labels",),
    "segments": ("_frames.jsonl", "_segments.json"),
    "coco": ("_frames.jsonl", "_segments.json"),
}
"""What a video's files are named after its own name, by format."""
DEFAULT_VIDEO_FORMATS = ("overlay", "segments")
TEXT_SIZE, ROW_HEIGHT, MARGIN = 15, 22, 8
"""Of the legend, in pixels."""
MAX_LEGEND_CHARACTERS = 24

RunLengths = Callable[[SegmentedImage], "list[dict[str, Any]]"]


def video_files(file: InputFile, formats: Sequence[str]) -> list[Path]:
    """List the files and folders that a video becomes."""
    return list(dict.fromkeys(file.result(ending) for one in formats for ending in VIDEO_FORMATS[one]))


def segment_video(
    segmenter: Segmenter,
    file: InputFile,
    formats: Sequence[str],
    settings: Mapping[str, Any],
    every: int = 1,
    batch_size: int = 1,
    progress: Callable[[int], object] = lambda frames: None,
    run_lengths: RunLengths | None = None,
) -> tuple[int, ITAError | None]:
    """Segment a video; what is done of a video that breaks off is kept.

    Args:
        segmenter: what segments the frames.
        file: the video.
        formats: of `VIDEO_FORMATS`.
        settings: what NAME_segments.json says of how it was made.
        every: frames 0, `every`, 2 `every`, ... are segmented; the overlay plays as long as the video.
        batch_size: frames in one pass.
        progress: called with the number of frames done since it was called last.
        run_lengths: gives the run lengths in each line of NAME_frames.jsonl, for the format "coco".

    Returns:
        the number of frames done, and what was wrong, if anything.

    Raises:
        ITAError: there is not one frame, or nothing can be written; no file is left then.
    """
    done, failure = 0, None
    with ExitStack() as stack:
        reader = VideoReader(file.path)
        stack.callback(reader.close)
        outputs = _Outputs(stack, file, formats, reader.rate / every, segmenter)
        try:
            for frame, result in _segmented_frames(segmenter, reader.frames(every), batch_size):
                outputs.add(frame, result, run_lengths)
                done += 1
                progress(1)
        except _FrameError as error:
            failure = ITAError(one_line(error))
        if not done:
            raise failure or ITAError(f"{path_text(file.path)} holds no frame")
        outputs.close()
    if file.result("_segments.json") in video_files(file, formats):
        document = {
            "video": path_text(file.path),
            **settings,
            "frame_rate": round(float(reader.rate), 4),
            "every": every,
            "frames": done,
            "error": None if failure is None else one_line(failure),
        }
        write_files({file.result("_segments.json"): json_bytes(document)})
    return done, failure


class _FrameError(Exception):
    """A frame that could not be read or segmented: what was done before is kept."""


def _segmented_frames(
    segmenter: Segmenter, frames: Iterator[Frame], batch_size: int
) -> Iterator[tuple[Frame, SegmentedImage]]:
    batch: list[Frame] = []
    failure: ITAError | None = None
    ended = False
    while not ended:
        try:
            frame = next(frames, None)
        except ITAError as error:
            frame, failure = None, error
        ended = frame is None
        if frame is not None:
            batch.append(frame)
        if batch and (ended or len(batch) == batch_size):
            for one, result in zip(
                batch, segmenter.segment_images([one.image for one in batch]), strict=True
            ):
                if isinstance(result, ITAError):
                    raise _FrameError(f"frame {one.index}: {result}") from result
                yield one, result
            batch = []
    if failure is not None:
        raise _FrameError(str(failure)) from failure


class _Outputs:
    """A video's files, which take their places when `stack` is closed without an error."""

    def __init__(
        self, stack: ExitStack, file: InputFile, formats: Sequence[str], rate: Fraction, segmenter: Segmenter
    ):
        endings = [ending for one in formats for ending in VIDEO_FORMATS[one] if ending != "_segments.json"]
        self._paths = {
            ending: stack.enter_context(atomic_path(file.result(ending))) for ending in set(endings)
        }
        self._rate = rate
        self._legend_width = legend_width(names[0] for names in segmenter.classes)
        self._tracks = None if segmenter.task == "semantic" else Tracks()
        self._colors: dict[int, Color] = {}
        self._video: VideoWriter | None = None
        self._size = (0, 0)
        try:
            if "_labels" in self._paths:
                self._paths["_labels"].mkdir()
            if "_frames.jsonl" in self._paths:
                lines = self._paths["_frames.jsonl"].open("w", encoding="utf-8")
                self._lines = stack.enter_context(lines)
        except OSError as error:
            raise ITAError(f"cannot write {file.base}: {error.strerror or error}") from error

    def add(self, frame: Frame, result: SegmentedImage, run_lengths: RunLengths | None) -> None:
        label_map, segments = result.label_map, result.segments
        if self._tracks is not None:
            label_map, segments = self._tracks.follow(label_map, segments)
        if "_overlay.mp4" in self._paths:
            self._add_overlay(frame.image, label_map, legend_of(segments))
        try:
            if "_labels" in self._paths:
                (self._paths["_labels"] / f"{frame.index:06d}.png").write_bytes(label_png(label_map))
            if "_frames.jsonl" in self._paths:
                line = {"frame": frame.index, "time": frame.time, "segments": segments}
                if run_lengths is not None:
                    line["run_lengths"] = run_lengths(result)
                self._lines.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise ITAError(f"cannot write the results: {error.strerror or error}") from error

    def _add_overlay(self, image: Image.Image, label_map: Any, legend: list[LegendEntry]) -> None:
        self._colors |= assign_colors((index for index, _, _ in legend), self._colors)
        painted, present = paint_segments(image, label_map, legend, colors=self._colors)
        if self._video is None:
            self._size = painted.size
            self._video = VideoWriter(self._paths["_overlay.mp4"], self._rate, self._canvas_size())
        if painted.size != self._size:  # a stream may change its size; a file of ours does not
            painted = painted.resize(self._size)
        canvas = Image.new("RGB", self._canvas_size(), (255, 255, 255))
        canvas.paste(painted, (0, 0))
        draw_legend(canvas, self._size[0], present, self._colors)
        self._video.write(canvas)

    def _canvas_size(self) -> tuple[int, int]:
        """The frame and a strip for the longest name that may come, even as the encoders need it."""
        width = self._size[0] + self._legend_width
        return width + width % 2, self._size[1] + self._size[1] % 2

    def close(self) -> None:
        """Finish the overlay video."""
        if self._video is not None:
            self._video.close()


def legend_width(labels: Iterable[str]) -> int:
    """Return the pixels that a legend of any of these names needs."""
    font = ImageFont.load_default(TEXT_SIZE)
    texts = (legend_text(label, 0.0, MAX_LEGEND_CHARACTERS) for label in labels)
    return int(max(map(font.getlength, texts), default=0)) + 3 * MARGIN + TEXT_SIZE


def draw_legend(
    canvas: Image.Image, left: int, entries: Sequence[LegendEntry], colors: Mapping[int, Color]
) -> None:
    """Draw as many entries as there is space for, to the right of `left`.

    The largest are chosen, in the order of ids, so that a line does not jump from frame to frame.
    """
    rows = max(1, (canvas.height - MARGIN) // ROW_HEIGHT)
    font = ImageFont.load_default(TEXT_SIZE)
    for row, (index, label, score) in enumerate(sorted(entries[:rows], key=lambda entry: entry[0])):
        corner = (left + MARGIN, MARGIN + row * ROW_HEIGHT)
        text = legend_text(label, score, MAX_LEGEND_CHARACTERS)
        draw_legend_line(canvas, corner, text, colors[index], font)
