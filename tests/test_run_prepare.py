"""run_prepare: releases become whole data sets, or none; by any number of processes, after any interruption."""

import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet
import pytest
from PIL import Image, PngImagePlugin

import run_prepare
from data_ita import prepare, prepare_plan
from data_ita.prepared import count_rows, load_prepared, sample_of
from data_ita.releases import RELEASES
from evaluation_ita.door import DoorError
from miniature_releases import (
    build_ade20k_150,
    build_ade20k_847,
    build_coco_panoptic,
    build_pascal_context_59,
    build_pascal_context_459,
    cut_off,
    save_png,
)
from miniature_streets import build_cityscapes, build_folder, build_pascal_voc, save_palette_png

ROOT = Path(__file__).parents[1]
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


def run(benchmark: str, source: Path, output: Path, *more: object) -> int:
    words = [benchmark, "--source", source, "--output", output, *more]
    return run_prepare.prepare_benchmark([str(word) for word in words])


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def looks_complete(output: Path) -> bool:
    return (output / "data").exists() or (output / "README.md").exists()


def many_pictures(source: Path, count: int, side: int = 8) -> None:
    """A user's folder of noise, so that each picture and label differs."""
    build_folder(source)
    for part in ("images", "labels"):
        for path in (source / part).iterdir():
            path.unlink()
    rng = np.random.default_rng(0)
    for number in range(count):
        save_png(source / f"images/{number:04d}.png", rng.integers(0, 256, (side, side, 3)))
        save_png(source / f"labels/{number:04d}.png", rng.integers(0, 3, (side, side)))


# ------------------------------------------------------------------------------------------------------------
# What comes out


def test_every_benchmark_has_a_miniature_release():
    assert set(BUILDERS) == set(RELEASES)


@pytest.mark.parametrize("benchmark", BUILDERS)
def test_a_release_prepares_to_what_was_worked_out_by_hand(tmp_path, benchmark):
    expected = BUILDERS[benchmark](tmp_path / "release")
    assert run(benchmark, tmp_path / "release", tmp_path / "out") == 0
    for split, pictures in expected.items():
        rows = load_prepared(tmp_path / "out", split, streaming=True).decode(False)
        found = {row["image_id"]: row for row in rows}
        assert list(found) == list(pictures)
        for image_id, wanted in pictures.items():
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


def test_limit_takes_the_first_pictures_and_split_only_one(tmp_path):
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


# ------------------------------------------------------------------------------------------------------------
# Processes, repetition and interruption


def test_any_number_of_processes_writes_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_plan, "PICTURES_PER_SHARD", 4)
    many_pictures(tmp_path / "mine", 10)
    run("folder", tmp_path / "mine", tmp_path / "one")
    run("folder", tmp_path / "mine", tmp_path / "two", "--num_proc", 2)
    one = files_of(tmp_path / "one")
    assert one == files_of(tmp_path / "two")
    assert [name for name in one if name.endswith("parquet")] == [
        f"data/train-0000{number}-of-00003.parquet" for number in range(3)
    ]


def test_a_shard_holds_few_rows_at_a_time(tmp_path):
    many_pictures(tmp_path / "mine", 70)
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


def test_a_changed_picture_is_read_again_and_the_others_are_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_plan, "PICTURES_PER_SHARD", 2)
    many_pictures(tmp_path / "mine", 6)
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


SMALL_SHARDS = "from data_ita import prepare_plan; prepare_plan.PICTURES_PER_SHARD = 4; "


def test_a_run_that_was_killed_goes_on_and_ends_as_an_unbroken_one(tmp_path, monkeypatch):
    """The second of three shards waits for a picture that never comes; the run is killed when the others are done."""
    monkeypatch.setattr(prepare_plan, "PICTURES_PER_SHARD", 4)
    source, output = tmp_path / "mine", tmp_path / "out"
    many_pictures(source, 10)
    picture = (source / "images/0005.png").read_bytes()
    (source / "images/0005.png").unlink()
    os.mkfifo(source / "images/0005.png")
    words = ["folder", "--source", source, "--output", output, "--num_proc", "2"]
    command = [
        sys.executable,
        "-c",
        SMALL_SHARDS + "import run_prepare; run_prepare.main()",
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
    (source / "images/0005.png").write_bytes(picture)
    kept = {path.stat().st_ino for path in finished}
    run("folder", source, output)
    assert kept < {path.stat().st_ino for path in (output / "data").iterdir()}
    run("folder", source, tmp_path / "unbroken")
    assert files_of(output) == files_of(tmp_path / "unbroken")


class Killed(BaseException):
    """Stands for a process that ends between two steps."""


@pytest.mark.parametrize("again", [False, True])
def test_ended_between_any_two_steps_a_data_set_is_whole_or_absent(tmp_path, monkeypatch, again):
    """`again`: over a data set that was made before from other pictures."""
    source, before = tmp_path / "mine", tmp_path / "before"
    many_pictures(source, 3)
    if again:
        run("folder", source, before)
        save_png(source / "labels/0000.png", [[2] * 8] * 8)
    run("folder", source, tmp_path / "unbroken")
    unbroken = files_of(tmp_path / "unbroken")
    assert list(unbroken) == ["README.md", "data/.prepare.json", "data/train-00000-of-00001.parquet"]

    seen = []
    for step in range(100):
        output = tmp_path / f"out{step}"
        if again:
            shutil.copytree(before, output)
        if not _run_and_end_at(step, monkeypatch, source, output):
            break
        data = files_of(output / "data") if (output / "data").exists() else None
        states = [None, files_of(before / "data"), files_of(tmp_path / "unbroken/data")]
        seen.append(states.index(data))
        run("folder", source, output)
        assert files_of(output) == unbroken
    assert len(seen) > 10 and seen[0] == int(again) and seen[-1] == 2 and seen.count(0) >= 1


def _run_and_end_at(step: int, monkeypatch, source: Path, output: Path) -> bool:
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
            run("folder", source, output)
        except Killed:
            return True
    return False


# ------------------------------------------------------------------------------------------------------------
# What is wrong is named


def test_every_bad_picture_is_named_and_nothing_is_published(tmp_path, capsys):
    expected = build_pascal_voc(tmp_path / "voc")
    source, output = tmp_path / "voc", tmp_path / "out"
    (source / "SegmentationClass/2007_000032.png").unlink()
    save_palette_png(source / "SegmentationClass/2008_000002.png", [[77] * 6] * 4)
    cut_off(source / "JPEGImages/2007_000033.jpg")
    assert run("pascal-voc-20", source, output) == 1
    error = capsys.readouterr().err
    lines = error[error.index("run_prepare.py: error:") :].strip().splitlines()
    assert lines[0].startswith("run_prepare.py: error: 3 of 3 pictures cannot be used")
    assert "SegmentationClass/2007_000032.png is missing" in lines[1]
    assert "SegmentationClass/2008_000002.png has labels out of range: 77 (24 pixels)" in lines[2]
    assert "JPEGImages/2007_000033.jpg is cut off or damaged" in lines[3]
    assert (output / "problems.txt").read_text().splitlines() == [line.strip() for line in lines[1:]]
    assert not looks_complete(output)

    build_pascal_voc(tmp_path / "mended")
    for name in ("SegmentationClass", "JPEGImages"):
        for path in (tmp_path / "mended" / name).iterdir():
            path.replace(source / name / path.name)
    assert run("pascal-voc-20", source, output) == 0
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "data"]
    assert count_rows(output, "validation") == len(expected["validation"])


def test_of_many_bad_pictures_twenty_are_shown_and_all_are_in_the_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare_plan, "PICTURES_PER_SHARD", 4)
    many_pictures(tmp_path / "mine", 30)
    for number in range(2, 25):
        (tmp_path / f"mine/labels/{number:04d}.png").unlink()
    assert run("folder", tmp_path / "mine", tmp_path / "out", "--num_proc", 2) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert "23 of 30 pictures cannot be used" in lines[-22] and lines[-1].strip() == "and 3 more"
    named = (tmp_path / "out/problems.txt").read_text().splitlines()
    assert named == [f"{tmp_path}/mine/labels/{number:04d}.png is missing" for number in range(2, 25)]


def test_bad_pictures_leave_the_data_set_of_before_as_it_was(tmp_path, capsys):
    build_pascal_voc(tmp_path / "voc")
    run("pascal-voc-20", tmp_path / "voc", tmp_path / "out")
    before = files_of(tmp_path / "out/data")
    cut_off(tmp_path / "voc/JPEGImages/2007_000033.jpg")
    assert run("pascal-voc-20", tmp_path / "voc", tmp_path / "out") == 1
    assert files_of(tmp_path / "out/data") == before and count_rows(tmp_path / "out", "validation") == 2


@pytest.fixture
def refused(capsys):
    """Runs the door, which must refuse in one line; gives the line."""

    def run_refused(*arguments: object) -> str:
        capsys.readouterr()
        try:
            status = run(*arguments)
        except DoorError as error:
            return str(error)
        lines = capsys.readouterr().err.strip().splitlines()
        assert status == 1 and len(lines) == 1 and lines[0].startswith("run_prepare.py: error: ")
        return lines[0]

    return run_refused


def test_a_folder_that_is_not_the_release_is_answered_by_what_was_expected_and_found(tmp_path, refused):
    build_cityscapes(tmp_path / "streets")
    message = refused("pascal-voc-20", tmp_path / "streets", tmp_path / "out")
    assert "expected VOC2012" in message and "found: gtFine/, leftImg8bit/" in message
    assert "there is no folder" in refused("ade20k-150", tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_release_without_pictures_is_refused(tmp_path, refused):
    build_pascal_voc(tmp_path / "voc")
    (tmp_path / "voc/ImageSets/Segmentation/val.txt").write_text("\n\n")
    assert "no pictures of validation" in refused("pascal-voc-20", tmp_path / "voc", tmp_path / "out")


def test_an_output_that_holds_something_else_is_left_alone(tmp_path, refused):
    build_pascal_voc(tmp_path / "voc")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_text("my own")
    assert "README.md was not made by" in refused("pascal-voc-20", tmp_path / "voc", tmp_path / "out")
    assert files_of(tmp_path / "out") == {"README.md": b"my own"}
    run("pascal-voc-20", tmp_path / "voc", tmp_path / "data20")
    before = files_of(tmp_path / "data20")
    assert "holds pascal-voc-20" in refused("pascal-voc-21", tmp_path / "voc", tmp_path / "data20")
    assert "is the source" in refused("pascal-voc-20", tmp_path / "voc", tmp_path / "voc")
    assert files_of(tmp_path / "data20") == before


def test_a_limit_never_replaces_more_pictures_but_all_replace_a_few(tmp_path, refused):
    build_pascal_voc(tmp_path / "voc")
    run("pascal-voc-20", tmp_path / "voc", tmp_path / "out", "--limit", 1)
    run("pascal-voc-20", tmp_path / "voc", tmp_path / "out")
    assert count_rows(tmp_path / "out", "validation") == 2
    message = refused("pascal-voc-20", tmp_path / "voc", tmp_path / "out", "--limit", 1)
    assert "holds train with all pictures" in message
    assert count_rows(tmp_path / "out", "validation") == 2


def test_splits_of_different_classes_do_not_mix(tmp_path, refused):
    build_cityscapes(tmp_path / "streets")
    run("cityscapes", tmp_path / "streets", tmp_path / "out", "--split", "validation")
    for path in (tmp_path / "streets").rglob("*_instanceIds.png"):
        path.unlink()
    message = refused("cityscapes", tmp_path / "streets", tmp_path / "out", "--split", "train")
    assert "differ in classes or in whether there are segments" in message


def test_a_picture_without_segments_among_others_is_named(tmp_path, capsys, monkeypatch):
    build_cityscapes(tmp_path / "streets")
    read = RELEASES["cityscapes"].read

    def read_some(source, item):
        picture = read(source, item)
        return (
            type(picture)(picture.image_id, picture.image, picture.label)
            if "munster" in item.image
            else picture
        )

    monkeypatch.setattr(RELEASES["cityscapes"], "read", read_some)
    assert run("cityscapes", tmp_path / "streets", tmp_path / "out") == 1
    assert "munster_000001_000019 lacks segments" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--split", "test"], "no split 'test', only train, validation"),
        (["--classes", "words.json"], "--classes is for folder"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tmp_path, more, message, refused):
    build_pascal_voc(tmp_path / "voc")
    assert message in refused("pascal-voc-20", tmp_path / "voc", tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["imagenet"], ["pascal-voc-20", "--num_proc", "0"], ["pascal-voc-20"]])
def test_unknown_or_lacking_arguments_end_with_status_2(tmp_path, capsys, words):
    with pytest.raises(SystemExit) as stop:
        run_prepare.prepare_benchmark([*words, "--output", str(tmp_path / "out")])
    assert stop.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, refused):
    build_pascal_voc(tmp_path / "voc")
    (tmp_path / "file").write_text("x")
    assert "is not a folder" in refused("pascal-voc-20", tmp_path / "voc", tmp_path / "file" / "out")


def test_a_rotated_picture_keeps_its_bytes_and_its_maps_turn_with_it(tmp_path):
    build_folder(tmp_path / "mine")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    picture = Image.new("RGB", (6, 4))
    picture.paste((250, 250, 250), (0, 0, 6, 1))  # the stored top row is white
    picture.save(tmp_path / "mine/images/a.jpg", quality=95, exif=exif)
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


def test_a_picture_whose_exif_cannot_be_read_is_named(tmp_path, capsys):
    build_folder(tmp_path / "mine")
    (tmp_path / "mine/images/a.jpg").unlink()
    profile = PngImagePlugin.PngInfo()
    profile.add_text("Raw profile type exif", "\nexif\n4\nthese are no hexadecimal digits")
    Image.new("RGB", (6, 4)).save(tmp_path / "mine/images/a.png", pnginfo=profile)
    assert run("folder", tmp_path / "mine", tmp_path / "out") == 1
    assert "a: its picture's EXIF is damaged" in capsys.readouterr().err
