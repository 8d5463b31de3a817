"""Panoptic quality against its definition, segment by segment, and against cases worked out by hand."""

from fractions import Fraction

import numpy as np
import pytest

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
        referred.append(
            {"id": 2**24, "category_id": 1, "iscrowd": False}
        )  # without a pixel: a false negative
    return prediction, predicted, reference, [referred[i] for i in rng.permutation(len(referred))]


def counts_by_definition(prediction, predicted, reference, referred):
    """For each class the exact IoUs of the matches, and the numbers of false positives and negatives."""
    ious: list[list[Fraction]] = [[] for _ in range(NUM_CLASSES)]
    false_positives, false_negatives = [0] * NUM_CLASSES, [0] * NUM_CLASSES
    matched = set()
    for segment in referred:
        mask = reference == segment["id"]
        for other in predicted:
            found = (prediction == other["id"]) & (reference != 0)
            inside, either = int((mask & found).sum()), int((mask | found).sum())
            same_class = other["label_id"] == segment["category_id"]
            if same_class and not segment["iscrowd"] and 2 * inside > either:
                ious[segment["category_id"]].append(Fraction(inside, either))
                matched.add(other["id"])
                break
        else:
            false_negatives[segment["category_id"]] += not segment["iscrowd"]
    for other in predicted:
        mask = prediction == other["id"]
        ignored = reference == 0
        crowds = [s for s in referred if s["iscrowd"] and s["category_id"] == other["label_id"]]
        if crowds:
            ignored = ignored | (reference == crowds[-1]["id"])
        if other["id"] not in matched and 2 * (mask & ignored).sum() <= mask.sum():
            false_positives[other["label_id"]] += 1
    return ious, false_positives, false_negatives


def quality_by_definition(ious, false_positives, false_negatives) -> tuple[float, float, float]:
    segments = len(ious) + false_positives / 2 + false_negatives / 2
    if segments == 0:
        return (float("nan"),) * 3
    total = float(sum((Fraction(float(iou)) for iou in ious), Fraction(0)))  # of the rounded IoUs, exactly
    return total / segments, total / len(ious) if ious else 0.0, len(ious) / segments


def test_random_images_score_as_the_definition_says():
    rng = np.random.default_rng(0)
    for _ in range(150):
        is_thing, seen = rng.random((2, NUM_CLASSES)) < 0.5
        quality = PanopticQuality(NUM_CLASSES, is_thing.tolist())
        totals = [[] for _ in range(NUM_CLASSES)], [0] * NUM_CLASSES, [0] * NUM_CLASSES
        for _ in range(rng.integers(1, 6)):
            image = random_image(rng)
            quality.update(*image)
            for mine, more in zip(totals, counts_by_definition(*image), strict=True):
                for label in range(NUM_CLASSES):
                    mine[label] = mine[label] + more[label]
        scores = quality.compute(seen=seen.tolist())
        expected = np.array([quality_by_definition(*counts) for counts in zip(*totals, strict=True)])
        counted = ~np.isnan(expected[:, 0])
        groups = {"": counted, "_things": is_thing, "_stuff": ~is_thing, "_seen": seen, "_unseen": ~seen}
        for column, name in enumerate(("pq", "sq", "rq")):
            assert np.array_equal(scores[f"per_class_{name}"], expected[:, column], equal_nan=True)
            for suffix, group in groups.items():
                values = expected[group & counted, column].tolist()
                mean = sum(values) / len(values) if values else float("nan")
                assert scores[name + suffix] == pytest.approx(mean, abs=1e-15, nan_ok=True)
                assert scores[f"num{suffix or '_classes'}_counted"] == len(values)


def row(*ids: float) -> np.ndarray:
    return np.array([ids])


def test_a_prediction_shifted_by_one_pixel_scores_what_is_worked_out_by_hand():
    quality = PanopticQuality(2)
    # class 0 has 8 pixels, class 1 has 4; shifted right: 7 of 9 and 3 of 4 (its last pixel is lost) agree
    quality.update(
        row(0, *[7] * 8, *[2] * 3),
        [{"id": 2, "label_id": 1}, {"id": 7, "label_id": 0}],
        row(*[1] * 8, *[2] * 4),
        [{"id": 1, "category_id": 0}, {"id": 2, "category_id": 1}],
    )
    scores = quality.compute()
    assert scores["pq"] == pytest.approx((7 / 9 + 3 / 4) / 2)
    assert scores["rq"] == 1.0
    assert "pq_things" not in scores


def test_half_an_overlap_is_no_match_and_costs_a_false_negative_and_a_false_positive():
    quality = PanopticQuality(1)
    quality.update(row(1, 0), [{"id": 1, "label_id": 0}], row(1, 1), [{"id": 1, "category_id": 0}])
    assert (quality.false_positives.tolist(), quality.false_negatives.tolist()) == ([1], [1])
    assert quality.compute()["pq"] == 0.0


@pytest.mark.parametrize(
    ("reference", "crowd_class", "is_false_positive"),
    [
        (row(0, 0, 0, 5), 0, False),  # three of four pixels on void
        (row(0, 0, 5, 5), 0, True),  # half is not more than half
        (row(0, 6, 6, 5), 0, False),  # void and the crowd of its class together
        (row(0, 6, 6, 5), 1, True),  # the crowd is of another class
    ],
)
def test_a_segment_mostly_on_void_and_its_crowd_is_no_false_positive(
    reference, crowd_class, is_false_positive
):
    quality = PanopticQuality(2)
    segments = [{"id": 5, "category_id": 1, "iscrowd": False}]
    if 6 in reference:
        segments.append({"id": 6, "category_id": crowd_class, "iscrowd": True})
    quality.update(row(1, 1, 1, 1), [{"id": 1, "label_id": 0}], reference, segments)
    assert quality.false_positives.tolist() == [int(is_false_positive), 0]
    assert quality.false_negatives.tolist() == [0, 1]


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
        ({0: row(1, -1)}, "prediction has pixels of id -1"),
        ({2: row(3, 4)}, "reference has pixels of id 4"),
        ({0: row(1, 0)}, "prediction has no pixel of segment 2"),
        ({1: [{"id": 1, "label_id": 0}] * 2}, "several segments with id 1"),
        (
            {3: [{"id": 3, "category_id": 0}, {"id": 0, "category_id": 1}]},
            "reference has a segment with id 0",
        ),
        ({1: [{"id": 1, "label_id": 0}, {"id": 2, "label_id": 2}]}, "prediction segment 2 is of class 2"),
        ({3: [{"id": 3}]}, "reference segment 3 has no category_id"),
        ({1: [{"label_id": 1}]}, "without an id"),
    ],
)
def test_an_image_that_contradicts_itself_is_refused_and_nothing_is_counted(changes, message):
    quality = PanopticQuality(2)
    with pytest.raises(ValueError, match=message):
        quality.update(*(changes.get(position, part) for position, part in enumerate(GOOD)))
    assert not any(array.any() for array in quality.arrays().values())
    with pytest.raises(ValueError, match="2 entries for 3"):
        PanopticQuality(3, [True, False])
