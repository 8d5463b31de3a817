"""run_prepare: releases become whole data sets, or none; by any number of processes, after any interruption."""

import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet
import pytest
from PIL import Image

from helpers.miniature_releases import (
    build_ade20k_150,
    build_ade20k_847,
    build_coco_panoptic,
    build_pascal_context_59,
    build_pascal_context_459,
    save_png,
)
from helpers.miniature_streets import build_cityscapes, build_folder, build_pascal_voc, save_palette_png
from helpers.prepare_checks import files_of, looks_complete, many_images, run
from ita_segmentation.cli import prepare as run_prepare
from ita_segmentation.data.benchmarks.registry import RELEASES
from ita_segmentation.data.preparation import plan as prepare_plan
from ita_segmentation.data.preparation import prepare
from ita_segmentation.data.prepared import count_rows, load_prepared, sample_of

ROOT = Path(__file__).parents[2]
BUILDERS = {
    "ade20k-150": build_ade20k_150,
    "ade20k-847": build_ade20k_847,
    "pascal-context-59": build_pascal_context_59,
    "pascal-context-459": build_pascal_context_459,
    "pascal-voc-20": build_pascal_voc,
    "pascal-voc-21": lambda folder: build_pascal_voc(folder, "pascal-voc-21"),
    "coco-panoptic": build_coco_panoptic,
    "cityscapes": build_cityscapes,
    "folder": build_folder,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


# ------------------------------------------------------------------------------------------------------------
# What comes out


def test_every_benchmark_has_a_miniature_release():
    assert set(BUILDERS) == set(RELEASES)


@pytest.mark.parametrize("benchmark", BUILDERS)
def test_a_release_prepares_to_what_was_worked_out_by_hand(tmp_path, benchmark):
    expected = BUILDERS[benchmark](tmp_path / "release")
    assert run(benchmark, tmp_path / "release", tmp_path / "out") == 0
    for split, images in expected.items():
        rows = load_prepared(tmp_path / "out", split, streaming=True).decode(False)
        found = {row["image_id"]: row for row in rows}
        assert list(found) == list(images)
        for image_id, wanted in images.items():
            sample = sample_of(found[image_id])
            assert sample["label"].tolist() == wanted.label.tolist()
            assert wanted.image in (None, found[image_id]["image"]["bytes"])
            assert sample["segments"] == wanted.segments
            assert (sample["panoptic"] is None) == (wanted.panoptic is None)
            if wanted.panoptic is not None:
                assert sample["panoptic"].tolist() == wanted.panoptic.tolist()


def test_columns_come_in_order_and_tell_classes_and_things(tmp_path):
    build_cityscapes(tmp_path / "release")
    run("cityscapes", tmp_path / "release", tmp_path / "out")
    dataset = load_prepared(tmp_path / "out")
    assert dataset.column_names == [
        *("image", "label", "panoptic", "segments"),
        *("classes", "things", "ignore_index", "image_id"),
    ]
    row = dataset[0]
    names, things = dataset.features["classes"].feature, dataset.features["things"].feature
    assert len(names.names) == 19 and len(things.names) == 8
    assert names.int2str(row["classes"]) == [
        *("road", "sidewalk", "sky", "person", "rider", "car", "bicycle"),
    ]
    assert things.int2str(row["things"]) == ["person", "rider", "car", "bicycle"]
    assert row["ignore_index"] == 255 and row["image_id"] == "frankfurt_000000_000294"
    assert (row["label"].mode, row["panoptic"].mode) == ("L", "RGB")
    crowd = [segment["id"] for segment in row["segments"] if segment["iscrowd"]]
    assert crowd == [24]


def test_more_than_255_classes_are_stored_in_16_bits(tmp_path):
    build_folder(tmp_path / "mine", [f"class {number}" for number in range(300)])
    save_png(tmp_path / "mine/labels/a.png", [[299] * 6] * 3 + [[65535] * 6], np.uint16)
    run("folder", tmp_path / "mine", tmp_path / "out")
    row = load_prepared(tmp_path / "out")[0]
    assert row["label"].mode == "I;16" and row["ignore_index"] == 65535 and row["classes"] == [299]
    assert np.array(row["label"])[:, 0].tolist() == [299, 299, 299, 65535]


def test_a_release_without_thing_flags_or_segments_has_no_such_columns(tmp_path):
    build_folder(tmp_path / "mine")
    run("folder", tmp_path / "mine", tmp_path / "out")
    expected = ["image", "label", "classes", "ignore_index", "image_id"]
    assert load_prepared(tmp_path / "out").column_names == expected


def test_things_of_one_s_own_folder_are_those_of_its_class_file(tmp_path):
    build_folder(tmp_path / "mine", {"classes": ["cat", "dog", "grass"], "things": ["dog"]})
    run("folder", tmp_path / "mine", tmp_path / "out")
    dataset = load_prepared(tmp_path / "out")
    assert dataset.features["things"].feature.names == ["dog"]
    assert [row["things"] for row in dataset] == [[0], []]


def test_limit_takes_the_first_images_and_split_only_one(tmp_path):
    build_pascal_voc(tmp_path / "voc")
    run("pascal-voc-20", tmp_path / "voc", tmp_path / "out", "--limit", 1, "--split", "validation")
    assert [row["image_id"] for row in load_prepared(tmp_path / "out")] == ["2008_000002"]
    assert sorted(path.name for path in (tmp_path / "out/data").glob("*.parquet")) == [
        "validation-00000-of-00001.parquet"
    ]


def test_a_split_can_be_added_and_the_other_stays(tmp_path):
    build_pascal_voc(tmp_path / "voc")
    run("pascal-voc-20", tmp_path / "voc", tmp_path / "out", "--split", "validation")
    before = files_of(tmp_path / "out/data")
    run("pascal-voc-20", tmp_path / "voc", tmp_path / "out", "--split", "train")
    run("pascal-voc-20", tmp_path / "voc", tmp_path / "both")
    name = "validation-00000-of-00001.parquet"
    assert files_of(tmp_path / "out") == files_of(tmp_path / "both")
    assert before[name] == files_of(tmp_path / "out/data")[name]
    assert count_rows(tmp_path / "out", "train") == 1 and count_rows(tmp_path / "out", "validation") == 2


def test_arguments_come_from_a_file_too(tmp_path):
    build_pascal_voc(tmp_path / "voc")
    text = f"source: {tmp_path}/voc\noutput: {tmp_path}/out\nsplit: train\nnum_proc: 1\n"
    (tmp_path / "prepare.yaml").write_text(text)
    assert run_prepare.prepare_benchmark(["pascal-voc-20", "--config", str(tmp_path / "prepare.yaml")]) == 0
    assert count_rows(tmp_path / "out", "train") == 1


def test_a_rotated_image_keeps_its_bytes_and_its_maps_turn_with_it(tmp_path):
    build_folder(tmp_path / "mine")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    pil_image = Image.new("RGB", (6, 4))
    pil_image.paste((250, 250, 250), (0, 0, 6, 1))  # the stored top row is white
    pil_image.save(tmp_path / "mine/images/a.jpg", quality=95, exif=exif)
    stored = (tmp_path / "mine/images/a.jpg").read_bytes()
    save_png(tmp_path / "mine/labels/a.png", [[1] * 6] + [[0] * 6] * 3)
    run("folder", tmp_path / "mine", tmp_path / "out")

    raw = next(iter(load_prepared(tmp_path / "out", streaming=True).decode(False)))
    assert raw["image"]["bytes"] == stored
    assert Image.open(io.BytesIO(raw["label"]["bytes"])).size == (6, 4)  # as stored
    upright = load_prepared(tmp_path / "out")[0]
    for image, label in (
        (upright["image"], np.array(upright["label"])),
        (sample_of(raw)["image"], sample_of(raw)["label"]),
        (sample_of(upright)["image"], sample_of(upright)["label"]),
    ):
        assert image.size == (4, 6) and label.shape == (6, 4)
        white = np.array(image.convert("L")) > 128
        assert white.tolist() == [[False, False, False, True]] * 6
        assert (label == 1).tolist() == white.tolist()


# ------------------------------------------------------------------------------------------------------------
# Processes, repetition and interruption


def test_any_number_of_processes_writes_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_plan, "IMAGES_PER_SHARD", 4)
    many_images(tmp_path / "mine", 10)
    run("folder", tmp_path / "mine", tmp_path / "one")
    run("folder", tmp_path / "mine", tmp_path / "two", "--num_proc", 2)
    one = files_of(tmp_path / "one")
    assert one == files_of(tmp_path / "two")
    assert [name for name in one if name.endswith("parquet")] == [
        f"data/train-0000{number}-of-00003.parquet" for number in range(3)
    ]


def test_a_shard_holds_few_rows_at_a_time(tmp_path):
    many_images(tmp_path / "mine", 70)
    run("folder", tmp_path / "mine", tmp_path / "out")
    metadata = pyarrow.parquet.read_metadata(tmp_path / "out/data/train-00000-of-00001.parquet")
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [32, 32, 6]


def test_a_second_run_does_nothing_and_says_so(tmp_path, capsys):
    build_pascal_voc(tmp_path / "voc")
    run("pascal-voc-20", tmp_path / "voc", tmp_path / "out")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    assert run("pascal-voc-20", tmp_path / "voc", tmp_path / "out") == 0
    assert "up to date" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == stamps


def test_a_changed_image_is_read_again_and_the_others_are_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_plan, "IMAGES_PER_SHARD", 2)
    many_images(tmp_path / "mine", 6)
    run("folder", tmp_path / "mine", tmp_path / "out")
    inodes = [path.stat().st_ino for path in sorted((tmp_path / "out/data").glob("*.parquet"))]
    save_png(tmp_path / "mine/labels/0003.png", [[1] * 8] * 8)
    capsys.readouterr()
    run("folder", tmp_path / "mine", tmp_path / "out")
    assert "up to date" not in capsys.readouterr().out
    after = [path.stat().st_ino for path in sorted((tmp_path / "out/data").glob("*.parquet"))]
    assert [old == new for old, new in zip(inodes, after, strict=True)] == [True, False, True]
    assert set(np.array(load_prepared(tmp_path / "out")[3]["label"]).ravel()) == {1}


def test_a_file_of_the_data_set_that_was_lost_is_written_again(tmp_path):
    build_pascal_voc(tmp_path / "voc")
    run("pascal-voc-20", tmp_path / "voc", tmp_path / "out")
    whole = files_of(tmp_path / "out")
    (tmp_path / "out/data/train-00000-of-00001.parquet").unlink()
    (tmp_path / "out/README.md").unlink()
    run("pascal-voc-20", tmp_path / "voc", tmp_path / "out")
    assert files_of(tmp_path / "out") == whole


SMALL_SHARDS = "from ita_segmentation.data import prepare_plan; prepare_plan.IMAGES_PER_SHARD = 4; "


def test_a_run_that_was_killed_goes_on_and_ends_as_an_unbroken_one(tmp_path, monkeypatch):
    """The second of three shards waits for an image that never comes; the run is killed when the others are done."""
    monkeypatch.setattr(prepare_plan, "IMAGES_PER_SHARD", 4)
    source, output = tmp_path / "mine", tmp_path / "out"
    many_images(source, 10)
    image = (source / "images/0005.png").read_bytes()
    (source / "images/0005.png").unlink()
    os.mkfifo(source / "images/0005.png")
    words = ["folder", "--source", source, "--output", output, "--num_proc", "2"]
    command = [
        sys.executable,
        "-c",
        SMALL_SHARDS + "from ita_segmentation.cli import prepare; prepare.main()",
        *map(str, words),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    finished: list[Path] = []
    while len(finished) < 2 and process.poll() is None:
        time.sleep(0.01)
        finished = list((output / ".incomplete/shards").glob("[0-9a-f]*.parquet"))
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()  # SIGKILL
    assert process.wait() == -9
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    assert not looks_complete(output)
    with pytest.raises(ValueError, match="was not finished"):
        load_prepared(output)

    (source / "images/0005.png").unlink()
    (source / "images/0005.png").write_bytes(image)
    kept = {path.stat().st_ino for path in finished}
    run("folder", source, output)
    assert kept < {path.stat().st_ino for path in (output / "data").iterdir()}
    run("folder", source, tmp_path / "unbroken")
    assert files_of(output) == files_of(tmp_path / "unbroken")


class Killed(BaseException):
    """Stands for a process that ends between two steps."""


@pytest.mark.parametrize("before", ["nothing", "other images", "another split"])
def test_ended_between_any_two_steps_a_data_set_is_whole_or_absent(tmp_path, monkeypatch, before):
    """`before`: what the output holds when the run begins; another split must stay."""
    source, first = tmp_path / "voc", tmp_path / "first"
    build_pascal_voc(source)
    words: list[Any] = ["pascal-voc-20", source]
    if before == "other images":
        run(*words, first)
        save_palette_png(source / "SegmentationClass/2008_000002.png", [[1] * 6] * 4)
    if before == "another split":
        run(*words, first, "--split", "validation")
    run(*words, tmp_path / "unbroken")
    unbroken = files_of(tmp_path / "unbroken")
    assert [name.split("-")[0] for name in unbroken] == [
        *("README.md", "data/.prepare.json", "data/train", "data/validation"),
    ]

    seen = []
    more = ["--split", "train"] if before == "another split" else []
    for step in range(100):
        output = tmp_path / f"out{step}"
        if before != "nothing":
            shutil.copytree(first, output)
        if not _run_and_end_at(step, monkeypatch, *words, output, *more):
            break
        data = files_of(output / "data") if (output / "data").exists() else None
        seen.append([None, files_of(first / "data"), files_of(tmp_path / "unbroken/data")].index(data))
        run(*words, output, *more)
        assert files_of(output) == unbroken
    assert len(seen) > 10 and seen[0] == int(before != "nothing") and seen[-1] == 2 and seen.count(0) >= 1


def _run_and_end_at(step: int, monkeypatch, *arguments: Any) -> bool:
    """Ends a run before one of its steps: a file renamed, linked or removed. False if it has fewer steps."""
    left = [step]

    def counted(work):
        def worked(*arguments, **options):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return work(*arguments, **options)

        return worked

    with monkeypatch.context() as patch:
        for module, name in ((os, "rename"), (os, "replace"), (os, "link"), (Path, "unlink")):
            patch.setattr(module, name, counted(getattr(module, name)))
        patch.setattr(prepare.shutil, "rmtree", counted(shutil.rmtree))
        try:
            run(*arguments)
        except Killed:
            return True
    return False
