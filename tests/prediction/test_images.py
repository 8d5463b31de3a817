"""Many images: where they come from, batches, what was done before, segments that keep their ids."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ita_segmentation.checkpoints import load_checkpoint
from ita_segmentation.errors import ITAError
from ita_segmentation.images import read_image
from ita_segmentation.prediction import Segmenter, Tracks, find_sources
from ita_segmentation.prediction.image_files import empty_line
from ita_segmentation.prediction.segmenter import SegmentedImage
from ita_segmentation.prediction.sources import output_names
from ita_segmentation.prediction.tracks import MEMORY


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Where images come from


def test_a_pattern_finds_images_and_videos_at_any_depth_and_nothing_else(tmp_path, noise):
    wanted = [noise(tmp_path / name) for name in ("a.jpg", "b/c.png", "b/d/e.jpg")]
    (tmp_path / "b" / "clip.mp4").touch()
    (tmp_path / "b" / "notes.txt").touch()
    found = find_sources([tmp_path / "**" / "*"])
    assert sorted(found) == sorted([*wanted, tmp_path / "b" / "clip.mp4"])
    assert find_sources([tmp_path / "**" / "*.png", wanted[1]]) == [wanted[1]]
    with pytest.raises(ITAError, match=r"no image or video matches .*\*\.gif"):
        find_sources([tmp_path / "*.gif"])


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path, noise):
    path = noise(tmp_path / "a[1].png")
    noise(tmp_path / "a1.png")
    assert find_sources([path]) == [path]


def test_named_pipes_are_not_waited_for(predict, tmp_path, noise, capsys):
    source = tmp_path / "in"
    noise(source / "a.png")
    os.mkfifo(source / "pipe.png")
    with pytest.raises(ITAError, match=r"pipe\.png is not a regular file"):
        find_sources([source / "pipe.png"])
    assert predict("--images", source, "--output", tmp_path / "out", "--format", "labels") == 0
    assert predict("--dataset", source, "--output", tmp_path / "shards") == 0
    assert capsys.readouterr().out.count("1 image segmented") == 2


def test_names_are_told_apart_whatever_their_case_and_suffix():
    paths = [Path("x/a.png"), Path("y/A.jpg"), Path("z/a.png"), Path("a_2.png")]
    assert output_names(paths) == ["a", "A_3", "a_4", "a_2"]


def test_names_at_the_limit_of_the_file_system_and_names_that_are_not_utf_8(predict, tmp_path, noise, capsys):
    source, output = tmp_path / "in", tmp_path / "out"
    given = [noise(source / f"{letter * 83}.png") for letter in "木林"]  # 253 bytes each
    given += [noise(source / f"{'x' * 240}.png"), noise(source / os.fsdecode(b"caf\xe9.png"))]
    assert predict("--images", *given, "--output", output, "--format", "segments", "labels") == 0
    files = list(output.glob("*_segments.json"))
    assert len(files) == 4
    images = {json.loads(path.read_text(encoding="utf-8"))["image"] for path in files}
    assert str(source / r"caf\xe9.png") in images
    assert predict("--dataset", source, "--output", tmp_path / "shards") == 0
    (source / os.fsdecode(b"bad\xe9.png")).write_text("no image")
    assert predict("--images", source, "--output", output) == 1
    printed = capsys.readouterr().err
    assert r"bad\xe9.png" in printed
    assert "is not an image" in printed


# Batches


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_a_batch_of_different_sizes_gives_the_files_of_single_images(task, predict, tmp_path, noise):
    for index, size in enumerate([(48, 40), (40, 90), (30, 20), (48, 40), (100, 33)]):
        noise(tmp_path / "in" / f"{index}.png", size, seed=index)
    given = ["--images", tmp_path / "in", "--task", task, "--threshold", 0, "--format", "labels", "coco"]
    assert predict(*given, "--output", tmp_path / "one") == 0
    assert predict(*given, "--output", tmp_path / "batch", "--batch_size", "2") == 0
    one, batch = contents(tmp_path / "one"), contents(tmp_path / "batch")
    assert one.keys() == batch.keys()
    assert all(one[name] == batch[name] for name in one if name.endswith(".png"))
    for name in (name for name in one if name.endswith("_coco.json")):
        mine, theirs = (json.loads(files[name])["annotations"] for files in (one, batch))
        assert [entry["segmentation"] for entry in mine] == [entry["segmentation"] for entry in theirs]


def test_as_many_classes_as_images_are_still_one_vocabulary(predict, tmp_path, noise):
    for index in range(2):
        noise(tmp_path / "in" / f"{index}.png", seed=index)
    names = ["--classes", "cat|kitten; sofa|couch", "--batch_size", 2, "--format", "segments"]
    assert predict("--images", tmp_path / "in", "--output", tmp_path / "out", *names) == 0
    for path in (tmp_path / "out").iterdir():
        assert json.loads(path.read_text())["vocabulary"] == [["cat", "kitten"], ["sofa", "couch"]]


def test_a_batch_that_memory_does_not_hold_is_done_one_by_one(loaded, monkeypatch):
    model, processor = loaded
    segmenter = Segmenter(model, processor)
    forward = type(model).forward

    def small_memory(self, pixel_values, *arguments, **options):
        if len(pixel_values) > 1 or pixel_values.shape[-1] > 64:
            raise MemoryError
        return forward(self, pixel_values, *arguments, **options)

    monkeypatch.setattr(type(model), "forward", small_memory)
    small, wide = Image.new("RGB", (64, 64)), Image.new("RGB", (128, 64))
    first, second, third = segmenter.segment_images([small, wide, small])
    assert first.label_map.tolist() == third.label_map.tolist()
    assert "not enough memory for an image of 128 x 64" in str(second)


def test_results_are_on_disk_before_the_next_batch_is_read(predict, tmp_path, noise, monkeypatch):
    for index in range(4):
        noise(tmp_path / "in" / f"{index}.png")
    seen, segment = [], Segmenter.segment_images

    def watching(self, images):
        seen.append(len(list((tmp_path / "out").glob("*_labels.png"))))
        return segment(self, images)

    monkeypatch.setattr(Segmenter, "segment_images", watching)
    given = ["--batch_size", 2, "--format", "labels"]
    predict("--images", tmp_path / "in", "--output", tmp_path / "out", *given)
    assert seen == [0, 2]


# Stuff, and nothing found


def test_the_caller_says_which_classes_are_stuff(loaded):
    model, processor = loaded
    image = Image.fromarray(np.random.default_rng(3).integers(0, 255, (64, 96, 3), np.uint8))

    def found(stuff, task="instance"):
        segmenter = Segmenter(model, processor, task=task, threshold=0.0, stuff=stuff, keep_overlaps=True)
        [result] = segmenter.segment_images([image])
        return {result.vocabulary[segment.label_id][0] for segment in result.masks()}

    everything = found([])
    assert len(everything) > 1
    one = sorted(everything)[0]
    assert found([one.upper()]) == everything - {one}
    with pytest.raises(ITAError, match="'horse' is named as stuff but is not among the classes"):
        found(["horse"])


SHIPPED = Path(__file__).parents[2] / "models" / "ita-tiny"


@pytest.fixture(scope="module")
def shipped():
    return load_checkpoint(SHIPPED, "cpu")


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_a_class_that_is_not_there_gets_nothing_and_one_that_is_keeps_its_place(task, shipped):
    """The scene has concrete, water, a skateboard, a teddy bear and french fries."""
    image = read_image(SHIPPED.parents[1] / "examples" / "scene_1.png")
    [absent] = Segmenter(*shipped, [["purple submarine"]], task).segment_images([image])
    assert absent.segments == []
    assert absent.best_guesses[0][0] == "purple submarine"
    assert absent.best_guesses[0][1] < 0.5
    [alone] = Segmenter(*shipped, [["teddy bear"]], task, threshold=0.5).segment_images([image])
    assert {one["label"] for one in alone.segments} == {"teddy bear"}
    assert 0.5 <= alone.segments[0]["score"] <= 1
    assert 0.15 < alone.segments[0]["area"] / (image.width * image.height) < 0.25
    [forced] = Segmenter(*shipped, [["purple submarine"]], "semantic", 0.0, distractors=False).segment_images(
        [image]
    )
    assert forced.segments[0]["area"] == image.width * image.height, "as the benchmarks have it"


def test_a_label_map_without_a_class_has_its_highest_value(shipped):
    image = read_image(SHIPPED.parents[1] / "examples" / "scene_2.jpg")
    [result] = Segmenter(*shipped, [["zebra"]]).segment_images([image])
    assert set(np.unique(result.label_map).tolist()) == {0, 255}


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_an_image_without_a_segment_is_said_with_the_best_guesses(task, predict, tmp_path, noise, capsys):
    path = noise(tmp_path / "a.png")
    given = ["--task", task, "--threshold", 1, "--format", "segments"]
    assert predict("--images", path, "--output", tmp_path / "out", *given) == 0
    first, last = capsys.readouterr().out.splitlines()[-2:]
    assert first.startswith("1 image segmented, 1 of them without a segment: see ")
    assert last.startswith(f"{path}: 0 segments above 1; best guesses: ")
    if task == "instance":
        assert "sky" not in last, "stuff cannot be found as an instance"


# What was done before


def test_resume_skips_what_was_done_the_same_way(predict, tmp_path, noise, capsys):
    for name in "abc":
        noise(tmp_path / "in" / f"{name}.png")
    given = ["--images", tmp_path / "in", "--output", tmp_path / "out", "--task", "panoptic"]
    assert predict(*given) == 0
    (tmp_path / "out" / "b_labels.png").unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert predict(*given, "--resume") == 0
    printed = capsys.readouterr().out
    assert "1 image segmented" in printed
    assert "2 skipped" in printed
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"b_overlay.png", "b_segments.json"}
    for other in (["--classes", "cat, dog"], ["--threshold", 0.3], ["--stuff", "dog"]):
        assert predict(*given, "--resume", *other) == 0
        assert "3 images segmented" in capsys.readouterr().out


def test_resume_says_which_settings_make_it_repeat_work(predict, tmp_path, noise, capsys):
    given = ["--images", noise(tmp_path / "a.png"), "--output", tmp_path / "out", "--resume"]
    assert predict(*given) == 0
    assert "not skipped" not in capsys.readouterr().out
    assert predict(*given, "--threshold", 0.3, "--task", "panoptic") == 0
    printed = capsys.readouterr().out
    assert "1 not skipped: their results were made otherwise (different: task, threshold)" in printed


def test_no_class_is_stuff_where_the_names_of_stuff_are_empty(predict, tmp_path, noise):
    given = ["--images", noise(tmp_path / "a.png"), "--output", tmp_path / "out", "--task", "panoptic"]
    assert predict(*given, "--stuff", "") == 0
    assert json.loads((tmp_path / "out" / "a_segments.json").read_text())["stuff_ids"] == []


# Segments that keep their ids


def entry(number: int, label: int) -> dict:
    return {"id": number, "label_id": label}


def test_a_segment_that_moves_a_little_keeps_its_id():
    tracks = Tracks()
    first = np.zeros((4, 8), np.uint8)
    first[:, :4], first[:, 6:] = 1, 2
    second = np.zeros((4, 8), np.uint8)
    second[:, 1:5], second[:, 6:] = 2, 1  # the network's order changed, and the left one moved
    tracks.follow(first, [entry(1, 0), entry(2, 1)])
    lasting, segments = tracks.follow(second, [entry(1, 1), entry(2, 0)])
    assert [segment["id"] for segment in segments] == [2, 1]
    assert lasting[0].tolist() == [0, 1, 1, 1, 1, 0, 2, 2]


def test_a_segment_that_is_gone_for_a_moment_comes_back_with_its_id():
    tracks = Tracks()
    there, gone = np.zeros((2, 6), np.uint8), np.zeros((2, 6), np.uint8)
    there[:, :2] = 1
    gone[:, 4:] = 1
    tracks.follow(there, [entry(1, 0)])
    tracks.follow(gone, [entry(1, 0)])
    lasting, segments = tracks.follow(there, [entry(1, 0)])
    assert [segment["id"] for segment in segments] == [1]
    assert lasting.tolist() == there.tolist()
    for _ in range(MEMORY + 1):
        tracks.follow(gone, [entry(1, 0)])
    assert tracks.follow(there, [entry(1, 0)])[1][0]["id"] == 3


def test_another_class_or_another_place_is_a_new_segment():
    tracks = Tracks()
    first, second = np.zeros((2, 6), np.uint8), np.zeros((2, 6), np.uint8)
    first[:, :2], second[:, :2], second[:, 4:] = 1, 1, 2
    tracks.follow(first, [entry(1, 0)])
    _, segments = tracks.follow(second, [entry(1, 5), entry(2, 0)])
    assert [segment["id"] for segment in segments] == [2, 3]
    assert tracks.follow(np.zeros((3, 3), np.uint8), [])[1] == []


@pytest.mark.parametrize(
    ("score", "end"), [(0.4, "cat 0.40"), (0.6, "cat 0.60; those above it won too few pixels")]
)
def test_a_guess_above_the_threshold_that_is_no_segment_is_explained(score, end):
    result = SegmentedImage(
        np.zeros((2, 2), np.uint8), "panoptic", [["cat"]], [], best_guesses=[("cat", score)]
    )
    line = empty_line(result, SimpleNamespace(threshold=0.5))
    assert line == f"0 segments above 0.5; best guesses: {end}"
