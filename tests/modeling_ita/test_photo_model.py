"""The small model for photographs that ships: it loads, fits its size, and finds one clear object."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import pipeline

import modeling_ita  # noqa: F401  (registers the Auto classes)
from ita_segmentation.checkpoints import domain_notice, load_checkpoint
from ita_segmentation.prediction.segmenter import Segmenter

FOLDER = Path(__file__).parents[2] / "models" / "ita-photo"
EXAMPLES = FOLDER / "examples"


@pytest.fixture(scope="module")
def loaded():
    return load_checkpoint(FOLDER, "cpu")


def test_the_folder_is_small_and_its_card_begins_with_its_limits(loaded):
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 64 * 2**20
    assert domain_notice(loaded[0].config) is None
    title, first = (FOLDER / "README.md").read_text().split("\n# ")[1].split("\n\n")[:2]
    assert title.startswith("ITA photo") and "indoor scenes" in first


@pytest.mark.parametrize(
    ("name", "found", "box"),
    [
        ("cat", "cat", (60, 40, 300, 200)),
        ("coffee", "cup", (190, 40, 380, 200)),
        ("astronaut", "person", (150, 20, 400, 500)),
    ],
)
def test_one_clear_object_is_found_among_its_example_classes(loaded, name, found, box):
    classes = json.loads((EXAMPLES / "classes.json").read_text())[f"{name}.jpg"]
    vocabulary = [one.strip().split("|") for one in classes.split(",")]
    [result] = Segmenter(*loaded, vocabulary).segment_images([Image.open(EXAMPLES / f"{name}.jpg")])
    assert result.segments[0]["label"] == found
    left, top, right, bottom = box
    inside = (np.array(result.label_map) == result.segments[0]["label_id"])[top:bottom, left:right]
    assert inside.mean() > 0.7


def test_a_class_that_a_photograph_does_not_show_is_not_found(loaded):
    [result] = Segmenter(*loaded, [["zebra"], ["airplane"], ["pizza"]]).segment_images(
        [Image.open(EXAMPLES / "cat.jpg")]
    )
    assert not result.segments


def test_the_pipeline_segments_typed_words():
    segment = pipeline("image-segmentation", model=str(FOLDER))
    found = segment(str(EXAMPLES / "cat.jpg"), candidate_labels=["cat", "dog", "couch|sofa"], threshold=0.4)
    assert [one["label"] for one in found] == ["cat"]
