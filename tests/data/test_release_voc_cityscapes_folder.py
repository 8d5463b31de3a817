"""Releases of Pascal VOC and Cityscapes, and a user's folder: read exactly, and each defect answered by its name."""

import json

import numpy as np
import pytest

from helpers.miniature_releases import save_jpeg, save_png, truncate
from helpers.miniature_streets import (
    STREET,
    build_cityscapes,
    build_folder,
    build_pascal_voc,
    save_palette_png,
)
from helpers.release_checks import check_refused, check_split, read_all
from ita_segmentation.data.benchmarks.cityscapes import Cityscapes
from ita_segmentation.data.benchmarks.folder import FolderDataset
from ita_segmentation.data.benchmarks.pascal_voc import PascalVoc
from ita_segmentation.errors import ITAError

VOC_20 = PascalVoc("pascal-voc-20")


# ------------------------------------------------------------------------------------------------------------
# Pascal VOC


@pytest.mark.parametrize("benchmark", ["pascal-voc-20", "pascal-voc-21"])
def test_pascal_voc_gives_palette_indices_without_borders_in_the_order_of_the_lists(tmp_path, benchmark):
    expected = build_pascal_voc(tmp_path, benchmark)
    release = PascalVoc(benchmark)
    for split, images in expected.items():
        check_split(release, tmp_path, split, images)
    assert len(release.categories) == int(benchmark[-2:])
    assert release.categories[-1].name == "tv monitor, tv, monitor"
    assert all(category.is_thing == (category.name != "background") for category in release.categories)


def test_a_voc_image_and_its_annotation_are_both_named_where_both_are_bad(tmp_path):
    build_pascal_voc(tmp_path)
    (tmp_path / "JPEGImages/2008_000002.jpg").unlink()
    truncate(tmp_path / "SegmentationClass/2008_000002.png")
    check_refused(VOC_20, tmp_path, "2008_000002.jpg is missing", "2008_000002.png is truncated or damaged")


def test_a_voc_label_out_of_range_is_named_with_its_pixels(tmp_path):
    build_pascal_voc(tmp_path)
    save_palette_png(tmp_path / "SegmentationClass/2008_000002.png", [[21, 21, 0, 0, 0, 254]] * 4)
    check_refused(
        VOC_20, tmp_path, "SegmentationClass/2008_000002.png has labels out of range: 21, 254 (12 pixels)"
    )


def test_a_voc_file_that_is_empty_or_no_image_is_named(tmp_path):
    build_pascal_voc(tmp_path)
    path = tmp_path / "SegmentationClass/2008_000002.png"
    path.write_bytes(b"")
    check_refused(VOC_20, tmp_path, "2008_000002.png is empty")
    path.write_bytes(b"plain text")
    check_refused(VOC_20, tmp_path, "2008_000002.png is not a PNG file")
    save_jpeg(path)
    check_refused(VOC_20, tmp_path, "2008_000002.png is not a PNG file but JPEG")
    save_png(path, np.zeros((4, 6, 3)))
    check_refused(VOC_20, tmp_path, "2008_000002.png is not a label map: a PNG of mode RGB")


def test_a_folder_that_is_not_voc_says_what_was_expected_and_what_was_found(tmp_path):
    build_pascal_voc(tmp_path / "VOCdevkit/VOC2012")
    (tmp_path / "VOCdevkit/readme.txt").write_text("hello")
    missing = "missing: JPEGImages, SegmentationClass, ImageSets/Segmentation/val.txt"
    check_refused(
        VOC_20,
        tmp_path / "VOCdevkit",
        "expected VOC2012: JPEGImages/*.jpg",
        missing,
        "found: VOC2012/, readme.txt",
        f"{tmp_path}/VOCdevkit/VOC2012 has them",
    )
    check_refused(VOC_20, tmp_path / "nowhere", "there is no folder", "nowhere", "expected VOC2012")


# ------------------------------------------------------------------------------------------------------------
# Cityscapes


@pytest.mark.parametrize("train_ids", [False, True])
@pytest.mark.parametrize("instances", [False, True])
def test_cityscapes_gives_train_ids_and_segments_from_whichever_files_there_are(
    tmp_path, train_ids, instances
):
    for split, images in build_cityscapes(tmp_path, train_ids, instances).items():
        check_split(Cityscapes(), tmp_path, split, images)


def test_cityscapes_prefers_the_train_ids_that_are_there(tmp_path):
    build_cityscapes(tmp_path, train_ids=True)
    save_png(
        tmp_path / f"gtFine/val/frankfurt/{STREET}_gtFine_labelTrainIds.png", [[18] * 6, *[[255] * 6] * 3]
    )
    label = read_all(Cityscapes(), tmp_path)[STREET].label
    assert label.tolist() == [[18] * 6, *[[255] * 6] * 3]


@pytest.mark.parametrize(
    ("kind", "bits", "value"),
    [("labelIds", np.uint8, 34), ("instanceIds", np.uint16, 34), ("instanceIds", np.uint16, 34000)],
)
def test_a_cityscapes_id_out_of_range_is_named(tmp_path, kind, bits, value):
    build_cityscapes(tmp_path)
    name = f"gtFine/val/frankfurt/{STREET}_gtFine_{kind}.png"
    save_png(tmp_path / name, [[7] * 6, [7] * 6, [7] * 6, [7] * 5 + [value]], bits)
    check_refused(Cityscapes(), tmp_path, f"{name} has labels out of range: 34 (1 pixels)")


def test_a_cityscapes_train_id_out_of_range_is_named(tmp_path):
    build_cityscapes(tmp_path, train_ids=True)
    name = f"gtFine/val/frankfurt/{STREET}_gtFine_labelTrainIds.png"
    save_png(tmp_path / name, [[19] * 6] * 4)
    check_refused(Cityscapes(), tmp_path, f"{name} has labels out of range: 19 (24 pixels)")


def test_a_folder_that_is_not_cityscapes_says_what_was_expected_and_what_was_found(tmp_path):
    build_cityscapes(tmp_path)
    (tmp_path / "gtFine/val").rename(tmp_path / "gtFine/validation")
    check_refused(
        Cityscapes(), tmp_path, "expected leftImg8bit/", "missing: gtFine/val", "found: gtFine/, leftImg8bit/"
    )
    (tmp_path / "gtFine/val/frankfurt").mkdir(parents=True)
    check_refused(Cityscapes(), tmp_path, "gtFine/val has no labels", "labelIds.png")


# ------------------------------------------------------------------------------------------------------------
# A user's folder


def test_a_folder_gives_indices_into_its_class_file(tmp_path):
    expected = build_folder(tmp_path)
    release = FolderDataset.at(tmp_path)
    assert release.splits == ("train",) and release.ignore_index == 255
    assert [category.name for category in release.categories] == ["cat", "dog, puppy", "grass"]
    assert {category.is_thing for category in release.categories} == {None}
    check_split(release, tmp_path, "train", expected["train"])


def test_a_folder_may_have_splits_and_things(tmp_path):
    expected = build_folder(
        tmp_path, {"classes": ["cat", ["dog", "puppy"], "grass"], "things": ["cat", "puppy"]}
    )
    for part in ("images", "labels"):
        (tmp_path / part).rename(tmp_path / "validation")
        (tmp_path / part).mkdir()
        (tmp_path / "validation").rename(tmp_path / part / "validation")
    release = FolderDataset.at(tmp_path)
    assert release.splits == ("validation",)
    assert [category.is_thing for category in release.categories] == [True, True, False]
    check_split(release, tmp_path, "validation", expected["train"])


def test_the_ids_of_a_text_file_of_classes_are_the_labels(tmp_path):
    build_folder(tmp_path)
    (tmp_path / "names.txt").write_text("0:invalid_class_id\n1:cat,kitten\n2:dog\n255:sky\n")
    release = FolderDataset.at(tmp_path, tmp_path / "names.txt")
    assert [category.name for category in release.categories] == ["cat, kitten", "dog", "sky"]
    labels = {name: image.label.tolist() for name, image in read_all(release, tmp_path, "train").items()}
    assert labels["a"] == [[255] * 6, [0] * 6, [1] * 6, [2] * 6]  # 255 is a class here, and 0 is none
    assert labels["b"] == [[255] * 6, [1] * 6, [1] * 6, [2] * 6]


def test_more_than_255_classes_have_labels_of_16_bits(tmp_path):
    build_folder(tmp_path, [f"class {number}" for number in range(300)])
    save_png(tmp_path / "labels/b.png", [[65535] * 6, [299] * 6, [2] * 6, [255] * 6], np.uint16)
    release = FolderDataset.at(tmp_path)
    assert release.ignore_index == 65535
    label = read_all(release, tmp_path, "train")["b"].label
    assert label.dtype == np.uint16 and label[:, 0].tolist() == [65535, 299, 2, 255]


def test_an_image_without_label_and_a_label_without_image_are_named(tmp_path):
    build_folder(tmp_path)
    (tmp_path / "labels/a.png").unlink()
    check_refused(FolderDataset.at(tmp_path), tmp_path, "labels/a.png is missing", split="train")
    save_png(tmp_path / "labels/a.png", [[0] * 6] * 4)
    (tmp_path / "images/b.jpg").unlink()
    check_refused(FolderDataset.at(tmp_path), tmp_path, "images/b.* is missing", split="train")


def test_a_label_beyond_the_classes_and_a_label_of_few_bits_are_named(tmp_path):
    build_folder(tmp_path)
    save_png(tmp_path / "labels/a.png", [[3] * 6] * 4)
    check_refused(
        FolderDataset.at(tmp_path), tmp_path, "labels/a.png has labels out of range: 3", split="train"
    )
    save_png(tmp_path / "labels/a.png", [[0] * 6] * 4, bool)
    check_refused(FolderDataset.at(tmp_path), tmp_path, "labels/a.png is a gray PNG of fewer", split="train")


def test_two_images_of_one_name_are_named(tmp_path):
    build_folder(tmp_path)
    save_png(tmp_path / "images/a.png", np.zeros((4, 6, 3)))
    check_refused(
        FolderDataset.at(tmp_path), tmp_path, "two files for one image: a.jpg and a.png", split="train"
    )


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["cat", "cat"], "the class 'cat' twice"),
        ([], "vocabulary is empty"),
        ({"names": ["cat"]}, "must hold a list, or"),
        ({"classes": ["cat"], "things": ["dog"]}, "the thing 'dog' is none of the classes"),
        ({"classes": ["cat"], "things": "cat"}, "'things' must be a list of names"),
        ({"classes": [3]}, "neither a name nor a list of names: 3"),
    ],
)
def test_a_class_file_that_cannot_be_used_is_named(tmp_path, classes, message):
    build_folder(tmp_path)
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    with pytest.raises(ITAError, match=message) as refusal:
        FolderDataset.at(tmp_path)
    assert "classes.json" in str(refusal.value)


def test_a_folder_without_class_file_or_labels_says_what_was_expected(tmp_path):
    build_folder(tmp_path)
    (tmp_path / "classes.json").unlink()
    with pytest.raises(ITAError, match=r"missing: classes.json; found: images/, labels/"):
        FolderDataset.at(tmp_path)
    (tmp_path / "labels").rename(tmp_path / "masks")
    with pytest.raises(ITAError, match=r"missing: labels; found: images/, masks/"):
        FolderDataset.at(tmp_path)
    with pytest.raises(ITAError, match="nowhere"):
        FolderDataset.at(tmp_path / "nowhere")
