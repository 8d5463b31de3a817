"""Large results are held once: many masks of a large image take little more memory than the masks themselves."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.peak_memory import needs_peak_memory, peak_bytes
from ita_segmentation.integrations import to_detections
from modeling_ita import ITAImageProcessor, pipeline_ita
from modeling_ita.pipeline_ita import ITAImageSegmentationPipeline
from modeling_ita.tiled_segmentation import TiledResult
from modeling_ita.tiling import Tiling

COUNT = 100
SMALL = (1200, 1600)
LARGE = (3000, 4000)
SIZES = [SMALL, pytest.param(LARGE, marks=pytest.mark.slow)]
NAMES = ["a", "b"]


def outputs(size):
    """Give what a network that finds `COUNT` things, which do not overlap, says of an image."""
    classes = torch.full((1, COUNT, 3), -20.0)
    classes[..., 0] = 5
    rows, columns = size[0] // 20, size[1] // 20
    masks = torch.full((1, COUNT, rows, columns), -9.0)
    for query in range(COUNT):
        top, left = query // 10 * (rows // 10), query % 10 * (columns // 10)
        masks[0, query, top : top + rows // 12, left : left + columns // 12] = 9
    return {
        "class_queries_logits": classes,
        "masks_queries_logits": masks,
        "image_sizes": torch.tensor([[4 * rows, 4 * columns]]),
        "target_size": [size],
    }


def boxed_instances(size):
    """Give what `COUNT` instances that are found in tiles become: a map, and of each its box and the mask within it."""
    segments, masks, labels = [], [], np.zeros(size, np.int32)
    side = size[0] // 10, size[1] // 10
    for number in range(COUNT):
        top, left = number // 10 * side[0], number % 10 * side[1]
        box = (top, left, top + side[0], left + side[1])
        labels[box[0] : box[2], box[1] : box[3]] = number + 1
        segments.append({"id": number + 1, "label_id": 0, "was_fused": False, "score": 0.9})
        masks.append((box, np.ones(side, bool)))
    return {"segmentation": labels, "segments_info": segments, "masks": masks}


@pytest.fixture
def pipe():
    """A pipeline without a network, whose outputs are given."""
    needs_peak_memory()
    made = ITAImageSegmentationPipeline.__new__(ITAImageSegmentationPipeline)
    made.image_processor = ITAImageProcessor()
    made.model = SimpleNamespace(config=SimpleNamespace(id2label=dict(enumerate(NAMES))))
    made.postprocess(outputs((60, 80)))  # what is loaded once does not count
    return made


@pytest.mark.parametrize("subtask", ["instance", "panoptic"])
@pytest.mark.parametrize("size", SIZES)
def test_the_pipeline_holds_each_mask_once(pipe, subtask, size):
    given = outputs(size)
    found, peak = peak_bytes(lambda: pipe.postprocess(given, subtask=subtask))
    assert len(found) == COUNT
    assert all(np.asarray(one["mask"]).max() == 255 for one in found[:: COUNT - 1])
    assert peak < 1.6 * COUNT * size[0] * size[1]


@pytest.mark.parametrize("size", SIZES)
def test_the_pipeline_holds_each_mask_of_tiles_once(pipe, size, monkeypatch):
    result = boxed_instances(size)
    found = TiledResult(torch.from_numpy(result.pop("segmentation")), **result)
    monkeypatch.setattr(pipeline_ita, "segment_tiles", lambda *arguments, **options: found)
    monkeypatch.setattr(pipe, "device_placement", nullcontext, raising=False)
    call = lambda: pipe.postprocess({"image": None}, subtask="instance", tiling=Tiling(64))  # noqa: E731
    segments, peak = peak_bytes(call)
    assert [np.count_nonzero(one["mask"]) for one in segments[:: COUNT - 1]] == [size[0] * size[1] // 100] * 2
    assert peak < 1.6 * COUNT * size[0] * size[1]


@pytest.mark.parametrize("form", ["binary maps", "id map", "masks of tiles"])
@pytest.mark.parametrize("size", SIZES)
def test_detections_hold_each_mask_once(pipe, form, size):
    pytest.importorskip("supervision")
    post_process = pipe.image_processor.post_process_panoptic_segmentation
    options = {}
    if form == "binary maps":
        post_process = pipe.image_processor.post_process_instance_segmentation
        options = {"return_binary_maps": True}
    if form == "masks of tiles":
        result = boxed_instances(size)
    else:
        [result] = post_process(outputs(size), target_sizes=[size], **options)
    to_detections({"segmentation": np.ones((2, 2), int), "segments_info": []}, NAMES)  # imports
    detections, peak = peak_bytes(lambda: to_detections(result, NAMES))
    assert len(detections) == COUNT
    given = 1 if form == "binary maps" else 0
    assert (given * COUNT * size[0] * size[1] + peak) < 1.6 * COUNT * size[0] * size[1]


def test_a_mask_without_pixels_is_left_out_of_the_detections():
    pytest.importorskip("supervision")
    masks = torch.zeros(3, 4, 5, dtype=torch.bool)
    masks[0, 1, 2] = masks[2, 3, :2] = True
    segments = [{"id": number, "label_id": 0, "score": 0.5 + number / 10} for number in (1, 2, 3)]
    detections = to_detections({"segmentation": masks, "segments_info": segments}, NAMES)
    assert detections.mask.tolist() == masks[[0, 2]].tolist()
    assert detections.confidence.tolist() == pytest.approx([0.6, 0.8])
