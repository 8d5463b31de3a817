"""The small model that ships: it loads, fits its size, knows synonyms, and segments what no mask taught it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, pipeline

import modeling_ita  # noqa: F401  (registers the Auto classes)
from ita_segmentation.data.scenes import scene, scenes_vocabulary
from ita_segmentation.data.scenes.dataset import SPLITS
from ita_segmentation.evaluation import ConfusionMatrix

FOLDER = Path(__file__).parents[2] / "models" / "ita-tiny"
SEED = SPLITS["validation"].seed
VOCABULARY = scenes_vocabulary()


@pytest.fixture(scope="module")
def model():
    return AutoModel.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoImageProcessor.from_pretrained(FOLDER)


@torch.no_grad()
def semantic_map(model, processor, image, vocabulary=None):
    outputs = model(**processor(images=image, return_tensors="pt"), vocabulary=vocabulary)
    return processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])[0].numpy()


@pytest.fixture(scope="module")
def car():
    """The validation scene among the first 400 with the most pixels of a car."""
    class_id = VOCABULARY.names.index("car")
    scenes = (scene(SEED, index, 96, classes="all") for index in range(400))
    areas = [int((drawn.semantic == class_id).sum()) for drawn in scenes]
    drawn = scene(SEED, int(np.argmax(areas)), 192, classes="all")
    return drawn.image, drawn.semantic == class_id


def test_the_folder_is_small_and_says_what_it_was_trained_on():
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    assert size <= 32 * 2**20
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["dtype"] == "float32"  # stored in half precision, computed in single
    assert config["domain"] == "synthetic images (Scenes)"
    assert (FOLDER / "README.md").read_text().startswith("---\n")


def test_it_computes_in_float32(model):
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_its_own_vocabulary_is_scenes_and_only_seen_classes_were_trained(model):
    assert model.default_vocabulary == VOCABULARY.classes
    trained = {tuple(names) for names in model.config.train_vocabulary}
    assert trained == {tuple(c) for c, seen in zip(VOCABULARY.classes, VOCABULARY.seen, strict=True) if seen}


def test_it_segments_seen_and_unseen_classes(model, processor):
    confusion = ConfusionMatrix(len(VOCABULARY.classes))
    for index in range(24):
        drawn = scene(SEED, index, 192, classes="all")
        confusion.update(semantic_map(model, processor, drawn.image), drawn.semantic)
    scores = confusion.compute(VOCABULARY.seen)
    assert scores["miou_seen_with_predicted"] == pytest.approx(0.691, abs=0.03)
    assert scores["miou_unseen_with_predicted"] == pytest.approx(0.552, abs=0.03)


def test_a_synonym_finds_what_the_name_finds(model, processor, car):
    image, truth = car
    others = [names[0] for names in VOCABULARY.classes if names[0] != "car"]
    found = {}
    for name in ("car", "automobile"):
        found[name] = semantic_map(model, processor, image, [name, *others]) == 0
        overlap = (found[name] & truth).sum() / (found[name] | truth).sum()
        assert overlap > 0.5, name
    assert (found["car"] == found["automobile"]).mean() > 0.98


def test_order_and_duplicates_do_not_change_what_is_found(model, processor):
    image = scene(SEED, 1, 192, classes="all").image
    usual = semantic_map(model, processor, image)
    order = np.random.default_rng(0).permutation(len(VOCABULARY.classes))
    shuffled = semantic_map(model, processor, image, [VOCABULARY.classes[i] for i in order])
    assert (order[shuffled] == usual).mean() > 0.99
    doubled = semantic_map(model, processor, image, [*VOCABULARY.classes, VOCABULARY.classes[0]])
    assert (doubled == usual).mean() > 0.999


def test_one_class_and_a_thousand_classes_work(model, processor):
    image = scene(SEED, 2, 192, classes="all").image
    assert (semantic_map(model, processor, image, ["grass"]) == 0).all()
    names = [*VOCABULARY.classes, *(f"word {index}" for index in range(1000 - len(VOCABULARY.classes)))]
    many = semantic_map(model, processor, image, names)
    assert (many == semantic_map(model, processor, image)).mean() == pytest.approx(0.991, abs=0.03)


def test_both_pipelines_load_the_folder_without_remote_code_and_segment_typed_classes(car):
    image, _ = car
    for task in ("image-segmentation", "zero-shot-image-segmentation"):
        segment = pipeline(task, model=str(FOLDER))
        found = segment(
            image, candidate_labels=["automobile|car", "grass"], subtask="semantic", distractors=False
        )
        assert {segment["label"] for segment in found} <= {"automobile", "grass"}
        assert found and all(segment["mask"].size == image.size for segment in found)


# --- none of the given classes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped(model, processor):
    return pipeline("image-segmentation", model=model, image_processor=processor)


def covered(segments):
    return float(np.mean([np.asarray(one["mask"]) > 0 for one in segments])) if segments else 0.0


def test_a_class_that_an_image_does_not_show_is_not_found(shipped):
    for index in range(4):
        drawn = scene(SEED, index, 192, classes="all")
        shown = {VOCABULARY.names[one["class_id"]] for one in drawn.segments}
        for label in ["dog", "grass", "unicorn"]:
            if label not in shown:
                assert covered(shipped(drawn.image, subtask="semantic", candidate_labels=[label])) < 0.01
                assert shipped(drawn.image, candidate_labels=[label], threshold=0.5) == []


def test_a_class_that_an_image_shows_is_found_alone_as_among_all_others(shipped):
    for index in range(4):
        drawn = scene(SEED, index, 192, classes="all")
        everything = {
            one["label"]: np.asarray(one["mask"]) > 0 for one in shipped(drawn.image, subtask="semantic")
        }
        for label, mask in everything.items():
            found = shipped(drawn.image, subtask="semantic", candidate_labels=[label])
            assert [one["label"] for one in found] == [label]
            assert (mask == (np.asarray(found[0]["mask"]) > 0)).mean() > 0.98


def test_without_distractors_and_threshold_every_pixel_has_a_class(shipped):
    image = scene(SEED, 0, 192, classes="all").image
    found = shipped(image, subtask="semantic", candidate_labels=["unicorn"], threshold=0.0, distractors=False)
    assert covered(found) == 1.0
