"""Read the frames of a video file and write a video file, with PyAV."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.files import path_text

ENCODERS = ("libx264", "mpeg4")
DEFAULT_RATE = Fraction(25)
MISSING_FRAMES, MISSING_SHARE = 3, 0.02
"""A video that ends this much before its stated end was cut off, and one that lacks this much is damaged."""


@dataclass(frozen=True)
class Frame:
    """A frame of a video.

    Attributes:
        index: its number, from 0.
        time: in seconds, from the first frame.
        image: RGB, upright.
    """

    index: int
    time: float
    image: Image.Image


class VideoReader:
    """The frames of a video, upright, in order of time."""

    def __init__(self, path: Path):
        import av

        self._av, self._name = av, path_text(path)
        try:
            self._container = self._av.open(str(path))
        except (self._av.FFmpegError, OSError, ValueError) as error:
            raise ITAError(f"{self._name} cannot be read as a video: {one_line(error, 160)}") from error
        if not self._container.streams.video:
            self._container.close()
            raise ITAError(f"{self._name} has no images in it: no video stream")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.rate = Fraction(self._stream.average_rate or DEFAULT_RATE)

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def frames(self, every: int = 1) -> Iterator[Frame]:
        """Yield frames 0, `every`, 2 `every`, ..."""
        index, first, last = 0, 0.0, 0.0
        try:
            for frame in self._container.decode(self._stream):
                last = float(frame.time) if frame.time is not None else float(index / self.rate)
                first = last if index == 0 else first
                if index % every == 0:
                    yield Frame(index, round(last - first, 6), _upright(frame))
                index += 1
        except (self._av.FFmpegError, OSError, ValueError) as error:
            raise ITAError(
                f"{self._name} cannot be read beyond frame {index}: {one_line(error, 160)}"
            ) from error
        if not index:
            raise ITAError(f"{self._name} cannot be read as a video: it holds no frame")
        length, stated = self._stated_seconds(), self._stream.frames
        missing = 0.0 if length is None else length - (last - first) - float(1 / self.rate)
        if length is not None and missing > max(float(MISSING_FRAMES / self.rate), MISSING_SHARE * length):
            raise ITAError(
                f"{self._name} is cut off: it ends {missing:.1f} s before its time, after frame {index}"
            )
        if stated - index > max(MISSING_FRAMES, MISSING_SHARE * stated):
            raise ITAError(f"{self._name} is damaged: only {index} of its {stated} frames can be read")

    def _stated_seconds(self) -> float | None:
        """The length that the file states for its video stream: Matroska has it in the stream's metadata."""
        if self._stream.duration and self._stream.time_base:
            return float(self._stream.duration * self._stream.time_base)
        stated = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", self._stream.metadata.get("DURATION", ""))
        if stated:
            hours, minutes, seconds = map(float, stated.groups())
            return 3600 * hours + 60 * minutes + seconds
        if self._container.duration and len(self._container.streams) == 1:
            return self._container.duration / self._av.time_base
        return None


class VideoWriter:
    """An MP4 file (H.264 where the encoder is there, else MPEG-4) of images of one size."""

    def __init__(self, path: Path, rate: Fraction, size: tuple[int, int]):
        import av

        self._av = av
        encoder = next((one for one in ENCODERS if one in self._av.codecs_available), None)
        if encoder is None:
            raise ITAError("this PyAV can write no video: it has neither an H.264 nor an MPEG-4 encoder")
        try:
            self._container = self._av.open(str(path), "w", format="mp4", options={"movflags": "faststart"})
        except (self._av.FFmpegError, OSError) as error:
            raise ITAError(f"cannot write {path}: {one_line(error, 160)}") from error
        # MPEG-4 allows no denominator above 65,535.
        stream: Any = self._container.add_stream(encoder, rate=rate.limit_denominator(1001))
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        self._stream = stream
        self._path = path

    def write(self, image: Image.Image) -> None:
        """Append an RGB image of the size that was given."""
        frame = self._av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24")
        self._mux(frame)

    def close(self) -> None:
        """Finish the file."""
        self._mux(None)
        self._container.close()

    def _mux(self, frame: Any) -> None:
        try:
            for packet in self._stream.encode(frame):
                self._container.mux(packet)
        except (self._av.FFmpegError, OSError) as error:
            raise ITAError(f"cannot write {self._path}: {one_line(error, 160)}") from error


def _upright(frame: Any) -> Image.Image:
    """The frame as a player shows it: turned as the file's display matrix says."""
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4  # counterclockwise, as numpy counts
    return Image.fromarray(np.ascontiguousarray(np.rot90(pixels, turns)))
