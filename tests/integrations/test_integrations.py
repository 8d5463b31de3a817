"""Predictions in other tools' formats: what was segmented is what those tools read."""

import contextlib
import importlib
import io
import json
import threading
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from helpers.tiny_checkpoint import save_tiny_checkpoint
from ita_segmentation.checkpoints import load_checkpoint
from ita_segmentation.integrations import (
    coco_document,
    coco_panoptic,
    coco_results,
    label_studio_task,
    labeling_config,
    mask_polygons,
    segments_of,
    to_detections,
)
from ita_segmentation.prediction import SegmentedImage

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


# Polygons


def blobs(seed: int, size: tuple[int, int] = (40, 60)) -> np.ndarray:
    """A mask with holes, islands in them, and parts that touch at corners."""
    noise = np.random.default_rng(seed).integers(0, 255, size, np.uint8)
    return np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(seed % 3))) > 128


@pytest.mark.parametrize("seed", range(6))
def test_polygons_give_the_mask_back_with_its_holes(seed, tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    mask = blobs(seed)
    result = {"segmentation": mask[None], "segments_info": [{"id": 1, "label_id": 0, "score": 0.5}]}
    entries = coco_results(result, image_id=1, polygons=True)
    assert len(entries[0]["segmentation"]) == len(mask_polygons(mask))
    images = [{"id": 1, "file_name": "a.png", "width": 60, "height": 40}]
    (tmp_path / "a.json").write_text(json.dumps(coco_document(images, entries, ["blob"])))
    loaded = coco.COCO(str(tmp_path / "a.json"))
    assert (loaded.annToMask(loaded.loadAnns(loaded.getAnnIds())[0]) == mask).all()


def test_a_polygon_of_a_ring_is_one_outline_with_a_cut():
    ring = np.ones((5, 5), bool)
    ring[2, 2] = False
    [outline] = mask_polygons(ring)
    assert {tuple(point) for point in outline.tolist()} >= {(0, 0), (5, 0), (5, 5), (0, 5), (2, 2), (3, 3)}
    assert mask_polygons(np.zeros((3, 3), bool)) == []


# Label Studio


def segmented(masks: np.ndarray) -> SegmentedImage:
    entries = [{"id": n + 1, "label_id": n % 2, "score": 0.9 - n / 10} for n in range(len(masks))]
    return SegmentedImage(
        label_map=np.zeros(masks.shape[1:], np.uint8),
        task="instance",
        vocabulary=[["cat", "kitten"], ['"dog" & co']],
        segments=[],
        result={"segmentation": masks, "segments_info": entries},
    )


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return (one & other).sum() / (one | other).sum()


@pytest.mark.parametrize("size", [(40, 60), (300, 500)])
def test_brush_masks_come_back_from_label_studios_own_converter(size):
    brush = pytest.importorskip("label_studio_sdk.converter.brush")
    masks = np.stack([blobs(seed, size) for seed in (0, 2)])
    masks[1, :, : size[1] // 2] = True  # long runs
    task = json.loads(json.dumps(label_studio_task(segmented(masks), "/data/a.png", "ita")))
    [prediction] = task["predictions"]
    assert task["data"] == {"image": "/data/a.png"}
    assert prediction["score"] == pytest.approx(0.85)
    assert [one["score"] for one in prediction["result"]] == [0.9, 0.8]
    for region, mask in zip(prediction["result"], masks, strict=True):
        assert (region["original_height"], region["original_width"]) == size
        decoded = brush.decode_rle(region["value"]["rle"]).reshape(*size, 4)[..., 3] > 0
        assert iou(decoded, mask) >= 0.98
    assert [one["value"]["brushlabels"] for one in prediction["result"]] == [["cat"], ['"dog" & co']]


def test_label_studios_converter_makes_coco_of_the_polygons(tmp_path):
    converter = pytest.importorskip("label_studio_sdk.converter")
    from pycocotools import mask as mask_utils

    mask = np.zeros((40, 60), bool)
    mask[5:30, 10:50] = True
    mask[12:20, 20:35] = False
    task = label_studio_task(segmented(mask[None]), "a.png", polygons=True)
    config = labeling_config([["cat"], ["dog"]], polygons=True)
    task = {"id": 1, "data": task["data"], "annotations": [{"id": 1, **task["predictions"][0]}]}
    (tmp_path / "tasks.json").write_text(json.dumps([task]))
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    converter.Converter(config, str(tmp_path), download_resources=False).convert_to_coco(
        str(tmp_path / "tasks.json"), str(tmp_path / "coco"), is_dir=False
    )
    document = json.loads((tmp_path / "coco" / "result.json").read_text())
    [annotation] = document["annotations"]
    decoded = mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(annotation["segmentation"], 40, 60)))
    assert iou(decoded.astype(bool), mask) >= 0.98


def test_a_labeling_config_holds_every_class_whatever_its_name():
    labels = ElementTree.fromstring(labeling_config(segmented(np.ones((1, 2, 2), bool)).vocabulary)).iter(
        "Label"
    )
    assert [label.get("value") for label in labels] == ["cat", '"dog" & co']


# CVAT


@pytest.fixture
def cvat_function(tmp_path):
    pytest.importorskip("cvat_sdk")
    from ita_segmentation.integrations.cvat import create

    model = save_tiny_checkpoint(tmp_path / "model")
    return create(str(model), classes="cat, dog|puppy", device="cpu")


def test_cvat_is_told_the_labels_and_gets_masks_or_polygons(cvat_function):
    from cvat_sdk.auto_annotation import DetectionFunctionSpec
    from cvat_sdk.masks import decode_mask

    assert isinstance(cvat_function.spec, DetectionFunctionSpec)
    assert [(label.id, label.name) for label in cvat_function.spec.labels] == [(0, "cat"), (1, "dog")]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))

    def detect(threshold=None, polygons=False):
        context = SimpleNamespace(frame_name="a.png", conf_threshold=threshold, conv_mask_to_poly=polygons)
        return cvat_function.detect(context, image)

    shapes = detect(threshold=0.0)
    [result] = cvat_function.segmenter.segment_images([image])
    masks = sorted(result.masks(), key=lambda segment: -segment.area)
    assert [shape.label_id for shape in shapes] == [segment.label_id for segment in masks] != []
    for shape, segment in zip(shapes, masks, strict=True):
        assert (shape.type.value, shape.frame) == ("mask", 0)
        assert (decode_mask(shape.points, image_width=60, image_height=40) == segment.mask).all()
    assert {shape.type.value for shape in detect(threshold=0.0, polygons=True)} == {"polygon"}
    assert detect(threshold=1.0) == []
    detect()
    assert cvat_function.segmenter.threshold == 0.5, "a threshold holds for its own request only"


def test_the_example_backend_answers_label_studio(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    backend = importlib.import_module("label_studio_backend")
    model = save_tiny_checkpoint(tmp_path / "model")
    Image.new("RGB", (60, 40), "green").save(tmp_path / "a.png")
    monkeypatch.setattr(backend, "read_image", lambda url: Image.open(tmp_path / "a.png").convert("RGB"))
    monkeypatch.setattr(backend.Backend, "checkpoint", load_checkpoint(model, "cpu"), raising=False)
    monkeypatch.setattr(backend.Backend, "task", "semantic", raising=False)
    server = backend.HTTPServer(("127.0.0.1", 0), backend.Backend)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(path: str, **document) -> dict:
        body = json.dumps(document).encode() if document else None
        url = f"http://127.0.0.1:{server.server_port}{path}"
        with contextlib.suppress(urllib.error.HTTPError):
            return json.load(urllib.request.urlopen(url, body, timeout=30))
        return {}

    try:
        assert ask("/health")["status"] == "UP"
        config, task = labeling_config([["cat"], ["dog"]]), {"data": {"image": "http://a/a.png"}}
        [prediction] = ask("/predict", label_config=config, tasks=[task])["results"]
        assert {one["value"]["brushlabels"][0] for one in prediction["result"]} <= {"cat", "dog"}
        assert ask("/predict", label_config=config, tasks=[{"data": {"image": "/etc/hosts"}}]) == {}
    finally:
        server.shutdown()
