"""FiftyOne's labels and model; without the fiftyone package only the line that says so is tested."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.tiny_checkpoint import tiny_config
from ita_segmentation.integrations import mask_targets, to_fiftyone_detections, to_fiftyone_segmentation
from modeling_ita import ITAForOpenVocabSegmentation, ITAImageProcessor

needs_fiftyone = pytest.mark.skipif(
    importlib.util.find_spec("fiftyone") is None, reason="fiftyone is not installed"
)
NAMES = ["sky", ["dog", "puppy"], "grass"]
PANOPTIC = {
    "segmentation": torch.tensor([[1, 1, 0, 0], [1, 0, 0, 7], [0, 0, 0, 7]], dtype=torch.int32),
    "segments_info": [
        {"id": 1, "label_id": 2, "was_fused": True, "score": 0.9},
        {"id": 7, "label_id": 1, "was_fused": False, "score": 0.75},
    ],
}


def test_a_missing_fiftyone_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    monkeypatch.setitem(sys.modules, "fiftyone.core.labels", None)
    with pytest.raises(ImportError, match="pip install fiftyone"):
        to_fiftyone_detections(PANOPTIC, NAMES)


def test_mask_targets_begin_at_one():
    assert mask_targets(NAMES) == {1: "sky", 2: "dog", 3: "grass"}


@needs_fiftyone
def test_detections_have_relative_boxes_and_masks_cropped_to_them():
    first, second = to_fiftyone_detections(PANOPTIC, NAMES).detections
    assert (first.label, first.confidence, second.label) == ("grass", 0.9, "dog")
    assert first.bounding_box == pytest.approx([0, 0, 2 / 4, 2 / 3])
    assert first.mask.tolist() == [[True, True], [True, False]]
    assert second.bounding_box == pytest.approx([3 / 4, 1 / 3, 1 / 4, 2 / 3])


@needs_fiftyone
def test_detections_are_what_fiftyone_makes_of_whole_masks():
    import fiftyone

    for detection in to_fiftyone_detections(PANOPTIC, NAMES).detections:
        number = {"grass": 1, "dog": 7}[detection.label]
        mask = (PANOPTIC["segmentation"] == number).numpy()
        theirs = fiftyone.Detection.from_mask(mask, label=detection.label)
        assert detection.bounding_box == pytest.approx(theirs.bounding_box)
        assert detection.mask.tolist() == theirs.mask.astype(bool).tolist()
        assert detection.to_segmentation(frame_size=(4, 3)).mask.astype(bool).tolist() == mask.tolist()


@needs_fiftyone
def test_a_semantic_map_keeps_zero_for_no_class():
    label = to_fiftyone_segmentation(torch.tensor([[0, 2], [-1, 1]]))
    assert label.mask.dtype == np.uint8
    assert label.mask.tolist() == [[1, 3], [0, 2]]
    assert to_fiftyone_segmentation(np.array([[255]])).mask.tolist() == [[256]]
    with pytest.raises(ValueError, match="to_fiftyone_detections"):
        to_fiftyone_segmentation(PANOPTIC)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = ITAForOpenVocabSegmentation(tiny_config()).eval()
    return model, ITAImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})


def pixels(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 255, (height, width, 3), np.uint8)


@needs_fiftyone
@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_a_batch_of_different_sizes_gives_what_single_images_give(task, network):
    from ita_segmentation.integrations.fiftyone_model import ITAFiftyOneModel

    model = ITAFiftyOneModel(*network, vocabulary=NAMES, task=task)
    model.config.confidence_thresh = 0.0
    images = [pixels(40, 60), pixels(64, 32)]
    with model:
        together, single = model.predict_all(images), [model.predict(one) for one in images]
    for one, other, array in zip(together, single, images, strict=True):
        if task == "semantic":
            assert one.mask.shape == array.shape[:2]
            assert one.mask.tolist() == other.mask.tolist()
        else:
            assert len(one.detections) == len(other.detections)
            assert one.detections or task == "panoptic"  # random weights may agree on no segment
            assert {detection.label for detection in one.detections} <= {"sky", "dog", "grass"}
            for mine, theirs in zip(one.detections, other.detections, strict=True):
                assert mine.mask.tolist() == theirs.mask.tolist()


@needs_fiftyone
def test_apply_models_threshold_and_classes_reach_the_model(network):
    from ita_segmentation.integrations.fiftyone_model import ITAFiftyOneModel

    model = ITAFiftyOneModel(*network, vocabulary=NAMES, task="instance")
    model.config.confidence_thresh = 0.0
    everything = model.predict(pixels(40, 60)).detections
    model.config.filter_classes = {"dog"}
    only_dogs = model.predict(pixels(40, 60)).detections
    assert len(only_dogs) == sum(detection.label == "dog" for detection in everything) > 0
    model.config.confidence_thresh = 1.0
    assert model.predict(Image.fromarray(pixels(40, 60))).detections == []


@needs_fiftyone
def test_labels_fit_a_sample(network):
    import fiftyone

    from ita_segmentation.integrations.fiftyone_model import ITAFiftyOneModel

    model = ITAFiftyOneModel(*network, task="semantic")
    assert model.mask_targets == {1: "sky", 2: "dog", 3: "grass", 4: "car"}
    sample = fiftyone.Sample(filepath="a.png")
    sample.add_labels(model.predict(pixels(40, 60)), label_field="ita")
    assert sample["ita"].mask.shape == (40, 60)


@needs_fiftyone
def test_an_unknown_task_is_said(network):
    from ita_segmentation.integrations.fiftyone_model import ITAFiftyOneModel

    with pytest.raises(ValueError, match="one of semantic"):
        ITAFiftyOneModel(*network, task="depth")
