"""Pascal Context: miniature releases become what was worked out by hand, and each defect is answered by its name."""

import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from helpers.miniature_releases import (
    build_pascal_context_59,
    build_pascal_context_459,
    save_jpeg,
    save_label_map,
)
from helpers.release_checks import check_refused, read_all
from ita_segmentation.data.benchmarks.pascal_context import PascalContext59, PascalContext459, decode_mask

BOTH = [(PascalContext59, build_pascal_context_59), (PascalContext459, build_pascal_context_459)]
IMAGE = "JPEGImages/2008_000002.jpg"
MAT = "trainval/2008_000002.mat"


@pytest.fixture
def frequent(tmp_path):
    build_pascal_context_59(tmp_path)
    return tmp_path


@pytest.fixture
def full(tmp_path):
    build_pascal_context_459(tmp_path)
    return tmp_path


def change_json(source, change):
    path = source / "trainval_merged.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# ------------------------------------------------------------------------------------------------------------
# Both


@pytest.mark.parametrize(("release", "build"), BOTH)
def test_without_the_file_that_knows_the_splits_it_is_asked_for(tmp_path, release, build):
    build(tmp_path)
    (tmp_path / "trainval_merged.json").unlink()
    check_refused(
        release(), tmp_path, "expected VOC2010", "missing: trainval_merged.json", "found: JPEGImages/"
    )


@pytest.mark.parametrize(("release", "build"), BOTH)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ("[]", "PASCAL in Detail"),
        ('{"annos_segmentation": []}', "'images' is not a list"),
        ('{"images": [], "annos_segmentation": []}', "'val'"),
        ('{"images": [{"phase": "val", "image_id": 1}], "annos_segmentation": []}', "entry 0 of 'images'"),
        ('{"images": [], "annos_segmentation": [{"id": 1}]}', "entry 0 of 'annos_segmentation'"),
    ],
)
def test_an_annotation_file_that_is_wrong_is_named(tmp_path, release, build, content, said):
    build(tmp_path)
    (tmp_path / "trainval_merged.json").write_text(content)
    check_refused(release(), tmp_path, "trainval_merged.json", said)


@pytest.mark.parametrize(("release", "build"), BOTH)
def test_images_that_are_listed_twice_or_elsewhere_are_refused(tmp_path, release, build):
    build(tmp_path)
    change_json(tmp_path, lambda content: content["images"].append(content["images"][1]))
    check_refused(release(), tmp_path, "twice")
    change_json(tmp_path, lambda content: content["images"][1].update(file_name="../../secret.jpg"))
    check_refused(release(), tmp_path, "../../secret.jpg")


# ------------------------------------------------------------------------------------------------------------
# 59 classes


def test_a_mask_of_no_image_or_no_frequent_category_is_named(frequent):
    change_json(frequent, lambda content: content["annos_segmentation"][0].update(category_id=3))
    check_refused(PascalContext59(), frequent, "2008_000002.jpg", "out of range: 3")
    change_json(frequent, lambda content: content["annos_segmentation"][0].update(category_id=-1))
    check_refused(PascalContext59(), frequent, "2008_000002.jpg", "mask 0", "-1")
    change_json(frequent, lambda content: content["annos_segmentation"][0].update(image_id=12))
    check_refused(PascalContext59(), frequent, "trainval_merged.json", "image 12")


def test_a_category_that_is_painted_over_does_no_harm(frequent):
    def paint_something_unknown_first(content):
        hidden = dict(content["annos_segmentation"][-1], category_id=3, id=99)
        content["annos_segmentation"].insert(0, hidden)

    before = read_all(PascalContext59(), frequent)["2008_000002"].label
    change_json(frequent, paint_something_unknown_first)
    assert read_all(PascalContext59(), frequent)["2008_000002"].label.tolist() == before.tolist()


def test_a_mask_of_another_size_is_named(frequent):
    save_jpeg(frequent / IMAGE, 7, 4)
    check_refused(PascalContext59(), frequent, "2008_000002.jpg", "mask 0", "6 x 4", "7 x 4")


@pytest.mark.parametrize(
    "counts", ["", "9", "4", "92207zzzzzzz", "92207P", "9220\u00e9", "9220P", [3, 2, 19]]
)
def test_a_damaged_mask_is_named(frequent, counts):
    change_json(
        frequent,
        lambda content: content["annos_segmentation"][0]["segmentation"].update(counts=counts),
    )
    check_refused(PascalContext59(), frequent, "2008_000002.jpg", "mask 0", "damaged")


def test_masks_decode_as_pycocotools_decodes_them():
    random = np.random.default_rng(5)
    for trial in range(60):
        height, width = random.integers(1, 400, 2)
        share = random.choice([0.0, 0.001, 0.5, 0.999, 1.0])
        mask = random.random((height, width)) < share
        if trial % 2:  # long runs, whose lengths take several characters
            mask = np.maximum.accumulate(mask, axis=trial // 2 % 2)
        code = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        decoded = decode_mask(code["counts"].decode(), int(height), int(width), "here")
        assert np.array_equal(decoded, mask)
        assert np.array_equal(decoded, coco_mask.decode(code).astype(bool))


# ------------------------------------------------------------------------------------------------------------
# 459 classes


@pytest.mark.parametrize(
    "content", [b"", b"x" * 300, b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + b"x" * 400]
)
def test_a_label_file_of_another_kind_is_named(full, content):
    (full / MAT).write_bytes(content)
    check_refused(PascalContext459(), full, MAT)


def test_a_label_above_459_is_named(full):
    save_label_map(full / MAT, [[1] * 6] * 3 + [[1, 1, 1, 1, 460, 65535]])
    check_refused(PascalContext459(), full, MAT, "out of range: 460, 65535", "2 pixels")


def test_a_label_map_of_another_size_name_or_type_is_named(full):
    save_label_map(full / MAT, np.ones((3, 6)))
    check_refused(PascalContext459(), full, MAT, "6 x 3", "6 x 4")
    save_label_map(full / MAT, np.ones((4, 6)), name="Labels")
    check_refused(PascalContext459(), full, MAT, "no 'LabelMap'")
    save_label_map(full / MAT, np.ones((4, 6)), dtype=np.float64)
    check_refused(PascalContext459(), full, MAT, "float64")
    save_label_map(full / MAT, np.ones((4, 6, 2)))
    check_refused(PascalContext459(), full, MAT, "3 dimensions")


def test_without_the_folder_of_labels_it_is_asked_for(full):
    (full / "trainval").rename(full / "labels")
    check_refused(PascalContext459(), full, "missing: trainval;", "found: JPEGImages/, labels.txt, labels/")
