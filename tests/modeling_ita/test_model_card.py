"""Model cards: valid for the Hub, true to the checkpoint, and never in the way of what a person wrote."""

import json
import logging
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from PIL import Image
from transformers import AutoModel

from helpers.tiny_checkpoint import save_tiny_checkpoint, tiny_config
from ita_segmentation.hub.model_index import update_model_card
from modeling_ita.checkpoint_code import (
    CardError,
    is_generated,
    may_be_replaced,
    own_class_names,
    write_model_card,
)

CONFIG = tiny_config().to_dict()
PERSON = "---\nlicense: mit\ntags: [one, clip]\n---\n\n# My model\n\nMy text.  \n"


def scored(miou: float) -> dict:
    return {"num_images": 3, "miou": miou, "classes": [], "settings": {"split": "validation"}}


def written(folder: Path, **options) -> ModelCard:
    """The card, read by `huggingface_hub`, which checks it."""
    path = write_model_card(folder, CONFIG, **options)
    card = ModelCard.load(path)
    assert metadata_load(path) == card.data.to_dict()
    return card


def test_the_front_matter_is_what_the_hub_asks_for(tmp_path):
    data = written(tmp_path, name="someone/segmenter", metadata={"datasets": ["someone/images"]}).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-segmentation")
    assert (data.license, data.datasets) == ("apache-2.0", ["someone/images"])
    assert {"open-vocabulary-segmentation", "panoptic-segmentation", "clip", "custom_code"} <= set(data.tags)
    assert data.get("base_model") is None  # no published CLIP is called "tiny"
    (example,) = data.widget
    assert example["src"].startswith("http")
    assert example["parameters"] == {"candidate_labels": ["cat", "remote control", "sofa|couch"]}


def test_a_published_clip_is_the_base_model_and_the_domain_is_said(tmp_path):
    config = {**CONFIG, "clip_model_name": "convnext_large_d_320", "domain": "drawings of cats"}
    card = ModelCard.load(write_model_card(tmp_path, config))
    assert card.data.base_model == "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup"
    assert "Trained on drawings of cats." in card.text


def test_images_in_the_folder_are_the_widgets_examples(tmp_path):
    (tmp_path / "examples").mkdir()
    for name in ("b.jpg", "a.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "examples" / name)
    (tmp_path / "examples" / "notes.txt").write_text("no image")
    widget = written(tmp_path).data.widget
    assert [example["src"] for example in widget] == ["examples/a.png", "examples/b.jpg"]
    assert widget[0]["parameters"]["candidate_labels"] == ["sky", "dog", "grass", "car"]
    assert "&id001" not in (tmp_path / "README.md").read_text(encoding="utf-8")  # plain YAML, no anchors


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"vocabulary": ["sky", ["dog", "puppy"], "car, automobile"]}, ["sky", "dog", "car"]),
        ({"id2label": {"10": "c", "2": "b", "1": "a"}}, ["a", "b", "c"]),
        ({"id2label": {0: "LABEL_0", 1: "LABEL_1"}}, []),
        ({}, []),
    ],
)
def test_own_classes_by_their_first_names(config, names):
    assert own_class_names(config) == names


def test_training_is_read_from_the_files_in_the_folder(tmp_path):
    arguments = {"learning_rate": 0.0001, "max_steps": -1, "seed": 7, "output_dir": "/secret", "fp16": False}
    (tmp_path / "training_args.json").write_text(json.dumps(arguments))
    state = {"global_step": 120, "log_history": [{"loss": 9.0}, {"loss": 2.34567}, {"eval_miou": 0.5}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    text = written(tmp_path).text
    for row in ("learning rate | 0.0001", "seed | 7", "steps taken | 120", "last loss logged | 2.3457"):
        assert f"| {row} |" in text
    assert "secret" not in text and "steps at most" not in text and "float16" not in text
    (tmp_path / "trainer_state.json").write_text("{half")
    assert "last loss" not in written(tmp_path).text


def test_scores_of_an_evaluation_are_in_front_matter_and_table(tmp_path):
    written(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    update_model_card(tmp_path, {"scenes": scored(0.5)})
    again = written(tmp_path)  # saved once more, they stay
    assert is_generated(again.text)
    assert again.data.eval_results[0].metric_value == 0.5
    assert "| Scenes | validation | mean IoU | 50.00 % |" in again.text
    update_model_card(tmp_path, {"scenes": scored(0.25)})
    text = (tmp_path / "README.md").read_text()
    assert "25.00 %" in text and "50.00 %" not in text


def test_scores_do_not_move_to_another_folder_but_license_and_datasets_do(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
    written(old, metadata={"license": "mit", "datasets": ["a/b"]})
    update_model_card(old, {"scenes": scored(0.5)})
    data = written(new, source=old).data
    assert (data.license, data.datasets, data.get("eval_results")) == ("mit", ["a/b"], None)


def test_a_card_that_nobody_changed_is_written_anew(tmp_path):
    write_model_card(tmp_path, CONFIG)
    write_model_card(tmp_path, {**CONFIG, "vocabulary": ["lake", "boat"]})
    text = (tmp_path / "README.md").read_text()
    assert "classes: lake, boat." in text and "puppy" not in text
    write_model_card(tmp_path, {**CONFIG, "vocabulary": ["lake", "boat"]})
    assert (tmp_path / "README.md").read_text() == text


def test_front_matter_that_was_changed_in_a_generated_card_stays(tmp_path):
    path = write_model_card(tmp_path, CONFIG)
    path.write_text(path.read_text().replace("license: apache-2.0", "license: mit\nlanguage: en"))
    data = written(tmp_path).data
    assert (data.license, data.language) == ("mit", "en")


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_persons_text_stays_to_the_byte_and_only_missing_keys_are_added(tmp_path, line_end):
    path = tmp_path / "README.md"
    path.write_bytes(PERSON.replace("\n", line_end).encode())
    data = written(tmp_path).data
    assert path.read_bytes().decode().endswith(PERSON.split("---\n")[2].replace("\n", line_end))
    assert (data.license, data.library_name) == ("mit", "transformers")
    assert data.tags[:2] == ["one", "clip"] and "panoptic-segmentation" in data.tags
    once = path.read_bytes()
    write_model_card(tmp_path, CONFIG)
    assert path.read_bytes() == once


@pytest.mark.parametrize(
    "change", [lambda text: text.replace("classes", "Classes"), lambda text: text + "More.\n"]
)
def test_one_changed_word_makes_a_card_a_persons(tmp_path, change):
    path = write_model_card(tmp_path, CONFIG)
    changed = change(path.read_text())
    path.write_text(changed)
    write_model_card(tmp_path, {**CONFIG, "vocabulary": ["lake"]})
    assert path.read_text() == changed


def test_transformers_own_form_may_be_replaced_until_it_is_filled_in():
    form = ModelCard.from_template(
        ModelCardData(), model_description="This was automatically generated."
    ).text
    assert may_be_replaced(form)
    assert not may_be_replaced(form.replace("[More Information Needed]", "By me.", 1))
    assert not may_be_replaced(PERSON)


@pytest.mark.parametrize(
    "content", [b"---\nlicense: [mit\n---\nMine.\n", b"\xff\xfe\x00", b"---\n- a\n---\nMine.\n"]
)
def test_a_card_that_cannot_be_read_is_left_alone(tmp_path, content, caplog, monkeypatch):
    (tmp_path / "README.md").write_bytes(content)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    write_model_card(tmp_path, CONFIG)
    assert (tmp_path / "README.md").read_bytes() == content
    assert "README.md is left as it is" in caplog.text
    with pytest.raises(CardError, match=r"README\.md"):
        write_model_card(tmp_path, CONFIG, metadata={"license": "mit"})


def test_the_code_in_a_card_runs(tmp_path, monkeypatch):
    """In the folder that holds the checkpoint, as a person would copy it."""
    folder = save_tiny_checkpoint(tmp_path / "segmenter")
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 48), "green").save("image.jpg")
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2
    assert names["classes"].shape == (48, 64)
    assert isinstance(names["segments"], list)


def test_saving_a_model_keeps_a_persons_card_and_takes_its_metadata_from_the_caller(tmp_path):
    (tmp_path / "README.md").write_text(PERSON)
    save_tiny_checkpoint(tmp_path)
    AutoModel.from_pretrained(tmp_path).save_pretrained(tmp_path, card_metadata={"license": "cc0-1.0"})
    assert (tmp_path / "README.md").read_text().endswith("# My model\n\nMy text.  \n")
    assert ModelCard.load(tmp_path / "README.md").data.license == "cc0-1.0"
