"""run_prepare: everything that is missing, malformed or does not fit is named, and then nothing is published."""

from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from helpers.miniature_releases import cut_off
from helpers.miniature_streets import build_cityscapes, build_folder, build_pascal_voc, save_palette_png
from helpers.prepare_checks import files_of, looks_complete, many_images, run
from ita_segmentation.cli import prepare as run_prepare
from ita_segmentation.data.benchmarks.registry import RELEASES
from ita_segmentation.data.preparation import plan as prepare_plan
from ita_segmentation.data.prepared import count_rows
from ita_segmentation.errors import ITAError


def test_every_bad_image_is_named_and_nothing_is_published(tmp_path, capsys):
    expected = build_pascal_voc(tmp_path / "voc")
    source, output = tmp_path / "voc", tmp_path / "out"
    (source / "SegmentationClass/2007_000032.png").unlink()
    save_palette_png(source / "SegmentationClass/2008_000002.png", [[77] * 6] * 4)
    cut_off(source / "JPEGImages/2007_000033.jpg")
    assert run("pascal-voc-20", source, output) == 1
    error = capsys.readouterr().err
    lines = error[error.index("run_prepare.py: error:") :].strip().splitlines()
    assert lines[0].startswith("run_prepare.py: error: 3 of 3 images cannot be used")
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


def test_of_many_bad_images_twenty_are_shown_and_all_are_in_the_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare_plan, "IMAGES_PER_SHARD", 4)
    many_images(tmp_path / "mine", 30)
    for number in range(2, 25):
        (tmp_path / f"mine/labels/{number:04d}.png").unlink()
    assert run("folder", tmp_path / "mine", tmp_path / "out", "--num_proc", 2) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert "23 of 30 images cannot be used" in lines[-22] and lines[-1].strip() == "and 3 more"
    named = (tmp_path / "out/problems.txt").read_text().splitlines()
    assert named == [f"{tmp_path}/mine/labels/{number:04d}.png is missing" for number in range(2, 25)]


def test_bad_images_leave_the_data_set_of_before_as_it_was(tmp_path, capsys):
    build_pascal_voc(tmp_path / "voc")
    run("pascal-voc-20", tmp_path / "voc", tmp_path / "out")
    before = files_of(tmp_path / "out/data")
    cut_off(tmp_path / "voc/JPEGImages/2007_000033.jpg")
    assert run("pascal-voc-20", tmp_path / "voc", tmp_path / "out") == 1
    assert files_of(tmp_path / "out/data") == before and count_rows(tmp_path / "out", "validation") == 2


@pytest.fixture
def refused(capsys):
    """Runs the door, which must refuse in one line; gives the line."""

    def run_refused(*arguments: Any) -> str:
        capsys.readouterr()
        try:
            status = run(*arguments)
        except ITAError as error:
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


def test_a_release_without_images_is_refused(tmp_path, refused):
    build_pascal_voc(tmp_path / "voc")
    (tmp_path / "voc/ImageSets/Segmentation/val.txt").write_text("\n\n")
    assert "no images of validation" in refused("pascal-voc-20", tmp_path / "voc", tmp_path / "out")


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


def test_a_limit_never_replaces_more_images_but_all_replace_a_few(tmp_path, refused):
    build_pascal_voc(tmp_path / "voc")
    run("pascal-voc-20", tmp_path / "voc", tmp_path / "out", "--limit", 1)
    run("pascal-voc-20", tmp_path / "voc", tmp_path / "out")
    assert count_rows(tmp_path / "out", "validation") == 2
    message = refused("pascal-voc-20", tmp_path / "voc", tmp_path / "out", "--limit", 1)
    assert "holds train with all images" in message
    assert count_rows(tmp_path / "out", "validation") == 2


def test_splits_of_different_classes_do_not_mix(tmp_path, refused):
    build_cityscapes(tmp_path / "streets")
    run("cityscapes", tmp_path / "streets", tmp_path / "out", "--split", "validation")
    for path in (tmp_path / "streets").rglob("*_instanceIds.png"):
        path.unlink()
    message = refused("cityscapes", tmp_path / "streets", tmp_path / "out", "--split", "train")
    assert "differ in classes or in whether there are segments" in message


def test_an_image_without_segments_among_others_is_named(tmp_path, capsys, monkeypatch):
    build_cityscapes(tmp_path / "streets")
    read = RELEASES["cityscapes"].read

    def read_some(source, item):
        image = read(source, item)
        return type(image)(image.image_id, image.image, image.label) if "munster" in item.image else image

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


def test_an_image_whose_exif_cannot_be_read_is_named(tmp_path, capsys):
    build_folder(tmp_path / "mine")
    (tmp_path / "mine/images/a.jpg").unlink()
    profile = PngImagePlugin.PngInfo()
    profile.add_text("Raw profile type exif", "\nexif\n4\nthese are no hexadecimal digits")
    Image.new("RGB", (6, 4)).save(tmp_path / "mine/images/a.png", pnginfo=profile)
    assert run("folder", tmp_path / "mine", tmp_path / "out") == 1
    assert "a: its image's EXIF is damaged" in capsys.readouterr().err
