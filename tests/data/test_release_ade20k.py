"""ADE20K: miniature releases become what was worked out by hand, and each defect is answered by its name."""

import io
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from helpers.miniature_releases import (
    build_ade20k_150,
    build_ade20k_847,
    save_full_seg,
    save_jpeg,
    save_png,
    segment,
    truncate,
)
from helpers.release_checks import check_refused, check_split, read_all
from ita_segmentation.data.benchmarks.ade20k import Ade20k150, Ade20k847

VALIDATION = "annotations/validation/ADE_val_00000001.png"
INSTANCES = "annotations_instance/validation/ADE_val_00000001.png"
FULL = "images/ADE/validation/urban/street/ADE_val_00000001"


@pytest.fixture
def challenge(tmp_path):
    build_ade20k_150(tmp_path)
    return tmp_path


@pytest.fixture
def full(tmp_path):
    build_ade20k_847(tmp_path)
    return tmp_path


# ------------------------------------------------------------------------------------------------------------
# 150 classes


def test_without_the_folder_of_instances_there_are_labels_only(tmp_path):
    expected = build_ade20k_150(tmp_path, instances=False)
    check_split(Ade20k150(), tmp_path, "validation", expected["validation"])


def test_stuff_that_instances_cover_keeps_its_segment_as_published(challenge):
    save_png(challenge / "annotations/validation/ADE_val_00000002.png", [[3, 3, 3], [3, 3, 3]])
    pixels = np.full((2, 3, 3), 1)
    save_png(challenge / "annotations_instance/validation/ADE_val_00000002.png", pixels)
    image = read_all(Ade20k150(), challenge)["ADE_val_00000002"]
    assert image.panoptic.tolist() == [[2, 2, 2], [2, 2, 2]]
    assert image.segments == [segment(1, 2, False), segment(2, 7, True)]


def test_the_hundred_numbers_of_things_are_the_thing_classes_in_order(challenge):
    things = np.arange(1, 101).reshape(10, 10)
    save_jpeg(challenge / "images/validation/ADE_val_00000002.jpg", 10, 10)
    save_png(challenge / "annotations/validation/ADE_val_00000002.png", np.zeros((10, 10)))
    pixels = np.stack([things, things + 100, np.zeros((10, 10))], axis=-1)
    save_png(challenge / "annotations_instance/validation/ADE_val_00000002.png", pixels)
    segments = read_all(Ade20k150(), challenge)["ADE_val_00000002"].segments
    classes = [entry["category_id"] for entry in segments]
    assert classes == sorted(classes)
    # 1 bed, 2 window, 3 cabinet, 4 person, 5 door, 58 TV, 99 clock, 100 flag.
    assert [classes[number - 1] for number in (1, 2, 3, 4, 5, 58, 99, 100)] == [
        7,
        8,
        10,
        12,
        14,
        89,
        148,
        149,
    ]


def test_a_label_above_150_is_named(challenge):
    save_png(challenge / VALIDATION, [[1] * 6] * 3 + [[1, 1, 1, 151, 1, 1]])
    check_refused(Ade20k150(), challenge, VALIDATION, "out of range", "151", "1 pixel")


def test_colored_labels_and_gray_instances_are_refused(challenge):
    save_png(challenge / VALIDATION, np.zeros((4, 6, 3)))
    check_refused(Ade20k150(), challenge, VALIDATION, "RGB")
    save_png(challenge / VALIDATION, np.zeros((4, 6)))
    save_png(challenge / INSTANCES, np.zeros((4, 6)))
    check_refused(Ade20k150(), challenge, INSTANCES, "mode L")


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        ([(4, 1, 0), (5, 1, 0)], ("instance 1", "two classes", "4 and 5")),
        ([(101, 1, 0)], ("instance 1", "101")),
        ([(0, 3, 0)], ("instance 3", "the class (R) 0")),
    ],
)
def test_instances_of_no_or_two_classes_are_named(challenge, pixels, said):
    instances = np.zeros((4, 6, 3))
    instances[0, : len(pixels)] = pixels
    save_png(challenge / INSTANCES, instances)
    check_refused(Ade20k150(), challenge, INSTANCES, *said)


def test_another_folder_is_answered_by_what_was_expected_and_found(challenge, tmp_path):
    check_refused(
        Ade20k150(), challenge / "images", "expected ADEChallengeData2016", "training/", "validation/"
    )
    check_refused(Ade20k150(), tmp_path.parent / "nothing", "no folder")


# ------------------------------------------------------------------------------------------------------------
# 847 classes


def test_only_an_image_that_shrinks_is_stored_anew_as_png(full):
    images = read_all(Ade20k847(), full)
    formats = [Image.open(io.BytesIO(image.image)).format for image in images.values()]
    assert formats == ["JPEG", "PNG"]
    pixels = np.asarray(Image.open(io.BytesIO(images["ADE_val_00000002"].image)))
    assert pixels.shape == (512, 768, 3)
    assert np.abs(pixels.astype(int) - (200, 30, 30)).max() <= 3


@pytest.mark.parametrize(("height", "width", "size"), [(600, 1000, (512, 853)), (1000, 600, (853, 512))])
def test_the_shortest_side_becomes_512_and_the_nearest_label_stays(full, height, width, size):
    save_jpeg(full / f"{FULL}.jpg", width, height)
    lines = np.full(max(height, width), 2)
    # 600 -> 512: pixel 1 is at 1.17, 6 at 7.03 and 511 at 598.8; those to the left of them are 1, 7 and 598.
    lines[[1, 7, 598]] = 312, 2420, 2855
    seg = np.broadcast_to(lines[:height, None] if height < width else lines[:width], (height, width))
    save_full_seg(full / f"{FULL}_seg.png", seg)
    label = read_all(Ade20k847(), full)["ADE_val_00000001"].label
    assert label.shape == size
    line = label[:, 0] if height < width else label[0]
    assert {int(place): int(line[place]) for place in np.flatnonzero(line != 65535)} == {1: 1, 6: 2, 511: 3}


def test_a_shrunken_image_is_between_its_two_nearest_rows_without_smoothing(full):
    # 768 x 1024 -> 512 x 683: pixel k is at 1.5 k + 0.25, so pixel 0 has 0.75 of row 0 and 0.25 of row 1,
    # pixel 1 has 0.25 of row 1 and 0.75 of row 2.
    image = np.zeros((768, 1024, 3), np.uint8)
    image[0], image[1], image[2] = 40, 80, 160
    Image.fromarray(image).save(full / f"{FULL}.jpg", "PNG")
    save_full_seg(full / f"{FULL}_seg.png", np.zeros((768, 1024)))
    stored = read_all(Ade20k847(), full)["ADE_val_00000001"].image
    pixels = np.asarray(Image.open(io.BytesIO(stored)))
    assert pixels.shape == (512, 683, 3)
    assert pixels[:2, 100].tolist() == [[50, 50, 50], [140, 140, 140]]


def test_a_full_label_beyond_the_list_of_objects_is_named(full):
    save_full_seg(full / f"{FULL}_seg.png", np.full((4, 6), 3688))
    read_all(Ade20k847(), full)
    save_full_seg(full / f"{FULL}_seg.png", np.full((4, 6), 3689))
    check_refused(Ade20k847(), full, f"{FULL}_seg.png", "class 3689", "3,688")


def test_a_gray_seg_or_one_of_another_size_is_named(full):
    save_png(full / f"{FULL}_seg.png", np.zeros((4, 6)))
    check_refused(Ade20k847(), full, f"{FULL}_seg.png", "mode L")
    save_full_seg(full / f"{FULL}_seg.png", np.zeros((5, 6)))
    check_refused(Ade20k847(), full, f"{FULL}_seg.png", "6 x 5", "6 x 4")


class _Command:
    """What a malicious pickle is made of: unpickling it the usual way would run a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_a_command_is_refused_and_runs_nothing(full, tmp_path, protocol):
    mark = tmp_path / "it-ran"
    content = {"filename": [], "folder": [], "objects": _Command(f"touch {mark}")}
    (full / "index_ade20k.pkl").write_bytes(pickle.dumps(content, protocol))
    check_refused(Ade20k847(), full, "index_ade20k.pkl", "refused", "system")
    assert not mark.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_index_reads_in_every_protocol_with_names_in_lists_or_arrays(full, protocol):
    path = full / "index_ade20k.pkl"
    index = pickle.loads(path.read_bytes())
    expected = Ade20k847().index(full, "validation")
    for kind in (list, np.array, lambda names: np.array(names, object)):
        changed = index | {key: kind(index[key]) for key in ("filename", "folder")}
        path.write_bytes(pickle.dumps(changed, protocol))
        assert Ade20k847().index(full, "validation") == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"folder": ["ADE20K_2021_17_01/images"]}, "3 names"),
        ({"filename": None}, "'filename' is not a list of strings"),
        ({"folder": ["/etc"] * 3}, "/etc/ADE_val_00000001.jpg"),
        ({"folder": ["ADE20K_2021_17_01/../.."] * 3}, "not an image of the release"),
        ({"filename": ["ADE_val_1.png"] * 3}, "ADE_val_1.png"),
        ({"filename": ["ADE_train_1.jpg"] * 3}, "no images of validation"),
    ],
)
def test_an_index_that_is_wrong_is_named(full, change, said):
    path = full / "index_ade20k.pkl"
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()) | change))
    check_refused(Ade20k847(), full, "index_ade20k.pkl", said)


@pytest.mark.parametrize(
    "content", [b"", b"not a pickle", pickle.dumps([1, 2]), pickle.dumps({"folder": []})]
)
def test_an_index_that_is_no_index_is_named(full, content):
    (full / "index_ade20k.pkl").write_bytes(content)
    check_refused(Ade20k847(), full, "index_ade20k.pkl")


def test_an_index_that_is_truncated_is_named(full):
    truncate(full / "index_ade20k.pkl")
    check_refused(Ade20k847(), full, "index_ade20k.pkl", "damaged")


def test_a_full_release_without_its_index_is_answered_by_the_layout(full):
    (full / "index_ade20k.pkl").unlink()
    check_refused(
        Ade20k847(), full, "expected ADE20K_2021_17_01", "missing: index_ade20k.pkl", "found: images/"
    )
