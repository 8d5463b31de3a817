"""Predictions in other tools' formats: what was segmented is what those tools read."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ita_segmentation.integrations import (
    coco_document,
    coco_panoptic,
    coco_results,
    segments_of,
    to_detections,
)

NAMES = ["sky", ["dog", "puppy"], "grass"]
SEMANTIC = torch.tensor([[0, 0, 0, 0], [2, 1, 1, 2], [2, 1, 2, 2]])
PANOPTIC = {
    "segmentation": torch.tensor([[1, 1, 0, 0], [1, 1, 0, 7], [0, 0, 0, 7]], dtype=torch.int32),
    "segments_info": [
        {"id": 1, "label_id": 2, "was_fused": True, "score": 0.9},
        {"id": 7, "label_id": 1, "was_fused": False, "score": 0.75},
        {"id": 9, "label_id": 0, "was_fused": False, "score": 0.7},  # hidden by others
    ],
}
OVERLAPPING = {
    "segmentation": torch.tensor(
        [[[1, 1, 0], [1, 1, 0]], [[0, 1, 1], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]], dtype=torch.bool
    ),
    "segments_info": [
        {"id": 1, "label_id": 1, "was_fused": False, "score": 0.9},
        {"id": 2, "label_id": 1, "was_fused": False, "score": 0.5},
        {"id": 3, "label_id": 1, "was_fused": False, "score": 0.4},
    ],
}


def test_segments_without_pixels_are_left_out_and_negative_classes_are_none():
    assert [segment.id for segment in segments_of(PANOPTIC)] == [1, 7]
    assert [segment.id for segment in segments_of(OVERLAPPING)] == [1, 2]
    assert [segment.label_id for segment in segments_of(np.array([[-1, 3]]))] == [3]


def test_areas_and_boxes_are_in_pixels():
    first, second = segments_of(PANOPTIC)
    assert (first.area, first.box) == (4, (0, 0, 2, 2))
    assert (second.area, second.box) == (2, (3, 1, 1, 2))


def test_run_lengths_and_floats_are_refused_in_words():
    with pytest.raises(ValueError, match="return_binary_maps"):
        segments_of({"segmentation": [[1, 2]], "segments_info": [{"id": 1, "label_id": 0}]})
    with pytest.raises(ValueError, match="class indices"):
        segments_of(torch.rand(3, 4))


# supervision


def test_detections_hold_masks_boxes_scores_and_names():
    pytest.importorskip("supervision")
    detections = to_detections(OVERLAPPING, NAMES)
    assert detections.xyxy.tolist() == [[0, 0, 2, 2], [1, 0, 3, 1]]
    assert detections.mask.dtype == bool
    assert detections.mask.tolist() == OVERLAPPING["segmentation"][:2].tolist()
    assert detections.confidence.tolist() == pytest.approx([0.9, 0.5])
    assert detections.class_id.tolist() == [1, 1]
    assert detections["class_name"].tolist() == ["dog", "dog"]
    assert len(detections[detections.confidence > 0.6]) == 1


def test_a_semantic_map_becomes_a_detection_of_each_class_without_confidence():
    pytest.importorskip("supervision")
    detections = to_detections(SEMANTIC, {0: "sky", 1: "dog", 2: "grass"})
    assert detections["class_name"].tolist() == ["sky", "dog", "grass"]
    assert detections.confidence is None
    assert detections.area.tolist() == [4, 3, 5]


def test_a_result_without_segments_is_empty_detections():
    pytest.importorskip("supervision")
    nothing = {"segmentation": torch.zeros(2, 3, dtype=torch.int32), "segments_info": []}
    detections = to_detections(nothing, NAMES)
    assert len(detections) == 0
    assert detections.mask.shape == (0, 2, 3)


def test_supervisions_own_reading_of_a_panoptic_result_agrees():
    supervision = pytest.importorskip("supervision")
    result = {**PANOPTIC, "segments_info": PANOPTIC["segments_info"][:2]}
    theirs = supervision.Detections.from_transformers(result, id2label={0: "sky", 1: "dog", 2: "grass"})
    ours = to_detections(result, NAMES)
    assert ours.mask.tolist() == theirs.mask.tolist()
    assert ours.class_id.tolist() == theirs.class_id.tolist()
    assert ours.confidence == pytest.approx(theirs.confidence)


def test_a_class_without_a_name_is_said():
    pytest.importorskip("supervision")
    with pytest.raises(ValueError, match="class 2 is not among the 1 names"):
        to_detections(PANOPTIC, ["sky"])


# COCO


def test_coco_results_are_read_back_by_pycocotools(tmp_path):
    mask_utils = pytest.importorskip("pycocotools.mask")
    entries = json.loads(json.dumps(coco_results(OVERLAPPING, image_id=5)))
    assert [(entry["image_id"], entry["category_id"], entry["score"]) for entry in entries] == [
        (5, 2, 0.9),
        (5, 2, 0.5),
    ]
    for entry, mask in zip(entries, OVERLAPPING["segmentation"], strict=False):
        assert mask_utils.decode(entry["segmentation"]).tolist() == mask.int().tolist()
        assert mask_utils.area(entry["segmentation"]) == entry["area"]
        assert mask_utils.toBbox(entry["segmentation"]).tolist() == entry["bbox"]


def test_a_document_is_what_pycocotools_scores_results_with(tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    images = [{"id": 5, "file_name": "a.jpg", "width": 3, "height": 2}]
    entries = coco_results(OVERLAPPING, image_id=5)
    (tmp_path / "truth.json").write_text(json.dumps(coco_document(images, entries, NAMES, stuff_ids={0, 2})))
    truth = coco.COCO(str(tmp_path / "truth.json"))
    assert [category["name"] for category in truth.loadCats(truth.getCatIds())] == ["sky", "dog", "grass"]
    assert [category["isthing"] for category in truth.loadCats(truth.getCatIds())] == [0, 1, 0]
    evaluation = COCOeval(truth, truth.loadRes(entries), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


def test_own_category_ids_take_the_place_of_the_index():
    pytest.importorskip("pycocotools")
    entries = coco_results(SEMANTIC, image_id="a", category_ids=[90, 18, 7])
    assert [entry["category_id"] for entry in entries] == [90, 18, 7]
    assert {entry["score"] for entry in entries} == {1.0}
    with pytest.raises(ValueError, match="category ids"):
        coco_results(SEMANTIC, image_id="a", category_ids=[90])


def test_a_panoptic_png_holds_the_ids_as_panopticapi_reads_them():
    png, annotation = coco_panoptic(PANOPTIC, 5, "a.png")
    stream = io.BytesIO()
    png.save(stream, "PNG")
    colors = np.array(Image.open(stream)).astype(int)
    ids = colors[..., 0] + 256 * colors[..., 1] + 256**2 * colors[..., 2]
    assert ids.tolist() == PANOPTIC["segmentation"].tolist()
    assert annotation["file_name"] == "a.png"
    assert annotation["segments_info"][1] == {
        "id": 7,
        "category_id": 2,
        "area": 2,
        "bbox": [3, 1, 1, 2],
        "iscrowd": 0,
        "score": 0.75,
    }


def test_ids_above_a_byte_and_semantic_classes_fit_a_panoptic_png():
    many = {
        "segmentation": torch.tensor([[70_000, 300]], dtype=torch.int32),
        "segments_info": [
            {"id": 70_000, "label_id": 0, "score": 1.0},
            {"id": 300, "label_id": 1, "score": 1.0},
        ],
    }
    assert np.array(coco_panoptic(many, 1, "a.png")[0]).tolist() == [[[112, 17, 1], [44, 1, 0]]]
    semantic, annotation = coco_panoptic(SEMANTIC, 1, "a.png")
    assert np.array(semantic)[..., 0].tolist() == (SEMANTIC + 1).tolist()
    assert [entry["area"] for entry in annotation["segments_info"]] == [4, 3, 5]


def test_overlapping_masks_make_no_panoptic_png():
    with pytest.raises(ValueError, match="overlap"):
        coco_panoptic(OVERLAPPING, 1, "a.png")


def test_a_document_names_what_does_not_belong():
    entry = coco_panoptic(PANOPTIC, 5, "a.png")[1]
    images = [{"id": 5, "file_name": "a.jpg", "width": 4, "height": 3}]
    assert coco_document(images, [entry], NAMES)["annotations"] == [entry]
    with pytest.raises(ValueError, match="image 5"):
        coco_document([], [entry], NAMES)
    with pytest.raises(ValueError, match="category 3"):
        coco_document(images, [entry], NAMES[:2])


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("supervision", lambda: to_detections(PANOPTIC, NAMES)),
        ("pycocotools", lambda: coco_results(PANOPTIC, 1)),
    ],
)
def test_a_package_that_is_missing_is_one_clear_line(package, call, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        call()
