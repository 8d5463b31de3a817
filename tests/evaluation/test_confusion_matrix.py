"""The confusion matrix against pixel-by-pixel counts, and both definitions of mean IoU."""

import math

import numpy as np
import pytest
import torch

from ita_segmentation.evaluation import ConfusionMatrix

IGNORE = 255


def counted(prediction, reference, num_classes: int, ignore_index: int = IGNORE) -> ConfusionMatrix:
    confusion = ConfusionMatrix(num_classes, ignore_index)
    confusion.update(prediction, reference)
    return confusion


def slow_matrix(prediction: np.ndarray, reference: np.ndarray, num_classes: int, ignore_index: int):
    matrix = np.zeros((num_classes, num_classes), dtype=np.int64)
    for predicted, referred in zip(prediction.ravel().tolist(), reference.ravel().tolist(), strict=True):
        if referred != ignore_index:
            matrix[referred, predicted] += 1
    return matrix


@pytest.mark.parametrize("num_classes", [1, 150, 300, 847])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.uint64, ">u2"])
def test_counts_are_those_of_a_loop_over_pixels_whatever_the_dtype(num_classes, dtype):
    rng = np.random.default_rng(num_classes)
    prediction, reference = rng.integers(0, num_classes, (2, 2, 19, 23))
    reference[rng.random(reference.shape) < 0.1] = 65535
    expected = slow_matrix(prediction, reference, num_classes, 65535)
    arrays = prediction.astype(dtype), reference.astype(dtype)
    assert np.array_equal(counted(*arrays, num_classes, 65535).matrix, expected)
    tensors = torch.from_numpy(prediction).int(), torch.from_numpy(reference)
    assert np.array_equal(counted(*tensors, num_classes, 65535).matrix, expected)


@pytest.mark.parametrize("ignore_index", [-100, 255, 10**6])
def test_what_is_predicted_on_ignored_pixels_does_not_matter(ignore_index):
    reference = np.array([[0, ignore_index, 1, ignore_index]])
    assert counted(np.array([[0, -3, 0, 10**9]]), reference, 2, ignore_index).matrix.tolist() == [
        [1, 0],
        [1, 0],
    ]


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        (np.int64(70000), np.int64(0), "prediction holds label 70000"),
        (np.int64(-1), np.int64(0), "prediction holds label -1"),
        (np.uint8(0), np.uint8(254), "reference holds label 254, outside the 3 classes"),
        (np.int16(0), np.int16(-255), "reference holds label -255"),
        (np.float32(0), np.uint8(0), "integer"),
    ],
)
def test_one_wrong_label_is_named_and_nothing_is_counted(prediction, reference, message):
    good = np.random.default_rng(0).integers(0, 3, (2, 50))
    predicted, referred = good.astype(prediction.dtype), good.astype(reference.dtype)
    predicted[1, -1], referred[1, -1] = prediction, reference
    confusion = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=message):
        confusion.update(predicted, referred)
    assert confusion.matrix.sum() == 0


def test_maps_of_different_shape_an_ignored_class_and_wrong_flags_are_refused():
    with pytest.raises(ValueError, match="shape"):
        counted(np.zeros((1, 2), int), np.zeros((2, 1), int), 3)
    with pytest.raises(ValueError, match="index of a class"):
        ConfusionMatrix(256)
    with pytest.raises(ValueError, match="at least 1"):
        ConfusionMatrix(0)
    with pytest.raises(ValueError, match="3 entries for 2"):
        counted(np.zeros((1, 2), int), np.zeros((1, 2), int), 2).compute(seen=[True, True, False])


def test_the_headline_counts_classes_with_ground_truth_and_its_companion_also_predicted_ones():
    scores = counted(np.array([[0, 0, 3]]), np.array([[0, 0, 0]]), 5).compute(
        seen=[True, True, True, False, False]
    )
    assert (scores["miou"], scores["miou_with_predicted"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert (scores["num_classes_counted"], scores["num_classes_with_predicted"]) == (1, 2)
    assert math.isnan(scores["miou_unseen"])
    assert scores["miou_unseen_with_predicted"] == 0.0
    assert scores["per_class_iou"] == pytest.approx([2 / 3, math.nan, math.nan, 0.0, math.nan], nan_ok=True)
    assert scores["per_class_acc"] == pytest.approx([2 / 3, *[math.nan] * 4], nan_ok=True)


def test_seen_and_unseen_means_split_the_classes():
    scores = counted(np.array([[0, 1, 1, 2]]), np.array([[0, 1, 2, 2]]), 4).compute(
        seen=[True, True, False, False]
    )
    assert scores["miou_seen"] == pytest.approx((1 + 1 / 2) / 2)
    assert scores["miou_unseen"] == pytest.approx(1 / 2)
    assert (scores["num_seen_counted"], scores["num_unseen_counted"]) == (2, 1)


def detectron2_scores(matrix: np.ndarray, mean_over_union: bool) -> dict[str, float]:
    """The evaluator's definition: its mean is over classes in either map (0.6) or with ground truth (main)."""
    correct = np.array([float(matrix[c, c]) for c in range(len(matrix))])
    referred = np.array([float(matrix[c].sum()) for c in range(len(matrix))])
    predicted = np.array([float(matrix[:, c].sum()) for c in range(len(matrix))])
    present = np.flatnonzero(referred)
    iou = correct[present] / (referred[present] + predicted[present] - correct[present])
    number = np.sum((referred + predicted) > 0) if mean_over_union else len(present)
    return {
        "miou": np.sum(iou) / number,
        "fwiou": np.sum(iou * (referred / np.sum(referred))[present]),
        "macc": np.sum(correct[present] / referred[present]) / len(present),
        "pacc": np.sum(correct) / np.sum(referred),
    }


def test_scores_are_detectron2s_to_the_last_bit():
    rng = np.random.default_rng(2)
    for _ in range(40):
        num_classes = int(rng.integers(1, 100))
        matrix = rng.integers(0, 10 ** rng.integers(1, 9), (num_classes, num_classes))
        matrix[rng.random(num_classes) < 0.3] = 0
        matrix[:, rng.random(num_classes) < 0.3] = 0
        matrix[0, 0] = 5
        confusion = ConfusionMatrix(num_classes)
        confusion.merge_arrays({"matrix": matrix})
        scores, expected = confusion.compute(), detectron2_scores(matrix, mean_over_union=False)
        assert {name: scores[name] for name in expected} == expected
        assert scores["miou_with_predicted"] == detectron2_scores(matrix, mean_over_union=True)["miou"]
