"""FiftyOne's labels, compared with what FiftyOne itself makes of masks."""

import importlib.util

import numpy as np
import pytest
import torch

from ita_segmentation.integrations import mask_targets, to_fiftyone_detections, to_fiftyone_segmentation

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
