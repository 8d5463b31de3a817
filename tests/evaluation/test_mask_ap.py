"""Mask AP against pycocotools, float for float, on random data; packed masks; states and bad input."""

import contextlib
import io

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ita_segmentation.evaluation import MaskAveragePrecision
from ita_segmentation.evaluation.metrics.packed_masks import pack_masks

STATS = ["ap", "ap50", "ap75", "aps", "apm", "apl", "ar1", "ar10", "ar100", "ars", "arm", "arl"]


def encode(mask: np.ndarray) -> dict:
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def random_mask(rng: np.random.Generator, shape) -> np.ndarray:
    height, width = (rng.integers(1, side + 1) if rng.random() < 0.5 else side // 4 + 1 for side in shape)
    top, left = rng.integers(0, shape[0] - height + 1), rng.integers(0, shape[1] - width + 1)
    mask = np.zeros(shape, dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask if rng.random() < 0.7 else mask & (rng.random(shape) < 0.9)


def detect(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """The mask itself, moved, or with holes."""
    moved = np.roll(mask, tuple(rng.integers(-3, 4, 2)), (0, 1)) if rng.random() < 0.7 else mask
    return moved & (rng.random(mask.shape) < rng.choice([1.0, 1.0, 0.85, 0.6]))


def random_image(rng: np.random.Generator, image_id, num_classes: int, num_detections: int) -> tuple:
    """Arguments of `update`: images without references or detections, ties, crowds, areas of all ranges."""
    shape = tuple(rng.integers(20, 140, 2))
    references = [random_mask(rng, shape) for _ in range(rng.integers(0, 6))]
    reference_labels = rng.integers(0, num_classes, len(references))
    masks, labels = [], []
    for _ in range(num_detections):
        chosen = int(rng.integers(0, len(references))) if references and rng.random() < 0.8 else None
        masks.append(random_mask(rng, shape) if chosen is None else detect(rng, references[chosen]))
        right = chosen is not None and rng.random() < 0.9
        labels.append(int(reference_labels[chosen]) if right else int(rng.integers(num_classes)))
    scores = rng.integers(0, 5, num_detections) / 4 if rng.random() < 0.6 else rng.random(num_detections)
    crowd = rng.random(len(references)) < 0.25
    areas = None if rng.random() < 0.7 else [mask.sum() * rng.choice([0.5, 1.0, 2.0]) for mask in references]
    return image_id, scores, labels, masks, reference_labels, references, crowd, areas


def coco_evaluation(images: list[tuple], classes) -> COCOeval:
    """pycocotools' own evaluation of arguments of `update`, over some classes."""
    truth: list[dict] = []
    found: list[dict] = []
    for image_id, scores, labels, masks, reference_labels, references, crowd, areas in images:
        for index, mask in enumerate(references):
            area = float(mask.sum()) if areas is None else float(areas[index])
            known = {"image_id": image_id, "category_id": int(reference_labels[index]), "bbox": [0, 0, 1, 1]}
            known |= {"id": len(truth) + 1, "iscrowd": int(crowd[index]), "area": area}
            truth.append(known | {"segmentation": encode(mask)})
        for score, label, mask in zip(scores, labels, masks, strict=True):
            one = {"image_id": image_id, "category_id": int(label), "score": float(score)}
            found.append(one | {"segmentation": encode(mask)})
    sizes = [np.shape((*image[3], *image[5], np.zeros((1, 1)))[0]) for image in images]
    listed = [
        {"id": image[0], "height": height, "width": width}
        for image, (height, width) in zip(images, sizes, strict=True)
    ]
    info = {"images": listed, "categories": [{"id": c} for c in classes]}
    with contextlib.redirect_stdout(io.StringIO()):
        reference, detections = COCO(), COCO()
        reference.dataset = info | {"annotations": truth, "info": {}}
        reference.createIndex()
        if found:
            detections = reference.loadRes(found)
        else:
            detections.dataset = info | {"annotations": []}
            detections.createIndex()
        evaluation = COCOeval(reference, detections, "segm")
        evaluation.params.catIds = list(classes)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def same(mine: float, theirs: float) -> bool:
    """The same float; what pycocotools calls -1 is nan here."""
    return np.isnan(mine) if theirs == -1 else mine == theirs


def check_against_coco(rng: np.random.Generator, num_classes: int, images: list[tuple]) -> None:
    average = MaskAveragePrecision(num_classes)
    for image in images:
        average.update(*image)
    seen = rng.random(num_classes) < 0.5
    scores = average.compute(seen=seen.tolist())
    theirs = coco_evaluation(images, range(num_classes))
    for name, expected in zip(STATS, theirs.stats, strict=True):
        assert same(scores[name], expected), name
    for label in range(num_classes):
        precision = theirs.eval["precision"][:, :, label, 0, -1]
        expected = precision[precision > -1].mean() if (precision > -1).any() else -1
        assert same(scores["per_class_ap"][label], expected)
    for name, group in (("ap_seen", seen), ("ap_unseen", ~seen)):
        if group.any():
            subset = coco_evaluation(images, np.flatnonzero(group).tolist())
            assert same(scores[name], subset.stats[0]), name


def test_all_numbers_are_pycocotools_own_on_random_images_with_crowds_ties_and_empty_ones():
    rng = np.random.default_rng(0)
    for _ in range(60):
        num_classes = int(rng.integers(1, 5))
        ids = rng.permutation(1000)[: rng.integers(1, 7)].tolist()  # counted out of order
        images = [random_image(rng, image_id, num_classes, int(rng.integers(0, 15))) for image_id in ids]
        check_against_coco(rng, num_classes, images)


def test_more_than_a_hundred_detections_of_a_class_are_cut_as_pycocotools_cuts_them():
    rng = np.random.default_rng(1)
    for _ in range(3):
        check_against_coco(rng, 1, [random_image(rng, image_id, 1, 130) for image_id in (2, 1)])
    average = MaskAveragePrecision(1)
    average.update(*random_image(rng, 0, 1, 130))
    assert len(average.detections[0]) == 100


def test_a_perfect_detector_scores_one_and_a_shifted_one_what_is_worked_out_by_hand():
    reference = np.zeros((1, 10, 20), dtype=bool)
    reference[0, :, :10] = True
    perfect, shifted = MaskAveragePrecision(1), MaskAveragePrecision(1)
    perfect.update(0, [0.5], [0], reference, [0], reference)
    shifted.update(0, [0.5], [0], np.roll(reference, 2, axis=2), [0], reference)
    assert perfect.compute()["ap"] == pytest.approx(1.0, abs=1e-15)
    assert perfect.compute()["ar1"] == 1.0
    # 8 of 12 columns agree: IoU 0.667 passes 0.50, 0.55, 0.60 and 0.65 of the ten thresholds
    assert shifted.compute()["ap"] == pytest.approx(0.4, abs=1e-15)
    assert (shifted.compute()["ap50"], shifted.compute()["ap75"]) == (pytest.approx(1.0), 0.0)
    assert np.isnan(shifted.compute()["apl"])


def columns(*ranges: tuple[int, int], height: int = 10, width: int = 30) -> np.ndarray:
    """Masks that each fill some neighbouring columns of an image."""
    masks = np.zeros((len(ranges), height, width), dtype=bool)
    for mask, (first, end) in zip(masks, ranges, strict=True):
        mask[:, first:end] = True
    return masks


def test_of_references_that_overlap_alike_the_last_one_is_taken():
    rng = np.random.default_rng(6)
    detections = columns((5, 15), (8, 18))
    # The first overlaps both references by 7/13, the second is one of them. At 0.50 the first takes the last one
    # listed; if that is the second's, one of the two is left without. Above, only the second finds its own.
    for order, average_recall in (([0, 1], 0.5), ([1, 0], (1 + 9 * 0.5) / 10)):
        references = columns((2, 12), (8, 18))[order]
        image = (1, [0.9, 0.8], [0, 0], detections, [0, 0], references, np.zeros(2, bool), None)
        check_against_coco(rng, 1, [image])
        average = MaskAveragePrecision(1)
        average.update(*image)
        assert average.compute()["ar100"] == pytest.approx(average_recall)


def test_an_area_on_the_border_of_two_ranges_is_in_both():
    average = MaskAveragePrecision(1)
    square = np.ones((1, 32, 32), dtype=bool)
    image = (1, [0.9], [0], square, [0], square, np.zeros(1, bool), None)
    average.update(*image)
    scores = average.compute()
    assert scores["ars"] == scores["arm"] == 1.0
    assert np.isnan(scores["arl"])
    check_against_coco(np.random.default_rng(7), 1, [image])


def test_states_of_several_processes_are_one_whatever_order_they_are_added_in():
    rng = np.random.default_rng(2)
    images = [random_image(rng, f"image {index}", 3, 9) for index in range(8)]
    whole, parts = MaskAveragePrecision(3), [MaskAveragePrecision(3) for _ in range(3)]
    for index in rng.permutation(len(images)):
        whole.update(*images[index])
        parts[index % 3].update(*images[index])
    resumed = MaskAveragePrecision(3)
    resumed.load_state_dict(parts[0].state_dict())
    for total in (parts[0] + parts[1] + parts[2], parts[2] + (parts[1] + resumed)):
        assert {name: array.tobytes() for name, array in total.state_dict().items()} == {
            name: array.tobytes() for name, array in whole.state_dict().items()
        }
        assert repr(total.compute()) == repr(whole.compute())


def test_a_state_is_small_and_keeps_no_mask():
    rng = np.random.default_rng(3)
    average = MaskAveragePrecision(5)
    for image_id in range(4):
        masks = rng.random((50, 60, 70)) < 0.5
        average.update(image_id, rng.random(50), rng.integers(0, 5, 50), masks, [1], masks[:1])
    rows = sum(row.nbytes for row in average.detections.values())
    assert rows == 200 * 29
    saved = sum(array.nbytes for array in average.state_dict().values())
    assert (
        saved == rows + 4 * (8 + 8) + 5 * 4 * 8
    )  # ids and numbers of the images, and the references' counts


def test_bits_count_what_booleans_count():
    rng = np.random.default_rng(4)
    for shape in [(1, 1), (3, 5), (8, 8), (13, 17), (64, 3)]:
        first, second = rng.random((4, *shape)) < 0.4, rng.random((3, *shape)) < 0.4
        second[0] = False
        packed = pack_masks(first, "prediction"), pack_masks(second, "reference")
        assert packed[0].areas().tolist() == first.sum(axis=(1, 2)).tolist()
        expected = (first[:, None] & second).sum(axis=(2, 3))
        assert np.array_equal(packed[0].intersections(packed[1]), expected)


def test_masks_may_be_arrays_tensors_lists_integers_and_run_lengths():
    rng = np.random.default_rng(5)
    masks = rng.random((3, 9, 11)) < 0.5
    words = pack_masks(masks, "prediction").words
    runs = [encode(mask) for mask in masks]
    as_text = [run | {"counts": run["counts"].decode()} for run in runs]
    lengths = {"size": [2, 3], "counts": [1, 2, 3]}  # column by column: 0 1 | 1 0 | 0 0
    for same_masks in (
        torch.from_numpy(masks),
        list(masks),
        [torch.from_numpy(mask) for mask in masks],
        masks.astype(np.uint8) * 255,
        np.asfortranarray(masks),
        runs,
        as_text,
    ):
        assert np.array_equal(pack_masks(same_masks, "prediction").words, words)
    expected = np.array([[[0, 1, 0], [1, 0, 0]]], dtype=bool)
    assert np.array_equal(pack_masks([lengths], "prediction").words, pack_masks(expected, "prediction").words)


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
        ({"scores": [float("inf")]}, "score inf"),
        ({"scores": [0.5, 0.6]}, "prediction has 1 masks and scores of shape"),
        ({"labels": [2]}, "prediction holds label 2"),
        ({"labels": [0.5]}, "integer"),
        ({"reference_labels": [-1]}, "reference holds label -1"),
        ({"reference_labels": []}, "reference has 1 masks and labels"),
        ({"reference_crowd": [False, True]}, "reference_crowd has shape"),
        ({"masks": np.ones((1, 4, 5), bool)}, "prediction masks have size"),
        ({"masks": [np.ones((4, 4), bool), np.ones((4, 5), bool)]}, "different sizes"),
        ({"masks": np.ones((1, 4, 4))}, "bool or integer"),
        ({"masks": np.ones((4, 4), bool)}, "must be .height, width."),
        ({"image_id": 7}, "image 7 was counted before"),
        ({"image_id": "1"}, "all be integers or all strings"),
    ],
)
def test_detections_that_cannot_be_counted_are_refused_and_nothing_is_counted(changes, message):
    average = MaskAveragePrecision(2)
    average.update(7, [], [], [], [], [])
    with pytest.raises(ValueError, match=message):
        average.update(**(GOOD | changes))
    assert list(average.detections) == [7]
    assert not average.num_references.any()


def test_states_that_share_an_image_or_are_of_other_classes_are_refused():
    one, other = MaskAveragePrecision(2), MaskAveragePrecision(2)
    one.update(**GOOD)
    other.update(**GOOD)
    with pytest.raises(ValueError, match="image 1 was counted before"):
        one + other
    with pytest.raises(ValueError, match="do not add up"):
        one + MaskAveragePrecision(3)
    with pytest.raises(ValueError, match="shape"):
        MaskAveragePrecision(3).load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match="do not fit"):
        MaskAveragePrecision(2).load_state_dict(one.state_dict() | {"num_detections": np.array([5])})
    with pytest.raises(ValueError, match="seen has 3 entries"):
        one.compute(seen=[True, False, True])
    with pytest.raises(ValueError, match="at least 1"):
        MaskAveragePrecision(0)


def test_without_references_nothing_is_scored():
    average = MaskAveragePrecision(2)
    average.update(1, [0.5], [0], ONES, [], [])
    scores = average.compute()
    assert np.isnan([scores[name] for name in STATS]).all()
    assert scores["num_classes_counted"] == 0
