"""The confusion matrix against pixel-by-pixel counts, and its scores against detectron2's definition, to the bit."""

import math

import numpy as np
import pytest
import torch

from ita_segmentation.evaluation import ConfusionMatrix
from ita_segmentation.evaluation.metrics.semantic import _count_pairs_on_device

DTYPES = [np.uint8, np.int16, np.uint16, np.int32, np.int64, np.uint64, ">u2"]


def noise(rng: np.random.Generator, num_classes: int, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(0, num_classes, shape)


def flat(rng: np.random.Generator, num_classes: int, shape: tuple[int, ...]) -> np.ndarray:
    """Blocks of 20 equal pixels in a row, shifted by a few."""
    labels = rng.integers(0, num_classes, math.prod(shape) // 20 + 2).repeat(20)
    return labels[rng.integers(0, 20) :][: math.prod(shape)].reshape(shape)


def slow_matrix(prediction: np.ndarray, reference: np.ndarray, num_classes: int, ignore_index: int):
    matrix = np.zeros((num_classes, num_classes), dtype=np.int64)
    for predicted, referred in zip(prediction.ravel().tolist(), reference.ravel().tolist(), strict=True):
        if referred != ignore_index:
            matrix[referred, predicted] += 1
    return matrix


@pytest.mark.parametrize("draw", [noise, flat])
@pytest.mark.parametrize("num_classes", [1, 2, 150, 255, 256, 300, 847])
def test_counts_are_those_of_a_loop_over_pixels_whatever_the_dtype(draw, num_classes):
    rng = np.random.default_rng(num_classes)
    for trial in range(12):
        ignore_index = 255 if num_classes <= 255 else int(rng.choice([847, 65535]))
        shape = [(1, 1), (37, 41), (2, 19, 23)][trial % 3]
        prediction, reference = draw(rng, num_classes, shape), draw(rng, num_classes, shape)
        reference[rng.random(shape) < 0.1] = ignore_index
        expected = slow_matrix(prediction, reference, num_classes, ignore_index)
        fitting = [dtype for dtype in DTYPES if ignore_index <= np.iinfo(dtype).max]
        confusion = ConfusionMatrix(num_classes, ignore_index)
        confusion.update(
            prediction.astype(fitting[rng.integers(len(fitting))]),
            reference.astype(fitting[trial % len(fitting)]),
        )
        assert np.array_equal(confusion.matrix, expected)


@pytest.mark.parametrize("draw", [noise, flat])
@pytest.mark.parametrize("num_classes", [3, 300])
def test_maps_larger_than_what_is_counted_at_a_time_lose_no_pixel(draw, num_classes):
    rng = np.random.default_rng(0)
    shape = (3, 601, 407)
    prediction, reference = draw(rng, num_classes, shape), draw(rng, num_classes, shape)
    reference[:, :30] = 65535
    prediction[:, 300:] = 1  # half flat, half not
    confusion = ConfusionMatrix(num_classes, 65535)
    confusion.update(prediction.astype(np.uint16), reference.astype(np.uint16))
    counted = reference != 65535
    expected = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(expected, (reference[counted], prediction[counted]), 1)
    assert np.array_equal(confusion.matrix, expected)


def test_an_accelerator_counts_like_the_processor():
    rng = np.random.default_rng(1)
    for num_classes in (1, 7, 300):
        prediction, reference = noise(rng, num_classes, (20, 30)), noise(rng, num_classes, (20, 30))
        prediction[0, :4] = [-1, -7, num_classes, 10**12]
        reference[1, :3] = [-100, num_classes, -100]
        pairs = _count_pairs_on_device(
            torch.from_numpy(prediction), torch.from_numpy(reference), num_classes, -100
        )
        good = (prediction >= 0) & (prediction < num_classes) & (reference >= 0) & (reference < num_classes)
        assert np.array_equal(pairs.table, slow_matrix(prediction[good], reference[good], num_classes, -100))
        assert pairs.num_wrong == 5  # four predictions, and one reference that is not ignored


@pytest.mark.parametrize("ignore_index", [-100, -1, 255, 10**6])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_any_ignore_index_may_stand_in_the_reference_and_anything_may_be_predicted_there(ignore_index, dtype):
    reference = np.array([[0, ignore_index, 1, ignore_index]], dtype=dtype)
    confusion = ConfusionMatrix(2, ignore_index)
    confusion.update(np.array([[0, -3, 0, 10**9]], dtype=dtype), reference)
    assert confusion.matrix.tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize("size", [4, 4000])
@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        (np.int64(70000), np.int64(0), "prediction holds label 70000"),
        (np.int64(-1), np.int64(0), "prediction holds label -1"),
        (np.int32(2**31 - 1), np.int32(1), "prediction holds label 2147483647"),
        (np.uint8(3), np.uint8(0), "prediction holds label 3"),
        (np.uint8(0), np.uint8(254), "reference holds label 254"),
        (np.uint16(0), np.uint16(65535), "reference holds label 65535"),
        (np.int16(0), np.int16(-255), "reference holds label -255"),
        (np.int64(0), np.int64(2**32), "reference holds label 4294967296"),
    ],
)
def test_one_wrong_label_among_good_ones_is_named_and_nothing_is_counted(
    size, prediction, reference, message
):
    good = np.random.default_rng(0).integers(0, 3, (2, size))  # flat or not makes no difference
    predicted, referred = good.astype(prediction.dtype), good.astype(reference.dtype)
    predicted[1, -1], referred[1, -1] = prediction, reference
    confusion = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=message):
        confusion.update(predicted, referred)
    assert confusion.matrix.sum() == 0


def detectron2_scores(matrix: np.ndarray, classes_in_mean: str) -> dict[str, float]:
    """The evaluator's definition; its mean is over classes in either map (v0.6) or with ground truth (since 2022)."""
    hit = np.array([float(matrix[c, c]) for c in range(len(matrix))])
    truth = np.array([float(matrix[c].sum()) for c in range(len(matrix))])
    found = np.array([float(matrix[:, c].sum()) for c in range(len(matrix))])
    there = np.flatnonzero(truth)
    iou = hit[there] / (truth[there] + found[there] - hit[there])
    number = np.sum((truth + found) > 0) if classes_in_mean == "either" else len(there)
    return {
        "miou": np.sum(iou) / number,
        "fwiou": np.sum(iou * (truth / np.sum(truth))[there]),
        "macc": np.sum(hit[there] / truth[there]) / len(there),
        "pacc": np.sum(hit) / np.sum(truth),
    }


def test_scores_are_detectron2s_to_the_last_bit():
    rng = np.random.default_rng(2)
    for _ in range(300):
        num_classes = int(rng.integers(1, 200))
        confusion = ConfusionMatrix(num_classes)
        matrix = rng.integers(0, 10 ** rng.integers(1, 9), (num_classes, num_classes))
        matrix[rng.random(num_classes) < 0.3] = 0
        matrix[:, rng.random(num_classes) < 0.3] = 0
        matrix[0, 0] = 5
        confusion.load_state_dict({"matrix": matrix})
        scores = confusion.compute()
        assert {name: scores[name] for name in ("miou", "fwiou", "macc", "pacc")} == detectron2_scores(
            matrix, "either"
        )
        assert scores["miou_present"] == detectron2_scores(matrix, "truth")["miou"]
        assert scores["num_classes_present"] == (matrix.sum(axis=1) > 0).sum()


def test_a_class_that_is_only_predicted_lowers_miou_and_not_miou_present():
    confusion = ConfusionMatrix(3)
    confusion.update(np.array([[0, 0, 2]]), np.array([[0, 0, 0]]))
    scores = confusion.compute()
    assert (scores["miou"], scores["miou_present"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert (scores["num_classes_counted"], scores["num_classes_present"]) == (2, 1)
    assert np.allclose(scores["per_class_acc"], [2 / 3, np.nan, np.nan], equal_nan=True)


def test_states_add_up_to_the_same_bits_in_any_order_and_go_on_after_loading():
    rng = np.random.default_rng(3)
    maps = [(noise(rng, 9, (8, 8)), flat(rng, 9, (8, 8))) for _ in range(6)]
    parts = [ConfusionMatrix(9) for _ in range(3)]
    whole = ConfusionMatrix(9)
    for index, pair in enumerate(maps):
        parts[index % 3].update(*pair)
        whole.update(*pair)
    resumed = ConfusionMatrix(9)
    resumed.load_state_dict(parts[2].state_dict())
    for total in (parts[0] + parts[1] + parts[2], resumed + (parts[1] + parts[0])):
        assert total.state_dict()["matrix"].tobytes() == whole.state_dict()["matrix"].tobytes()
    resumed.update(*maps[0])
    assert resumed.matrix.sum() == parts[2].matrix.sum() + 64


@pytest.mark.parametrize(
    ("state", "message"),
    [({"matrix": np.zeros((2, 2))}, "shape"), ({"counts": np.zeros((3, 3))}, "entries"), ({}, "entries")],
)
def test_a_state_of_something_else_is_refused(state, message):
    with pytest.raises(ValueError, match=message):
        ConfusionMatrix(3).load_state_dict(state)
