"""Panoptic quality against its definition, segment by segment, and against cases worked out by hand."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from ita_segmentation.evaluation import PanopticQuality

NUM_CLASSES = 4


def random_image(rng: np.random.Generator, size: int = 8):
    """A reference and a prediction that resembles it, with crowds, void, missing and wrong segments."""
    shape = rng.integers(1, size + 1, 2)

    def draw() -> np.ndarray:
        ids = rng.choice(2**24 - 1, rng.integers(0, 6), replace=False) + 1
        return np.append(ids, 0)[rng.integers(0, len(ids) + 1, shape)]

    reference, prediction = draw(), draw()
    if rng.random() < 0.8:
        prediction = np.where(rng.random(shape) < rng.choice([0.6, 0.8, 0.95]), reference, prediction)
    prediction = np.where(rng.random(shape) < 0.1, 0, prediction)
    class_of = {int(i): int(rng.integers(NUM_CLASSES)) for i in np.union1d(reference, prediction)}
    referred = [
        {"id": int(i), "category_id": class_of[i], "iscrowd": bool(rng.random() < 0.3)}
        for i in np.unique(reference[reference > 0])
    ]
    predicted = [
        {"id": int(i), "label_id": class_of[i] if rng.random() < 0.9 else int(rng.integers(NUM_CLASSES))}
        for i in np.unique(prediction[prediction > 0])
    ]
    if rng.random() < 0.1:
        referred.append({"id": 2**24, "category_id": 1, "iscrowd": False})  # no pixel has it: it is missed
    return prediction, predicted, reference, [referred[i] for i in rng.permutation(len(referred))]


def counts_by_definition(prediction, predicted, reference, referred):
    """For each class the exact IoUs of the matches, and how many segments are false or missed."""
    ious: list[list[Fraction]] = [[] for _ in range(NUM_CLASSES)]
    false, missed = [0] * NUM_CLASSES, [0] * NUM_CLASSES
    matched_predictions = set()
    for segment in referred:
        mask = reference == segment["id"]
        for other in predicted:
            found = (prediction == other["id"]) & (reference != 0)
            inside, either = int((mask & found).sum()), int((mask | found).sum())
            same_class = other["label_id"] == segment["category_id"]
            if same_class and not segment["iscrowd"] and 2 * inside > either:
                ious[segment["category_id"]].append(Fraction(inside, either))
                matched_predictions.add(other["id"])
                break
        else:
            missed[segment["category_id"]] += not segment["iscrowd"]
    for other in predicted:
        mask = prediction == other["id"]
        forgiven = reference == 0
        crowds = [s for s in referred if s["iscrowd"] and s["category_id"] == other["label_id"]]
        if crowds:
            forgiven = forgiven | (reference == crowds[-1]["id"])
        if other["id"] not in matched_predictions and 2 * (mask & forgiven).sum() <= mask.sum():
            false[other["label_id"]] += 1
    return ious, false, missed


def quality_by_definition(ious, false, missed) -> tuple[float, float, float]:
    """PQ, SQ and RQ of a class; nan if it has no segment."""
    segments = len(ious) + false / 2 + missed / 2
    if segments == 0:
        return (float("nan"),) * 3
    total = float(sum((Fraction(float(iou)) for iou in ious), Fraction(0)))  # of the rounded IoUs, exactly
    return total / segments, total / len(ious) if ious else 0.0, len(ious) / segments


def test_thousands_of_random_images_score_as_the_definition_says():
    rng = np.random.default_rng(0)
    for _ in range(800):
        is_thing, seen = rng.random((2, NUM_CLASSES)) < 0.5
        quality = PanopticQuality(NUM_CLASSES, is_thing.tolist())
        ious = [[] for _ in range(NUM_CLASSES)]
        false, missed = [0] * NUM_CLASSES, [0] * NUM_CLASSES
        for _ in range(rng.integers(1, 6)):
            image = random_image(rng)
            quality.update(*image)
            for mine, more in zip((ious, false, missed), counts_by_definition(*image), strict=True):
                for label in range(NUM_CLASSES):
                    mine[label] = mine[label] + more[label]
        scores = quality.compute(seen=seen.tolist())
        expected = np.array(
            [quality_by_definition(*counts) for counts in zip(ious, false, missed, strict=True)]
        )
        counted = ~np.isnan(expected[:, 0])
        for column, name in enumerate(("pq", "sq", "rq")):
            assert np.array_equal(scores[f"per_class_{name}"], expected[:, column], equal_nan=True)
            groups = {"": counted, "_things": is_thing, "_stuff": ~is_thing, "_seen": seen, "_unseen": ~seen}
            for suffix, group in groups.items():
                values = expected[group & counted, column].tolist()
                assert scores[name + suffix] == pytest.approx(
                    sum(values) / len(values) if values else float("nan"), abs=1e-15, nan_ok=True
                )
                assert scores[f"num{suffix or '_classes'}_counted"] == len(values)


def row(*ids: float) -> np.ndarray:
    return np.array([ids])


def test_a_perfect_prediction_scores_one_whatever_its_ids():
    quality = PanopticQuality(3, [True, True, False])
    reference = row(7, 7, 9, 9, 0, 4)
    quality.update(
        row(1, 1, 2, 2, 0, 3),
        [{"id": 3, "label_id": 2}, {"id": 1, "label_id": 0}, {"id": 2, "label_id": 0}],
        reference,
        [{"id": 4, "category_id": 2}, {"id": 7, "category_id": 0}, {"id": 9, "category_id": 0}],
    )
    scores = quality.compute()
    assert [scores[name] for name in ("pq", "sq", "rq", "pq_things", "pq_stuff")] == [1.0] * 5
    assert scores["num_classes_counted"] == 2
    assert np.isnan(scores["per_class_pq"][1])


def test_a_prediction_shifted_by_one_pixel_scores_what_is_worked_out_by_hand():
    quality = PanopticQuality(2)
    # class 0 has 8 pixels, class 1 has 4; shifted right: 7 of 9 and 3 of 4 (its last pixel fell off) agree
    reference = row(*[1] * 8, *[2] * 4)
    prediction = row(0, *[1] * 8, *[2] * 3)
    quality.update(
        prediction,
        [{"id": 1, "label_id": 0}, {"id": 2, "label_id": 1}],
        reference,
        [{"id": 1, "category_id": 0}, {"id": 2, "category_id": 1}],
    )
    scores = quality.compute()
    assert scores["pq"] == pytest.approx((7 / 9 + 3 / 4) / 2)
    assert scores["rq"] == 1.0


def test_half_an_overlap_is_no_match_and_costs_a_miss_and_a_false_alarm():
    quality = PanopticQuality(1)
    quality.update(row(1, 0), [{"id": 1, "label_id": 0}], row(1, 1), [{"id": 1, "category_id": 0}])
    assert quality.sums[:3, 0].tolist() == [0, 1, 1]
    assert quality.compute()["pq"] == 0.0


@pytest.mark.parametrize(
    ("reference", "category", "is_false_alarm"),
    [
        (row(0, 0, 0, 5), 0, False),  # three of four pixels on void
        (row(0, 0, 5, 5), 0, True),  # half is not more than half
        (row(0, 6, 6, 5), 0, False),  # void and the crowd of its class together
        (row(0, 6, 6, 5), 1, True),  # the crowd is of another class
    ],
)
def test_a_segment_mostly_on_void_and_its_crowd_is_no_false_alarm(reference, category, is_false_alarm):
    quality = PanopticQuality(2)
    segments = [{"id": i, "category_id": category, "iscrowd": i == 6} for i in (5, 6) if i in reference]
    segments = [s | {"category_id": 1} if s["id"] == 5 else s for s in segments]
    quality.update(row(1, 1, 1, 1), [{"id": 1, "label_id": 0}], reference, segments)
    assert quality.sums[1].tolist() == [int(is_false_alarm), 0]
    assert quality.sums[2].tolist() == [0, 1]


def test_void_pixels_are_in_no_union():
    quality = PanopticQuality(1)
    quality.update(row(1, 1, 1), [{"id": 1, "label_id": 0}], row(0, 5, 5), [{"id": 5, "category_id": 0}])
    assert quality.compute()["sq"] == 1.0


def test_of_several_crowds_of_a_class_the_last_one_listed_counts():
    crowds = [{"id": i, "category_id": 0, "iscrowd": True} for i in (5, 6)]
    false_alarms = []
    for listed in (crowds, crowds[::-1]):
        quality = PanopticQuality(1)
        quality.update(row(1, 1, 1), [{"id": 1, "label_id": 0}], row(6, 6, 5), listed)
        false_alarms.append(int(quality.sums[1, 0]))
    assert false_alarms == [0, 1]


def test_sums_of_iou_are_exact_and_the_same_in_any_order_where_floats_are_not():
    rng = np.random.default_rng(5)
    images = []
    for _ in range(60):
        width = int(rng.integers(100, 1000))
        cut = int(rng.integers(width // 2 + 1, width))
        prediction = np.where(np.arange(width) < cut, 1, 0)[None]
        images.append(
            (prediction, [{"id": 1, "label_id": 0}], np.ones((1, width), int), [{"id": 1, "category_id": 0}])
        )
    parts = [PanopticQuality(1) for _ in range(3)]
    for index, image in enumerate(images):
        parts[index % 3].update(*image)
    states = set()
    for order in itertools.permutations(parts):
        total = order[0] + (order[1] + order[2])
        states.add(b"".join(array.tobytes() for array in total.state_dict().values()))
    assert len(states) == 1
    ious = [float((p == 1).mean()) for p, *_ in images]
    exact = sum(map(Fraction, ious))
    assert total.compute()["pq"] == float(exact) / 60
    assert len({sum_of_floats(order) for order in (ious, ious[::-1], sorted(ious))}) > 1  # so it matters


def sum_of_floats(values) -> float:
    total = 0.0
    for value in values:
        total = total + value
    return total


def test_tensors_and_states_that_were_saved_go_on_counting():
    rng = np.random.default_rng(6)
    images = [random_image(rng) for _ in range(20)]
    whole, first, second = (PanopticQuality(NUM_CLASSES) for _ in range(3))
    for image in images:
        whole.update(*image)
    for prediction, predicted, reference, referred in images[:10]:
        first.update(torch.from_numpy(prediction), predicted, reference.astype(np.int32), referred)
    second.load_state_dict(first.state_dict())
    for image in images[10:]:
        second.update(*image)
    assert np.array_equal(second.sums, whole.sums)
    assert whole.sums[:3].sum() > 30


GOOD = (
    row(1, 2),
    [{"id": 1, "label_id": 0}, {"id": 2, "label_id": 1}],
    row(3, 0),
    [{"id": 3, "category_id": 0}],
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: row(1, 2, 2)}, "shape"),
        ({0: row(1.0, 2.0)}, "integer"),
        ({0: row(1, 9)}, "prediction has pixels of id 9"),
        ({0: row(1, -1)}, "prediction has pixels of id -1"),
        ({2: row(3, 4)}, "reference has pixels of id 4"),
        ({0: row(1, 0)}, "prediction has no pixel of segment 2"),
        ({1: [{"id": 1, "label_id": 0}] * 2}, "several segments with id 1"),
        (
            {3: [{"id": 3, "category_id": 0}, {"id": 0, "category_id": 1}]},
            "reference has a segment with id 0",
        ),
        ({1: [{"id": 1, "label_id": 0}, {"id": 2, "label_id": 2}]}, "prediction segment 2 is of class 2"),
        ({3: [{"id": 3, "category_id": -1}]}, "reference segment 3 is of class -1"),
        ({3: [{"id": 3}]}, "reference segment 3 has no category_id"),
        ({1: [{"label_id": 1}]}, "without an id"),
    ],
)
def test_an_image_that_contradicts_itself_is_refused_and_nothing_is_counted(changes, message):
    quality = PanopticQuality(2)
    with pytest.raises(ValueError, match=message):
        quality.update(*(changes.get(position, part) for position, part in enumerate(GOOD)))
    assert not quality.sums.any()
    quality.update(*GOOD)
    assert quality.sums[:3].tolist() == [[1, 0], [0, 0], [0, 0]]


def test_flags_states_and_sums_of_other_classes_are_refused():
    with pytest.raises(ValueError, match="2 entries for 3"):
        PanopticQuality(3, [True, False])
    with pytest.raises(ValueError, match="at least 1"):
        PanopticQuality(0)
    with pytest.raises(ValueError, match="do not add up"):
        PanopticQuality(2, [True, False]) + PanopticQuality(2, [True, True])
    with pytest.raises(ValueError, match="shape"):
        PanopticQuality(2).load_state_dict(PanopticQuality(3).state_dict())
    with pytest.raises(ValueError, match="seen has 1 entries"):
        PanopticQuality(2).compute(seen=[True])


def test_without_thing_flags_there_are_no_means_over_things():
    scores = PanopticQuality(2).compute()
    assert "pq_things" not in scores
    assert np.isnan(scores["pq"])
