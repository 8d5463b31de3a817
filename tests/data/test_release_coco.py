"""COCO panoptic: miniature releases become what was worked out by hand, and each defect is answered by its name."""

import json

import numpy as np
import pytest

from helpers.miniature_releases import build_coco_panoptic, save_png, save_segment_ids
from helpers.release_checks import check_refused, check_split, read_all
from ita_segmentation.data.benchmarks.coco import CocoPanoptic

IMAGE = "val2017/000000000139.jpg"
MAP = "annotations/panoptic_val2017/000000000139.png"
JSON = "annotations/panoptic_val2017.json"


@pytest.fixture
def coco(tmp_path):
    build_coco_panoptic(tmp_path)
    return tmp_path


def change_json(source, change):
    content = json.loads((source / JSON).read_text())
    change(content)
    (source / JSON).write_text(json.dumps(content))


def change_segment(source, **values):
    """Changes the second segment of the first image: id 7, a person."""
    change_json(source, lambda content: content["annotations"][0]["segments_info"][1].update(values))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_maps_may_be_unpacked_beside_the_annotations(tmp_path, split):
    expected = build_coco_panoptic(tmp_path, maps_beside=True)
    check_split(CocoPanoptic(), tmp_path, split, expected[split])


def test_an_image_of_many_small_segments_reads_right(coco):
    """Every pixel another segment: no run is longer than one pixel."""
    ids = np.arange(1, 25).reshape(4, 6) * 600_000
    save_segment_ids(coco / MAP, ids)
    segments = [
        {"id": segment_id, "category_id": 1 + number % 11, "iscrowd": 0}
        for number, segment_id in enumerate(ids.ravel().tolist())
    ]
    change_json(coco, lambda content: content["annotations"][0].update(segments_info=segments))
    image = read_all(CocoPanoptic(), coco)["000000000139"]
    assert image.label.ravel().tolist() == [*range(11), *range(11), 0, 1]
    assert image.panoptic.tolist() == ids.tolist()


def test_an_image_without_any_segment_is_void_all_over(coco):
    save_segment_ids(coco / MAP, np.zeros((4, 6)))
    change_json(coco, lambda content: content["annotations"][0].update(segments_info=[]))
    image = read_all(CocoPanoptic(), coco)["000000000139"]
    assert image.segments == []
    assert image.label.tolist() == [[255] * 6] * 4


def test_a_map_of_another_size_or_without_colors_is_named(coco):
    save_segment_ids(coco / MAP, np.zeros((4, 5)))
    check_refused(CocoPanoptic(), coco, MAP, "5 x 4", "6 x 4")
    save_png(coco / MAP, np.zeros((4, 6)))
    check_refused(CocoPanoptic(), coco, MAP, "mode L")


def test_an_image_that_has_no_annotation_is_named(coco):
    change_json(coco, lambda content: content["annotations"].pop(0))
    check_refused(CocoPanoptic(), coco, JSON, "no annotation of 1 of its images", "000000000139.jpg")


def test_an_id_of_the_map_that_is_not_in_the_json_is_named(coco):
    change_json(coco, lambda content: content["annotations"][0]["segments_info"].pop(0))
    check_refused(CocoPanoptic(), coco, MAP, "8000000", "does not list")


def test_a_segment_of_the_json_that_is_not_in_the_map_is_named(coco):
    segment = {"id": 12, "category_id": 1, "iscrowd": 0}
    change_json(coco, lambda content: content["annotations"][0]["segments_info"].append(segment))
    check_refused(CocoPanoptic(), coco, MAP, "lacks the segment 12")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"category_id": 12}, "unknown category 12"),
        ({"category_id": "person"}, "unknown category person"),
        ({"id": 8000000}, "8000000 is not from 1"),
        ({"id": 0}, "0 is not from 1"),
        ({"id": 1 << 24}, "16777216 is not from 1"),
        ({"id": "7"}, "'7' is not from 1"),
        ({"id": [7]}, "malformed"),
    ],
)
def test_a_segment_of_the_wrong_id_or_category_is_named(coco, values, said):
    change_segment(coco, **values)
    check_refused(CocoPanoptic(), coco, JSON, said)


def test_a_segment_without_a_crowd_flag_is_named(coco):
    change_json(coco, lambda content: content["annotations"][0]["segments_info"][1].pop("iscrowd"))
    check_refused(CocoPanoptic(), coco, JSON, "000000000139.png", "iscrowd")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "empty"),
        ('{"images": [', "not JSON"),
        ("[1]", "'images' and 'annotations'"),
        ('{"images": []}', "'images' and 'annotations'"),
        ('{"images": [], "annotations": []}', "no annotations"),
        ('{"images": [{"id": 1}], "annotations": []}', "'file_name'"),
        ('{"images": [], "annotations": [{"image_id": 1}]}', "malformed"),
        ('{"images": [], "annotations": [4]}', "malformed"),
    ],
)
def test_a_json_that_is_wrong_is_named(coco, content, said):
    (coco / JSON).write_text(content)
    check_refused(CocoPanoptic(), coco, JSON, said)


def test_an_annotation_of_an_unknown_image_or_of_files_elsewhere_is_named(coco):
    change_json(coco, lambda content: content["annotations"][0].update(file_name="../000000000139.png"))
    check_refused(CocoPanoptic(), coco, JSON, "'../000000000139.png' is not a file name")
    change_json(coco, lambda content: content["annotations"][0].update(image_id=140))
    check_refused(CocoPanoptic(), coco, JSON, "no image 140")


def test_a_folder_whose_maps_are_still_packed_is_answered_by_the_layout(coco):
    maps = coco / "annotations/panoptic_val2017"
    maps.rename(coco / "annotations/elsewhere")
    said = ("expected COCO 2017", "unpacked in annotations/", "missing: annotations/panoptic_val2017")
    check_refused(CocoPanoptic(), coco, *said)
