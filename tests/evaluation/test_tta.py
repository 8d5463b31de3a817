"""Class maps from several crops of an image equal the sum of the crops' dense scores, computed one by one."""

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.tiny_checkpoint import CLASSES, save_tiny_checkpoint
from ita_segmentation.checkpoints import load_checkpoint
from ita_segmentation.evaluation import TestTimeAugmentation
from ita_segmentation.evaluation.ita_predictor import ITAPredictor
from ita_segmentation.evaluation.tta import Crop, CropOutput, merge_crops
from modeling_ita import mask_tiles
from modeling_ita.postprocessing import semantic_scores

SEMANTIC = frozenset({"semantic"})
SIZE = {"shortest_edge": 64, "longest_edge": 128}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_checkpoint(save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint")), "cpu")


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 255, (90, 150, 3), np.uint8))


def predictor(loaded, augmentation: TestTimeAugmentation) -> ITAPredictor:
    classes = [[entry] if isinstance(entry, str) else entry for entry in CLASSES]
    model, processor = loaded
    return ITAPredictor(model, processor, classes, augmentation=augmentation)


def test_one_view_is_the_whole_image_at_the_processors_size():
    assert TestTimeAugmentation().is_identity
    assert TestTimeAugmentation().crops((90, 150), SIZE) == [
        Crop((0, 0, 90, 150), (64, 106))
    ]  # sides are cut to whole pixels
    assert TestTimeAugmentation().crops((90, 150), None) == [Crop((0, 0, 90, 150), (90, 150))]


def test_scales_multiply_both_limits_and_flips_come_beside():
    found = TestTimeAugmentation(scales=(0.5, 2.0), flip=True).crops((90, 150), SIZE)
    assert [(crop.size, crop.flipped) for crop in found] == [
        ((32, 53), False),
        ((32, 53), True),
        ((128, 213), False),
        ((128, 213), True),
    ]


def test_windows_begin_a_stride_apart_and_the_last_ends_with_the_side():
    # 100 x 250 at its own size, windows of 100: columns 0, 60, 120 and, to end with the side, 150
    found = TestTimeAugmentation(window=100, stride=60).crops((100, 250), None)
    assert [crop.region for crop in found] == [
        (0, 0, 100, 100),
        (0, 60, 100, 160),
        (0, 120, 100, 220),
        (0, 150, 100, 250),
    ]
    assert {crop.size for crop in found} == {(100, 100)}


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (7, 5), (333, 500), (500, 90)])
@pytest.mark.parametrize(
    "augmentation",
    [TestTimeAugmentation(window=32, stride=21), TestTimeAugmentation(scales=(0.3, 1.7), window=50)],
)
def test_every_pixel_is_in_a_view_of_each_scale(size, augmentation):
    for scale in augmentation.scales:
        covered = np.zeros(size, int)
        for crop in TestTimeAugmentation(
            scales=(scale,), window=augmentation.window, stride=augmentation.stride
        ).crops(size, SIZE):
            top, left, bottom, right = crop.region
            assert 0 <= top < bottom <= size[0]
            assert 0 <= left < right <= size[1]
            covered[top:bottom, left:right] += 1
        assert covered.min() >= 1


def test_the_map_is_the_argmax_of_the_dense_scores_added_up(monkeypatch):
    torch.manual_seed(0)
    regions = [(0, 0, 40, 60), (0, 0, 25, 60), (20, 10, 40, 45)]
    outputs, total = [], torch.zeros(5, 40, 60)
    for region, flipped in [(region, flipped) for region in regions for flipped in (False, True)]:
        top, left, bottom, right = region
        classes, masks = torch.randn(7, 6), torch.randn(7, 8, 16)
        outputs.append(CropOutput(Crop(region, (30, 50), flipped), classes, masks))
        dense = semantic_scores(classes, masks, (30, 50), (bottom - top, right - left))
        total[:, top:bottom, left:right] += dense.flip(-1) if flipped else dense
    expected = total.argmax(0)
    assert torch.equal(merge_crops(outputs, (40, 60)), expected)
    monkeypatch.setattr(mask_tiles, "TILE_BYTES", 20_000)  # a few rows at a time
    assert torch.equal(merge_crops(outputs, (40, 60)), expected)
    assert not torch.equal(merge_crops(outputs[::2], (40, 60)), expected)


def test_a_single_view_says_what_the_plain_path_says(loaded, image, monkeypatch):
    plain = predictor(loaded, TestTimeAugmentation())([image], [(90, 150)], SEMANTIC)[0].semantic
    monkeypatch.setattr(TestTimeAugmentation, "is_identity", False)
    assert np.array_equal(
        predictor(loaded, TestTimeAugmentation())([image], [(90, 150)], SEMANTIC)[0].semantic, plain
    )


def test_flips_make_the_answer_for_a_mirrored_image_the_mirrored_answer(loaded, image):
    flips = predictor(loaded, TestTimeAugmentation(flip=True))
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    one, other = flips([image, mirrored], [(90, 150)] * 2, SEMANTIC)
    assert (one.semantic == other.semantic[:, ::-1]).mean() > 0.999


def test_a_predictor_with_several_views_looks_at_each_by_itself(loaded, image):
    model, processor = loaded
    augmentation = TestTimeAugmentation(scales=(0.75, 1.0), flip=True, window=48, stride=32)
    found = predictor(loaded, augmentation)([image], [(90, 150)], SEMANTIC)[0].semantic
    total = torch.zeros(4, 90, 150)
    for crop in augmentation.crops((90, 150), processor.size):
        top, left, bottom, right = crop.region
        pixels = np.array(image)[top:bottom, left:right]
        pixels = np.ascontiguousarray(pixels[:, ::-1]) if crop.flipped else pixels
        size = {"height": crop.size[0], "width": crop.size[1]}
        with torch.inference_mode():
            outputs = model(**processor(images=pixels, size=size, return_tensors="pt"))
        dense = processor.post_process_semantic_segmentation(
            outputs, target_sizes=[(bottom - top, right - left)], return_segmentation_scores=True
        )[0]["segmentation_scores"]
        total[:, top:bottom, left:right] += dense.flip(-1) if crop.flipped else dense
    assert (total.argmax(0).numpy() == found).mean() > 0.999
    assert predictor(loaded, augmentation).tasks == SEMANTIC


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scales": ()}, "scales must be numbers above 0"),
        ({"scales": (1.0, -1.0)}, "scales must be numbers above 0"),
        ({"window": 8}, "at least 32"),
        ({"window": 64, "stride": 65}, "stride must be between 1 and"),
        ({"stride": 10}, "stride must be between 1 and"),
    ],
)
def test_plans_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TestTimeAugmentation(**arguments)
