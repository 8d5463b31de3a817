"""Videos: every frame's segments, an overlay that plays as long, whatever is wrong with the file said in a line."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ita_segmentation.errors import ITAError

av = pytest.importorskip("av")
RATE, FRAMES = 10, 12


def clip(path: Path, container: str = "mp4", noise: bool = False, sound: bool = False) -> Path:
    """Twelve frames of 64 x 48 pixels: bright above, dark below."""
    generator = np.random.default_rng(0)
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size = 2
        track = output.add_stream("aac", rate=16_000, layout="mono") if sound else None
        for _ in range(FRAMES):
            pixels = np.zeros((48, 64, 3), np.uint8)
            pixels[:24] = 220
            if noise:
                pixels[:] = generator.integers(0, 255, pixels.shape, np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            if track is not None:
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.float32), "fltp", "mono")
                silence.sample_rate = 16_000
                output.mux(track.encode(silence))
        output.mux(stream.encode(None))
    return path


def quarter_turn(path: Path) -> Path:
    """Says in the file's display matrix that frames are to be turned clockwise, as a phone held upright does."""
    data = bytearray(path.read_bytes())
    matrix = data.find(b"tkhd") + 4 + 4 + 20 + 16  # behind version, times, ids, layer and volume
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(bytes(data))
    return path


def frames_of(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as video:
        return [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_video_becomes_a_video_and_a_line_for_each_frame(predict, tmp_path):
    output = tmp_path / "out"
    assert predict("--images", clip(tmp_path / "a.mp4"), "--output", output, "--batch_size", 5) == 0
    assert sorted(path.name for path in output.iterdir()) == [
        "a_frames.jsonl",
        "a_overlay.mp4",
        "a_segments.json",
    ]
    frames = frames_of(output / "a_overlay.mp4")
    assert len(frames) == FRAMES
    assert frames[0].shape[0] == 48
    assert frames[0].shape[1] > 64  # the legend
    lines = lines_of(output / "a_frames.jsonl")
    assert [line["frame"] for line in lines] == list(range(FRAMES))
    assert [line["time"] for line in lines] == pytest.approx([index / RATE for index in range(FRAMES)])
    assert all(sum(one["area"] for one in line["segments"]) == 64 * 48 for line in lines)
    document = json.loads((output / "a_segments.json").read_text())
    assert (document["frames"], document["frame_rate"], document["error"]) == (FRAMES, RATE, None)


def test_every_third_frame_plays_as_long_as_all(predict, tmp_path):
    output = tmp_path / "out"
    formats = ["--format", "overlay", "labels", "segments"]
    path = clip(tmp_path / "a.mp4")
    assert predict("--images", path, "--output", output, "--every", 3, *formats) == 0
    assert [line["frame"] for line in lines_of(output / "a_frames.jsonl")] == [0, 3, 6, 9]
    names = ["000000.png", "000003.png", "000006.png", "000009.png"]
    assert sorted(path.name for path in (output / "a_labels").iterdir()) == names
    with av.open(str(output / "a_overlay.mp4")) as video:
        stream = video.streams.video[0]
        assert float(stream.duration * stream.time_base) == pytest.approx(FRAMES / RATE, abs=0.01)
    labels = np.array(Image.open(output / "a_labels" / names[1]))
    line = lines_of(output / "a_frames.jsonl")[1]
    assert {one["id"]: one["area"] for one in line["segments"]} == {
        int(one): int((labels == one).sum()) for one in np.unique(labels)
    }


def test_a_turned_video_is_segmented_as_a_player_shows_it(predict, tmp_path):
    output = tmp_path / "out"
    path = quarter_turn(clip(tmp_path / "a.mp4"))
    assert predict("--images", path, "--output", output, "--format", "labels", "overlay", "--every", 6) == 0
    assert Image.open(output / "a_labels" / "000000.png").size == (48, 64)
    frame = frames_of(output / "a_overlay.mp4")[0]
    assert frame.shape[0] == 64
    # Turned clockwise, what was above is at the right.
    assert frame[4:60, 30:44].mean() > frame[4:60, 4:18].mean() + 40


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_segments_of_a_still_video_keep_their_ids(task, predict, tmp_path):
    output = tmp_path / "out"
    given = ["--task", task, "--threshold", 0, "--every", 4, "--format", "segments", "coco"]
    assert predict("--images", clip(tmp_path / "a.mp4"), "--output", output, *given) == 0
    first, *others = lines_of(output / "a_frames.jsonl")
    assert "run_lengths" in first
    for line in others:
        known = {one["id"]: one["label"] for one in first["segments"]}
        assert all(known.get(one["id"], one["label"]) == one["label"] for one in line["segments"])


def test_a_video_that_breaks_off_keeps_the_frames_before(predict, tmp_path):
    whole = clip(tmp_path / "whole.mkv", "matroska", noise=True).read_bytes()
    path, output = tmp_path / "cut.mkv", tmp_path / "out"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ITAError, match=r"cut\.mkv.*its first \d+ frames are done"):
        predict("--images", path, "--output", output)
    lines = lines_of(output / "cut_frames.jsonl")
    assert 0 < len(lines) < FRAMES
    assert len(frames_of(output / "cut_overlay.mp4")) == len(lines)
    assert json.loads((output / "cut_segments.json").read_text())["error"]
    assert not [path for path in output.iterdir() if path.name.startswith(".")]


def test_a_video_with_sound_that_breaks_off_is_named(predict, tmp_path):
    whole = clip(tmp_path / "whole.mkv", "matroska", noise=True, sound=True).read_bytes()
    path, output = tmp_path / "cut.mkv", tmp_path / "out"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ITAError, match=r"cut\.mkv is cut off"):
        predict("--images", path, "--output", output, "--every", 4)


def test_every_without_a_video_and_formats_of_images_alone_are_refused(predict, tmp_path, noise):
    with pytest.raises(ITAError, match="for videos"):
        predict("--images", noise(tmp_path / "a.png"), "--output", tmp_path / "out", "--every", 2)
    with pytest.raises(ITAError, match="label-studio is for images"):
        predict(
            "--images", clip(tmp_path / "a.mp4"), "--output", tmp_path / "out", "--format", "label-studio"
        )


@pytest.mark.parametrize("content", [b"", b"this is no video"])
def test_what_is_no_video_is_one_line_and_leaves_nothing(content, predict, tmp_path):
    path, output = tmp_path / "a.mp4", tmp_path / "out"
    path.write_bytes(content)
    with pytest.raises(ITAError, match=r"a\.mp4 cannot be read as a video"):
        predict("--images", path, "--output", output)
    assert not output.exists() or not list(output.iterdir())


def test_a_video_that_fails_stops_neither_images_nor_videos(predict, tmp_path, capsys):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    given = [tmp_path / "bad.mp4", clip(tmp_path / "good.mp4"), tmp_path / "a.png"]
    assert predict("--images", *given, "--output", tmp_path / "out", "--every", 6) == 1
    printed = capsys.readouterr()
    assert "1 image segmented" in printed.out
    assert "1 video (2 frames) segmented" in printed.out
    assert "1 of 3 files failed" in printed.err


def test_resume_skips_a_finished_video(predict, tmp_path, capsys):
    given = ["--images", clip(tmp_path / "a.mp4"), "--output", tmp_path / "out", "--every", 6]
    assert predict(*given) == 0
    capsys.readouterr()
    assert predict(*given, "--resume") == 0
    assert capsys.readouterr().out == "1 skipped: done before\n"
    assert predict(*given[:-1], 4, "--resume") == 0
    assert "3 frames" in capsys.readouterr().out
