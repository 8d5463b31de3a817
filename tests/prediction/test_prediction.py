"""Many images: where they come from, batches, what was done before, segments that keep their ids."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.tiny_checkpoint import save_tiny_checkpoint
from ita_segmentation.checkpoints import load_checkpoint
from ita_segmentation.cli import predict as run_predict
from ita_segmentation.errors import ITAError
from ita_segmentation.prediction.segmenter import Segmenter
from ita_segmentation.prediction.sources import find_sources
from ita_segmentation.prediction.tracks import MEMORY, Tracks


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_checkpoint(checkpoint, "cpu")


@pytest.fixture
def predict(checkpoint, loaded, monkeypatch):
    monkeypatch.setattr(run_predict, "load_checkpoint", lambda path, device: loaded)
    return lambda *arguments: run_predict.predict(["--model", str(checkpoint), *map(str, arguments)])


def image(path: Path, size=(48, 40), seed=0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Where images come from


def test_a_pattern_finds_images_and_videos_at_any_depth_and_nothing_else(tmp_path):
    wanted = [image(tmp_path / name) for name in ("a.jpg", "b/c.png", "b/d/e.jpg")]
    (tmp_path / "b" / "clip.mp4").touch()
    (tmp_path / "b" / "notes.txt").touch()
    found = find_sources([tmp_path / "**" / "*"])
    assert sorted(found) == sorted([*wanted, tmp_path / "b" / "clip.mp4"])
    assert find_sources([tmp_path / "**" / "*.png", wanted[1]]) == [wanted[1]]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    path = image(tmp_path / "a[1].png")
    image(tmp_path / "a1.png")
    assert find_sources([path]) == [path]


def test_a_pattern_that_matches_nothing_is_said(tmp_path):
    with pytest.raises(ITAError, match=r"no image or video matches .*\*\.jpg"):
        find_sources([tmp_path / "*.jpg"])


# Batches


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_a_batch_of_different_sizes_gives_the_files_of_single_images(task, predict, tmp_path):
    sizes = [(48, 40), (40, 90), (30, 20), (48, 40), (100, 33)]
    for index, size in enumerate(sizes):
        image(tmp_path / "in" / f"{index}.png", size, seed=index)
    threshold = [] if task == "semantic" else ["--threshold", "0"]
    given = [
        "--images",
        tmp_path / "in",
        "--task",
        task,
        *threshold,
        "--format",
        "labels",
        "coco",
        "segments",
    ]
    assert predict(*given, "--output", tmp_path / "one") == 0
    assert predict(*given, "--output", tmp_path / "batch", "--batch_size", "2") == 0
    one, batch = contents(tmp_path / "one"), contents(tmp_path / "batch")
    assert one.keys() == batch.keys()
    assert all(one[name] == batch[name] for name in one if name.endswith(".png"))
    for name in (name for name in one if name.endswith("_coco.json")):
        mine, theirs = json.loads(one[name]), json.loads(batch[name])
        assert [entry["segmentation"] for entry in mine["annotations"]] == [
            entry["segmentation"] for entry in theirs["annotations"]
        ]


def test_as_many_classes_as_images_are_still_one_vocabulary(predict, tmp_path):
    for index in range(2):
        image(tmp_path / "in" / f"{index}.png", seed=index)
    words = ["--classes", "cat|kitten, sofa|couch", "--batch_size", 2, "--format", "segments"]
    assert predict("--images", tmp_path / "in", "--output", tmp_path / "out", *words) == 0
    for path in (tmp_path / "out").iterdir():
        assert json.loads(path.read_text())["vocabulary"] == [["cat", "kitten"], ["sofa", "couch"]]


def test_a_broken_image_in_a_batch_leaves_the_others_alone(predict, tmp_path, capsys):
    for name in ("a.png", "c.png"):
        image(tmp_path / "in" / name)
    (tmp_path / "in" / "b.png").write_text("no image")
    output = tmp_path / "out"
    assert (
        predict("--images", tmp_path / "in", "--output", output, "--batch_size", 3, "--format", "labels") == 1
    )
    assert sorted(contents(output)) == ["a_labels.png", "c_labels.png"]
    assert "1 of 3 images failed" in capsys.readouterr().err


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
    first, second, third = segmenter.segment([small, wide, small])
    assert first.label_map.tolist() == third.label_map.tolist()
    assert "not enough memory for an image of 128 x 64" in str(second)


# What was done before


def test_resume_passes_over_what_is_done_and_does_what_is_not(predict, tmp_path, capsys):
    for name in "abc":
        image(tmp_path / "in" / f"{name}.png")
    given = ["--images", tmp_path / "in", "--output", tmp_path / "out"]
    assert predict(*given) == 0
    (tmp_path / "out" / "b_labels.png").unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert predict(*given, "--resume") == 0
    printed = capsys.readouterr().out
    assert "1 image segmented" in printed
    assert "2 passed over" in printed
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"b_overlay.png", "b_segments.json"}
    assert predict(*given, "--resume", "--classes", "cat, dog") == 0
    assert "3 images segmented" in capsys.readouterr().out


def test_without_resume_everything_is_done_again(predict, tmp_path, capsys):
    given = ["--images", image(tmp_path / "a.png"), "--output", tmp_path / "out", "--format", "labels"]
    assert predict(*given) == predict(*given) == 0
    assert "passed over" not in capsys.readouterr().out


def test_results_are_on_disk_before_the_next_batch_is_read(predict, loaded, tmp_path, monkeypatch):
    for index in range(4):
        image(tmp_path / "in" / f"{index}.png")
    seen, segment = [], Segmenter.segment

    def watching(self, images):
        seen.append(len(list((tmp_path / "out").glob("*_labels.png"))))
        return segment(self, images)

    monkeypatch.setattr(Segmenter, "segment", watching)
    predict(
        "--images", tmp_path / "in", "--output", tmp_path / "out", "--batch_size", 2, "--format", "labels"
    )
    assert seen == [0, 2]


def test_a_coco_file_of_an_image_holds_its_masks(predict, tmp_path):
    mask_utils = pytest.importorskip("pycocotools.mask")
    output = tmp_path / "out"
    path = image(tmp_path / "a.png")
    assert predict("--images", path, "--output", output, "--format", "coco", "labels") == 0
    document = json.loads((output / "a_coco.json").read_text())
    labels = np.array(Image.open(output / "a_labels.png"))
    assert document["images"] == [{"id": "a", "file_name": str(path), "width": 48, "height": 40}]
    assert [category["name"] for category in document["categories"]] == ["sky", "dog", "grass", "car"]
    for entry in document["annotations"]:
        mask = mask_utils.decode(entry["segmentation"]).astype(bool)
        assert (mask == (labels == entry["category_id"] - 1)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--every", "2"], "for videos"),
        (["--split", "train"], "--split is for --dataset"),
        (["--id_column", "name"], "--id_column is for --dataset"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(arguments, message, predict, tmp_path):
    with pytest.raises(ITAError, match=message):
        predict("--images", image(tmp_path / "a.png"), "--output", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


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
    _, segments = tracks.follow(np.zeros((3, 3), np.uint8), [])
    assert segments == []
