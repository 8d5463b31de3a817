"""Confusion matrix scores against a slow count, reports."""

import json
import math

import numpy as np
import pytest
import torch

from ita_segmentation.evaluation import (
    ConfusionMatrix,
    markdown_table,
    write_results,
)

IGNORE = 255


def random_maps(seed: int, num_classes: int, shape: tuple[int, int] = (13, 17)):
    rng = np.random.default_rng(seed)
    prediction = rng.integers(0, num_classes, shape)
    reference = rng.integers(0, num_classes, shape)
    reference[rng.random(shape) < 0.2] = IGNORE
    return prediction, reference


def slow_scores(pairs, num_classes: int) -> dict:
    """The definitions, class by class and pixel by pixel."""
    pixels = [
        (int(r), int(p))
        for prediction, reference in pairs
        for p, r in zip(prediction.ravel(), reference.ravel(), strict=True)
        if r != IGNORE
    ]
    iou, accuracy, share = {}, {}, {}
    for c in range(num_classes):
        hit = sum(r == c and p == c for r, p in pixels)
        either = sum(r == c or p == c for r, p in pixels)
        truth = sum(r == c for r, _ in pixels)
        if either:
            iou[c], share[c] = hit / either, truth / len(pixels)
        if truth:
            accuracy[c] = hit / truth
    return {
        "iou": iou,
        "miou": np.mean(list(iou.values())),
        "fwiou": sum(share[c] * iou[c] for c in iou),
        "macc": np.mean(list(accuracy.values())),
        "pacc": np.mean([r == p for r, p in pixels]),
    }


@pytest.mark.parametrize("num_classes", [1, 2, 7])
def test_scores_equal_the_definitions_counted_pixel_by_pixel(num_classes):
    pairs = [random_maps(seed, num_classes) for seed in range(3)]
    confusion = ConfusionMatrix(num_classes)
    for prediction, reference in pairs:
        confusion.update(prediction, reference)
    scores, expected = confusion.compute(), slow_scores(pairs, num_classes)
    for name in ("miou", "fwiou", "macc", "pacc"):
        assert scores[name] == pytest.approx(expected[name], abs=1e-12), name
    assert scores["num_classes_counted"] == len(expected["iou"])
    for index, value in expected["iou"].items():
        assert scores["per_class_iou"][index] == pytest.approx(value, abs=1e-12)


def test_rows_are_reference_and_columns_prediction():
    confusion = ConfusionMatrix(3)
    confusion.update(np.array([[2, 2, 1]]), np.array([[0, 0, 1]]))
    assert confusion.matrix.tolist() == [[0, 0, 2], [0, 1, 0], [0, 0, 0]]
    assert confusion.matrix.dtype == np.int64


def test_classes_in_neither_map_are_left_out_of_the_mean_and_predicted_ones_are_not():
    confusion = ConfusionMatrix(5)
    confusion.update(np.array([[0, 0, 3]]), np.array([[0, 0, 0]]))
    scores = confusion.compute()
    assert scores["num_classes_counted"] == 2
    assert scores["miou"] == pytest.approx((2 / 3 + 0) / 2)
    assert scores["macc"] == pytest.approx(2 / 3)
    assert np.isnan(scores["per_class_iou"][[1, 2, 4]]).all()


def test_seen_and_unseen_means_split_the_counted_classes():
    confusion = ConfusionMatrix(4)
    confusion.update(np.array([[0, 1, 1, 2]]), np.array([[0, 1, 2, 2]]))
    scores = confusion.compute(seen=[True, True, False, False])
    assert scores["miou_seen"] == pytest.approx((1 + 1 / 2) / 2)
    assert scores["miou_unseen"] == pytest.approx(1 / 2)
    assert (scores["num_seen_counted"], scores["num_unseen_counted"]) == (2, 1)
    assert scores["miou"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)


def test_a_group_without_a_counted_class_has_no_score():
    confusion = ConfusionMatrix(2)
    assert math.isnan(confusion.compute()["miou"])
    confusion.update(np.zeros((1, 1), int), np.zeros((1, 1), int))
    assert math.isnan(confusion.compute(seen=[True, False])["miou_unseen"])


def test_one_matrix_over_all_images_is_the_sum_of_the_parts():
    whole, parts = ConfusionMatrix(6), [ConfusionMatrix(6), ConfusionMatrix(6)]
    for seed in range(4):
        maps = random_maps(seed, 6)
        whole.update(*maps)
        parts[seed % 2].update(*maps)
    assert np.array_equal((parts[0] + parts[1]).matrix, whole.matrix)
    with pytest.raises(ValueError, match="do not add up"):
        whole + ConfusionMatrix(5)


def test_what_is_predicted_on_ignored_pixels_does_not_matter():
    confusion = ConfusionMatrix(2)
    confusion.update(np.array([[0, 99, -7]]), np.array([[0, IGNORE, IGNORE]]))
    assert confusion.matrix.sum() == 1


def test_tensors_and_small_dtypes_count_like_arrays():
    prediction, reference = random_maps(0, 200, (40, 40))
    by_array, by_tensor, by_bytes = (ConfusionMatrix(200) for _ in range(3))
    by_array.update(prediction, reference)
    by_tensor.update(torch.from_numpy(prediction).int(), torch.from_numpy(reference))
    by_bytes.update(prediction.astype(np.uint8), reference.astype(np.uint8))
    assert np.array_equal(by_array.matrix, by_tensor.matrix)
    assert np.array_equal(by_array.matrix, by_bytes.matrix)


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        ([[3]], [[0]], "prediction holds label 3"),
        ([[-1]], [[0]], "prediction holds label -1"),
        ([[0]], [[3]], "reference holds label 3"),
        ([[0, 0]], [[0]], "shape"),
        ([[0.0]], [[0]], "integer"),
    ],
)
def test_labels_that_are_no_classes_are_refused_and_nothing_is_counted(prediction, reference, message):
    confusion = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=message):
        confusion.update(np.array(prediction), np.array(reference))
    assert confusion.matrix.sum() == 0


def test_an_ignore_index_among_the_classes_and_a_wrong_seen_list_are_refused():
    with pytest.raises(ValueError, match="index of a class"):
        ConfusionMatrix(256)
    assert ConfusionMatrix(847, ignore_index=65535).num_classes == 847
    with pytest.raises(ValueError, match="at least 1"):
        ConfusionMatrix(0)
    with pytest.raises(ValueError, match="3 entries for 2"):
        ConfusionMatrix(2).compute(seen=[True, True, False])


def test_reports_show_per_cent_and_never_a_score_that_was_not_measured(tmp_path):
    confusion = ConfusionMatrix(2)
    confusion.update(np.array([[0, 0]]), np.array([[0, 0]]))
    scores = confusion.compute(seen=[True, False]) | {"num_images": 1}
    scores["classes"] = [
        {"name": name, "iou": float(iou), "seen": seen}
        for name, iou, seen in zip(["a|b", "c"], scores.pop("per_class_iou"), [True, False], strict=True)
    ]
    json_path, markdown_path = write_results(tmp_path / "new" / "folder", "some/model", {"scenes": scores})
    document = json.loads(json_path.read_text())
    assert document["benchmarks"]["scenes"]["miou_seen"] == 1.0
    assert document["benchmarks"]["scenes"]["miou_unseen"] is None
    text = markdown_path.read_text()
    assert "| scenes | 1 | 1 of 2 | 100.00 | 100.00 | 100.00 |" in text
    assert "mIoU unseen" not in text
    assert "| a\\|b | 100.00 | seen |" in text
    assert "| c |" not in text


def test_a_table_has_one_line_a_row():
    assert markdown_table(["a", "b"], [["x", 0.5]]) == "| a | b |\n| --- | --- |\n| x | 50.00 |\n"
