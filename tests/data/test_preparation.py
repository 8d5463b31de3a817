"""ita prepare: releases become complete datasets, or none; by any number of processes, after any interruption."""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet
import pytest
from PIL import Image, PngImagePlugin

from helpers.miniature_releases import save_png, truncate
from helpers.miniature_streets import (
    BUILDERS,
    build_cityscapes,
    build_folder,
    build_pascal_voc,
    save_palette_png,
)
from helpers.prepare_checks import files_of, many_images, refusal, run
from ita_segmentation.cli import prepare as cli
from ita_segmentation.data import count_rows, decode_row, load_prepared, preparation
from ita_segmentation.data.benchmarks import SOURCE_DATASETS
from ita_segmentation.errors import ITAError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def voc(tmp_path) -> Path:
    build_pascal_voc(tmp_path / "voc")
    return tmp_path / "voc"


@pytest.fixture
def mine(tmp_path) -> Path:
    build_folder(tmp_path / "mine")
    return tmp_path / "mine"


# ------------------------------------------------------------------------------------------------------------
# What is written


def test_every_benchmark_has_a_miniature_release():
    assert set(BUILDERS) == set(SOURCE_DATASETS)


@pytest.mark.parametrize("benchmark", BUILDERS)
def test_a_release_prepares_to_what_was_worked_out_by_hand(tmp_path, benchmark):
    expected = BUILDERS[benchmark](tmp_path / "release")
    assert run(benchmark, tmp_path / "release", tmp_path / "out") == 0
    for split, images in expected.items():
        rows = load_prepared(tmp_path / "out", split, streaming=True).decode(False)
        found = {row["image_id"]: row for row in rows}
        assert list(found) == list(images)
        for image_id, image in images.items():
            sample = decode_row(found[image_id])
            assert sample["label"].tolist() == image.label.tolist()
            assert image.image in (None, found[image_id]["image"]["bytes"])
            assert sample["segments"] == image.segments
            assert (sample["panoptic"] is None) == (image.panoptic is None)
            if image.panoptic is not None:
                assert sample["panoptic"].tolist() == image.panoptic.tolist()


def test_columns_come_in_order_and_tell_classes_and_things(tmp_path):
    build_cityscapes(tmp_path / "release")
    run("cityscapes", tmp_path / "release", tmp_path / "out")
    dataset = load_prepared(tmp_path / "out")
    columns = "image label panoptic segments classes things ignore_index image_id"
    assert dataset.column_names == columns.split()
    row = dataset[0]
    names, things = dataset.features["classes"].feature, dataset.features["things"].feature
    assert len(names.names) == 19
    assert len(things.names) == 8
    assert " ".join(names.int2str(row["classes"])) == "road sidewalk sky person rider car bicycle"
    assert things.int2str(row["things"]) == ["person", "rider", "car", "bicycle"]
    assert row["ignore_index"] == 255
    assert row["image_id"] == "frankfurt_000000_000294"
    assert (row["label"].mode, row["panoptic"].mode) == ("L", "RGB")
    assert [segment["id"] for segment in row["segments"] if segment["iscrowd"]] == [24]


def test_a_release_without_things_or_segments_has_no_such_columns(tmp_path, mine):
    run("folder", mine, tmp_path / "out")
    assert load_prepared(tmp_path / "out").column_names == [
        "image",
        "label",
        "classes",
        "ignore_index",
        "image_id",
    ]


def test_things_of_a_folder_are_those_of_its_class_file_whatever_their_capitals(tmp_path):
    build_folder(tmp_path / "mine", {"classes": ["cat", "guide dog", "grass"], "things": ["Guide  DOG"]})
    run("folder", tmp_path / "mine", tmp_path / "out")
    dataset = load_prepared(tmp_path / "out")
    assert dataset.features["things"].feature.names == ["guide dog"]
    assert [row["things"] for row in dataset] == [[0], []]


def test_limit_takes_the_first_images_and_split_only_one(tmp_path, voc):
    run("pascal-voc-20", voc, tmp_path / "out", "--limit", 1, "--split", "validation")
    assert [row["image_id"] for row in load_prepared(tmp_path / "out")] == ["2008_000002"]
    names = [path.name for path in (tmp_path / "out/data").glob("*.parquet")]
    assert names == ["validation-00000-of-00001.parquet"]


def test_a_split_can_be_added_and_the_other_stays(tmp_path, voc):
    run("pascal-voc-20", voc, tmp_path / "out", "--split", "validation")
    before = files_of(tmp_path / "out/data")
    run("pascal-voc-20", voc, tmp_path / "out", "--split", "train")
    run("pascal-voc-20", voc, tmp_path / "both")
    name = "validation-00000-of-00001.parquet"
    assert files_of(tmp_path / "out") == files_of(tmp_path / "both")
    assert before[name] == files_of(tmp_path / "out/data")[name]
    assert count_rows(tmp_path / "out", "train") == 1
    assert count_rows(tmp_path / "out", "validation") == 2


def test_arguments_come_from_a_file_too(tmp_path, voc):
    text = f"source: {voc}\noutput: {tmp_path}/out\nsplit: train\nnum_proc: 1\n"
    (tmp_path / "prepare.yaml").write_text(text)
    assert cli.prepare_benchmark(["pascal-voc-20", "--config", str(tmp_path / "prepare.yaml")]) == 0
    assert count_rows(tmp_path / "out", "train") == 1


def test_a_rotated_image_keeps_its_bytes_and_its_maps_rotate_with_it(tmp_path, mine):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated clockwise
    image = Image.new("RGB", (6, 4))
    image.paste((250, 250, 250), (0, 0, 6, 1))  # the stored top row is white
    image.save(mine / "images/a.jpg", quality=95, exif=exif)
    stored = (mine / "images/a.jpg").read_bytes()
    save_png(mine / "labels/a.png", [[1] * 6] + [[0] * 6] * 3)
    run("folder", mine, tmp_path / "out")

    raw = next(iter(load_prepared(tmp_path / "out", streaming=True).decode(False)))
    assert raw["image"]["bytes"] == stored
    assert Image.open(io.BytesIO(raw["label"]["bytes"])).size == (6, 4)  # as stored
    upright = load_prepared(tmp_path / "out")[0]
    for row in (upright, decode_row(raw), decode_row(upright)):
        white, label = np.array(row["image"].convert("L")) > 128, np.array(row["label"])
        assert white.tolist() == [[False, False, False, True]] * 6
        assert (label == 1).tolist() == white.tolist()


def test_a_long_name_of_an_image_is_kept(tmp_path, mine):
    name = "ö" * 122  # 244 bytes
    for part, suffix in (("images", ".jpg"), ("labels", ".png")):
        (mine / part / f"a{suffix}").rename(mine / part / f"{name}{suffix}")
    run("folder", mine, tmp_path / "out")
    assert {row["image_id"] for row in load_prepared(tmp_path / "out")} == {"b", name}


# ------------------------------------------------------------------------------------------------------------
# Processes, repetition and interruption


def test_any_number_of_processes_writes_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "IMAGES_PER_SHARD", 4)
    many_images(tmp_path / "mine", 10)
    run("folder", tmp_path / "mine", tmp_path / "one")
    run("folder", tmp_path / "mine", tmp_path / "two", "--num_proc", 2)
    one = files_of(tmp_path / "one")
    assert one == files_of(tmp_path / "two")
    shards = [f"data/train-0000{number}-of-00003.parquet" for number in range(3)]
    assert [name for name in one if name.endswith("parquet")] == shards


def test_a_shard_has_row_groups_that_streaming_can_shuffle(tmp_path):
    many_images(tmp_path / "mine", 70)
    run("folder", tmp_path / "mine", tmp_path / "out")
    metadata = pyarrow.parquet.read_metadata(tmp_path / "out/data/train-00000-of-00001.parquet")
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [32, 32, 6]


def test_a_second_run_does_nothing_and_says_so(tmp_path, voc, capsys):
    run("pascal-voc-20", voc, tmp_path / "out")
    dates = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    assert run("pascal-voc-20", voc, tmp_path / "out") == 0
    assert "up to date" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == dates


def test_a_changed_image_is_read_again_and_the_others_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "IMAGES_PER_SHARD", 2)
    many_images(tmp_path / "mine", 6)
    run("folder", tmp_path / "mine", tmp_path / "out")
    before = [path.stat().st_ino for path in sorted((tmp_path / "out/data").glob("*.parquet"))]
    save_png(tmp_path / "mine/labels/0003.png", [[1] * 8] * 8)
    run("folder", tmp_path / "mine", tmp_path / "out")
    after = [path.stat().st_ino for path in sorted((tmp_path / "out/data").glob("*.parquet"))]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True]
    assert set(np.array(load_prepared(tmp_path / "out")[3]["label"]).ravel()) == {1}


@pytest.mark.parametrize("damage", ["removed", "empty", "truncated"])
def test_a_shard_that_was_lost_or_damaged_is_refused_and_written_again(tmp_path, voc, damage):
    run("pascal-voc-20", voc, tmp_path / "out")
    complete = files_of(tmp_path / "out")
    shard = tmp_path / "out/data/validation-00000-of-00001.parquet"
    if damage == "removed":
        shard.unlink()
    else:
        shard.write_bytes(b"" if damage == "empty" else shard.read_bytes()[:-50])
        with pytest.raises(ITAError, match=r"validation-00000-of-00001.parquet is damaged"):
            load_prepared(tmp_path / "out", streaming=True)
    (tmp_path / "out/README.md").unlink()
    run("pascal-voc-20", voc, tmp_path / "out")
    assert files_of(tmp_path / "out") == complete


def test_an_empty_file_among_finished_shards_does_not_count_as_finished(tmp_path, voc):
    run("pascal-voc-20", voc, tmp_path / "unbroken")
    shards = tmp_path / "out/.incomplete/shards"
    shards.mkdir(parents=True)
    config = preparation.PrepareConfig(
        "pascal-voc-20", SOURCE_DATASETS["pascal-voc-20"], voc, tmp_path / "out", ["train"]
    )
    (shard,) = preparation.plan_split(config, "train")
    (shards / f"{shard.fingerprint}.parquet").touch()
    run("pascal-voc-20", voc, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "unbroken")


KILLED_AT_THE_FIRST_SHARD = """
import os, psutil, signal, sys
from pathlib import Path
from ita_segmentation.data import preparation
from ita_segmentation.data.benchmarks import SOURCE_DATASETS

class KillingBar(preparation.tqdm):
    def update(self, n=1):
        print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    preparation.IMAGES_PER_SHARD, preparation.tqdm = 1, KillingBar
    source, output = map(Path, sys.argv[1:])
    dataset = SOURCE_DATASETS["pascal-voc-20"]
    config = ("pascal-voc-20", dataset, source, output, dataset.splits, None, 2)
    preparation.prepare(preparation.PrepareConfig(*config))
"""


def test_a_run_that_was_killed_continues_and_ends_like_an_unbroken_one(tmp_path, voc, monkeypatch):
    monkeypatch.setattr(preparation, "IMAGES_PER_SHARD", 1)
    output = tmp_path / "out"
    command = [sys.executable, "-c", KILLED_AT_THE_FIRST_SHARD, str(voc), str(output)]
    root = Path(__file__).parents[2]
    killed = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    assert killed.returncode == -9
    workers = [psutil.Process(int(pid)) for pid in killed.stdout.split() if psutil.pid_exists(int(pid))]
    assert not psutil.wait_procs(workers, timeout=60)[1]
    assert not (output / "data").exists()
    with pytest.raises(ITAError, match="is incomplete"):
        load_prepared(output)

    finished = {path.stat().st_ino for path in (output / ".incomplete/shards").glob("[0-9a-f]*.parquet")}
    assert finished
    run("pascal-voc-20", voc, output)
    assert finished <= {path.stat().st_ino for path in (output / "data").iterdir()}
    run("pascal-voc-20", voc, tmp_path / "unbroken")
    assert files_of(output) == files_of(tmp_path / "unbroken")


class Killed(BaseException):
    """Stands for a process that ends between two steps."""


@pytest.mark.parametrize("before", ["nothing", "other images", "another split"])
def test_killed_between_any_two_steps_a_dataset_is_complete_or_absent(tmp_path, voc, monkeypatch, before):
    """`before`: what the output holds when the run begins; another split must stay."""
    first = tmp_path / "first"
    if before == "other images":
        run("pascal-voc-20", voc, first)
        save_palette_png(voc / "SegmentationClass/2008_000002.png", [[1] * 6] * 4)
    if before == "another split":
        run("pascal-voc-20", voc, first, "--split", "validation")
    run("pascal-voc-20", voc, tmp_path / "unbroken")
    unbroken = files_of(tmp_path / "unbroken")
    assert [name.split("-")[0] for name in unbroken] == [
        "README.md",
        "data/.prepare.json",
        "data/train",
        "data/validation",
    ]

    states = []
    more = ["--split", "train"] if before == "another split" else []
    for step in range(100):
        output = tmp_path / f"out{step}"
        if before != "nothing":
            shutil.copytree(first, output)
        if not kill_at(step, monkeypatch, "pascal-voc-20", voc, output, *more):
            break
        data = files_of(output / "data") if (output / "data").exists() else None
        states.append([None, files_of(first / "data"), files_of(tmp_path / "unbroken/data")].index(data))
        run("pascal-voc-20", voc, output, *more)
        assert files_of(output) == unbroken
    assert len(states) > 10
    assert states[0] == int(before != "nothing")
    assert states[-1] == 2
    assert states.count(0) >= 1


def kill_at(step: int, monkeypatch, *arguments) -> bool:
    """End a run before one of its steps: a file renamed, linked or removed. False if it has fewer steps."""
    left = [step]

    def counted(work):
        def worked(*arguments, **options):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return work(*arguments, **options)

        return worked

    with monkeypatch.context() as patch:
        for module, name in ((os, "replace"), (os, "link"), (Path, "unlink"), (shutil, "rmtree")):
            patch.setattr(module, name, counted(getattr(module, name)))
        try:
            run(*arguments)
        except Killed:
            return True
    return False


# ------------------------------------------------------------------------------------------------------------
# Refusals


def test_every_bad_image_is_named_in_one_run_and_nothing_is_written(tmp_path, voc, capsys):
    output = tmp_path / "out"
    (voc / "SegmentationClass/2007_000032.png").unlink()
    save_palette_png(voc / "SegmentationClass/2008_000002.png", [[77] * 6] * 4)
    truncate(voc / "JPEGImages/2007_000033.jpg")
    message = refusal("pascal-voc-20", voc, output)
    assert message == f"3 of 3 images cannot be used (all in {output}/problems.txt)"
    problems = (output / "problems.txt").read_text().splitlines()
    for said, problem in zip(
        (
            "SegmentationClass/2007_000032.png is missing",
            "SegmentationClass/2008_000002.png has labels out of range: 77 (24 pixels)",
            "JPEGImages/2007_000033.jpg is truncated or damaged",
        ),
        problems,
        strict=True,
    ):
        assert said in problem
    assert capsys.readouterr().err.endswith("".join(f"  {problem}\n" for problem in problems))
    assert not (output / "data").exists()
    assert not (output / "README.md").exists()

    build_pascal_voc(tmp_path / "mended")
    shutil.copytree(tmp_path / "mended", voc, dirs_exist_ok=True)
    assert run("pascal-voc-20", voc, output) == 0
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "data"]
    assert count_rows(output, "validation") == 2


def test_of_many_bad_images_twenty_are_shown_and_all_are_in_the_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preparation, "IMAGES_PER_SHARD", 4)
    many_images(tmp_path / "mine", 30)
    for number in range(2, 25):
        (tmp_path / f"mine/labels/{number:04d}.png").unlink()
    assert refusal("folder", tmp_path / "mine", tmp_path / "out", "--num_proc", 2).startswith("23 of 30")
    shown = capsys.readouterr().err.strip().splitlines()[-21:]
    assert "0021.png is missing" in shown[-2]
    assert shown[-1] == "  and 3 more"
    named = (tmp_path / "out/problems.txt").read_text().splitlines()
    assert named == [f"{tmp_path}/mine/labels/{number:04d}.png is missing" for number in range(2, 25)]


def test_a_named_pipe_and_a_name_that_is_not_utf8_are_bad_images_too(tmp_path, mine):
    (mine / "labels/b.png").unlink()
    os.mkfifo(mine / "labels/b.png")
    for part, suffix in (("images", b".jpg"), ("labels", b".png")):
        source, folder = os.fsencode(mine / part / "a"), os.fsencode(mine / part)
        os.rename(source + suffix, folder + b"/\xff\xe9" + suffix)
    assert refusal("folder", mine, tmp_path / "out").startswith("2 of 2 images")
    pipe, name = (tmp_path / "out/problems.txt").read_text().splitlines()
    assert pipe.endswith("labels/b.png is not a regular file")
    assert name == r"'\udcff\udce9': the name of the image is not valid UTF-8"


def test_postscript_that_is_called_a_photograph_is_not_opened(tmp_path, mine):
    Image.new("RGB", (6, 4)).save(mine / "images/a.jpg", "EPS")
    refusal("folder", mine, tmp_path / "out")
    assert (tmp_path / "out/problems.txt").read_text() == f"{mine}/images/a.jpg is not an image\n"


def test_an_image_whose_exif_cannot_be_read_is_named(tmp_path, mine):
    (mine / "images/a.jpg").unlink()
    profile = PngImagePlugin.PngInfo()
    profile.add_text("Raw profile type exif", "\nexif\n4\nthese are no hexadecimal digits")
    Image.new("RGB", (6, 4)).save(mine / "images/a.png", pnginfo=profile)
    refusal("folder", mine, tmp_path / "out")
    assert "a: its image's EXIF is damaged" in (tmp_path / "out/problems.txt").read_text()


def test_labels_that_are_all_ignored_are_refused(tmp_path, mine):
    for name in ("a", "b"):
        save_png(mine / f"labels/{name}.png", [[255] * 6] * 4)
    assert "all labels of train are ignored" in refusal("folder", mine, tmp_path / "out")
    assert not (tmp_path / "out/data").exists()


def test_bad_images_leave_the_dataset_of_before_unchanged(tmp_path, voc):
    run("pascal-voc-20", voc, tmp_path / "out")
    before = files_of(tmp_path / "out/data")
    truncate(voc / "JPEGImages/2007_000033.jpg")
    refusal("pascal-voc-20", voc, tmp_path / "out")
    assert files_of(tmp_path / "out/data") == before
    assert count_rows(tmp_path / "out", "validation") == 2


def test_a_folder_that_is_not_the_release_is_answered_by_what_was_expected_and_found(tmp_path, voc):
    build_cityscapes(tmp_path / "streets")
    message = refusal("pascal-voc-20", tmp_path / "streets", tmp_path / "out")
    assert "expected VOC2012" in message
    assert "found: gtFine/, leftImg8bit/" in message
    assert "there is no folder" in refusal("ade20k-150", tmp_path / "nowhere", tmp_path / "out")
    (voc / "ImageSets/Segmentation/val.txt").write_text("\n\n")
    assert "no images of validation" in refusal("pascal-voc-20", voc, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_holds_something_else_is_left_alone(tmp_path, voc):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_text("my own")
    assert "README.md was not made by" in refusal("pascal-voc-20", voc, tmp_path / "out")
    assert files_of(tmp_path / "out") == {"README.md": b"my own"}
    run("pascal-voc-20", voc, tmp_path / "data20")
    before = files_of(tmp_path / "data20")
    assert "holds pascal-voc-20" in refusal("pascal-voc-21", voc, tmp_path / "data20")
    assert "is the source" in refusal("pascal-voc-20", voc, voc)
    assert files_of(tmp_path / "data20") == before


def test_a_limit_never_replaces_more_images_but_all_replace_a_few(tmp_path, voc):
    run("pascal-voc-20", voc, tmp_path / "out", "--limit", 1)
    run("pascal-voc-20", voc, tmp_path / "out")
    assert count_rows(tmp_path / "out", "validation") == 2
    message = refusal("pascal-voc-20", voc, tmp_path / "out", "--limit", 1)
    assert "holds validation with 2 images" in message
    assert count_rows(tmp_path / "out", "validation") == 2


def test_splits_of_different_columns_or_classes_do_not_mix(tmp_path):
    build_cityscapes(tmp_path / "streets")
    run("cityscapes", tmp_path / "streets", tmp_path / "out", "--split", "validation")
    for path in (tmp_path / "streets").rglob("*_instanceIds.png"):
        path.unlink()
    message = refusal("cityscapes", tmp_path / "streets", tmp_path / "out", "--split", "train")
    assert "differ in classes or in whether there are segments" in message


def test_an_image_without_segments_among_others_is_named(tmp_path, monkeypatch):
    build_cityscapes(tmp_path / "streets")
    read = SOURCE_DATASETS["cityscapes"].read

    def read_some(source, entry):
        image = read(source, entry)
        return type(image)(image.image_id, image.image, image.label) if "munster" in entry.image else image

    monkeypatch.setattr(SOURCE_DATASETS["cityscapes"], "read", read_some)
    refusal("cityscapes", tmp_path / "streets", tmp_path / "out")
    assert "munster_000001_000019 lacks segments" in (tmp_path / "out/problems.txt").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--split", "test"], "no split 'test', only train, validation"),
        (["--vocabulary", "classes.json"], "--vocabulary is for folder"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tmp_path, voc, more, message):
    assert message in refusal("pascal-voc-20", voc, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, voc):
    (tmp_path / "file").write_text("x")
    assert "is not a folder" in refusal("pascal-voc-20", voc, tmp_path / "file" / "out")
