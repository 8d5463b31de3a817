"""Mask AP: cases worked out by hand, the forms in which masks come, and what is refused."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from ita_segmentation.evaluation import MaskAveragePrecision


def columns(*ranges: tuple[int, int], height: int = 10, width: int = 30) -> np.ndarray:
    """Masks that each fill some neighboring columns of an image."""
    masks = np.zeros((len(ranges), height, width), dtype=bool)
    for mask, (first, end) in zip(masks, ranges, strict=True):
        mask[:, first:end] = True
    return masks


def scored(*images: tuple, num_classes: int = 1, **kwargs) -> dict:
    average = MaskAveragePrecision(num_classes)
    for image in images:
        average.update(*image)
    return average.compute(**kwargs)


def test_a_perfect_detector_scores_one_and_a_shifted_one_what_is_worked_out_by_hand():
    reference = columns((0, 10))
    perfect = scored((0, [0.5], [0], reference, [0], reference))
    assert (perfect["ap"], perfect["ar1"]) == (pytest.approx(1.0), 1.0)
    assert np.isnan(perfect["apl"])
    # 8 of 12 columns agree: IoU 0.667 passes 0.50, 0.55, 0.60 and 0.65 of the ten thresholds
    shifted = scored((0, [0.5], [0], columns((2, 12)), [0], reference))
    assert (shifted["ap"], shifted["ap50"], shifted["ap75"]) == pytest.approx((0.4, 1.0, 0.0))


def test_classes_areas_and_groups_have_their_own_means():
    reference = np.ones((1, 32, 32), dtype=bool)  # on the border of two ranges: in both
    images = [
        (3, [0.9, 0.8], [0, 1], np.ones((2, 32, 32), bool), [0], reference),
        (1, [], [], [], [1], reference),
    ]
    scores = scored(*images, num_classes=3, seen=[True, False, True])
    assert scores["per_class_ap"] == pytest.approx([1.0, 0.0, np.nan], nan_ok=True)
    assert (scores["ap"], scores["ap_seen"], scores["ap_unseen"]) == pytest.approx((0.5, 1.0, 0.0))
    assert (scores["num_classes_counted"], scores["num_seen_counted"], scores["num_unseen_counted"]) == (
        2,
        1,
        1,
    )
    assert (scores["aps"], scores["apm"]) == pytest.approx((0.5, 0.5))
    assert np.isnan(scores["apl"])


@pytest.mark.parametrize(("second", "expected"), [((12, 15), 1.0), ((4, 13), 0.5)])
def test_a_detection_inside_a_crowd_is_ignored_and_one_beside_it_is_a_false_positive(second, expected):
    references, detections = columns((0, 10), (10, 30)), columns((0, 10), second)
    image = (0, [0.5, 0.9], [0, 0], detections, [0, 0], references, [False, True])
    assert scored(image)["ap50"] == pytest.approx(expected)


def test_equal_scores_go_by_image_id_whatever_the_order_and_the_number_of_parts():
    rng = np.random.default_rng(2)
    images = []
    for image_id in range(8):
        reference = rng.random((2, 20, 20)) < 0.5
        detections = np.concatenate([reference, rng.random((4, 20, 20)) < 0.5])
        scores = rng.integers(0, 3, 6) / 2
        images.append((image_id, scores, rng.integers(0, 3, 6), detections, [0, 1], reference))
    expected = scored(*images, num_classes=3)
    parts = [MaskAveragePrecision(3) for _ in range(3)]
    for index in rng.permutation(8):
        parts[index % 3].update(*images[index])
    total = MaskAveragePrecision(3)
    for part in (parts[2], parts[0], parts[1]):
        total.merge_arrays(part.arrays())
    assert repr(total.compute()) == repr(expected)
    assert 0 < expected["ap"] < 1


def test_masks_may_be_arrays_tensors_lists_integers_and_run_lengths():
    rng = np.random.default_rng(5)
    masks = rng.random((3, 9, 11)) < 0.5
    encoded = [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
    average = MaskAveragePrecision(1)
    forms = [
        masks,
        torch.from_numpy(masks),
        list(masks),
        [torch.from_numpy(mask) for mask in masks],
        masks.astype(np.uint8) * 255,
        np.asfortranarray(masks),
        encoded,
        [one | {"counts": one["counts"].decode()} for one in encoded],
    ]
    for image_id, form in enumerate(forms):
        average.update(image_id, [0.5, 0.6, 0.7], [0, 0, 0], form, [0, 0, 0], masks)
    scores = average.compute()
    assert (scores["ap"], scores["ar100"]) == (pytest.approx(1.0), 1.0)
    runs = {"size": [2, 3], "counts": [1, 2, 3]}  # column by column: 0 1 | 1 0 | 0 0
    mask = np.array([[[0, 1, 0], [1, 0, 0]]], dtype=bool)
    assert scored((0, [0.5], [0], [runs], [0], mask))["ap"] == pytest.approx(1.0)


ONES = np.ones((1, 4, 4), dtype=bool)
GOOD = {
    "image_id": 1,
    "scores": [0.5],
    "labels": [0],
    "masks": ONES,
    "reference_labels": [1],
    "reference_masks": ONES,
    "reference_crowd": [False],
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [float("nan")]}, "score nan"),
        ({"scores": [0.5, 0.6]}, "scores has shape"),
        ({"labels": [2]}, "prediction holds label 2"),
        ({"labels": [0.5]}, "integer"),
        ({"reference_labels": [-1]}, "reference holds label -1"),
        ({"reference_labels": []}, "reference has 1 masks and labels"),
        ({"reference_crowd": [False, True]}, "reference_crowd has shape"),
        ({"masks": np.ones((1, 4, 5), bool)}, "prediction masks have size"),
        ({"masks": [np.ones((4, 4), bool), np.ones((4, 5), bool)]}, "different sizes"),
        ({"masks": np.ones((1, 4, 4))}, "bool or integer"),
        ({"masks": np.ones((4, 4), bool)}, "must be .height, width."),
    ],
)
def test_detections_that_cannot_be_counted_are_refused_and_nothing_is_counted(changes, message):
    average = MaskAveragePrecision(2)
    with pytest.raises(ValueError, match=message):
        average.update(**(GOOD | changes))
    assert not any(len(array) for array in average.arrays().values())


def test_an_image_that_was_counted_twice_is_refused_and_without_references_nothing_is_scored():
    one, other = MaskAveragePrecision(2), MaskAveragePrecision(2)
    one.update(**GOOD)
    other.update(**GOOD)
    one.merge_state(other)
    with pytest.raises(ValueError, match="image 1 was counted more than once"):
        one.compute()
    scores = scored((1, [0.5], [0], ONES, [], []), num_classes=2)
    assert all(np.isnan(scores[name]) for name in ("ap", "ap50", "aps", "ar1", "arl"))
    assert scores["num_classes_counted"] == 0
