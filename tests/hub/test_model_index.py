"""Scores in a model card's front matter: how the Hub's own reader sees them, and what stays untouched."""

import math
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from ita_segmentation.errors import ITAError
from ita_segmentation.hub.model_index import update_model_card, write_model_index

CLASSES = [{"name": "wall", "iou": 0.5}]


def scored(miou: float, split: str = "validation", **scores) -> dict:
    return {"num_images": 3, "miou": miou, "classes": CLASSES, "settings": {"split": split}, **scores}


def values_of(text: str) -> dict:
    """(dataset, split, metric's name) -> value, by the Hub's reader of a card."""
    return {
        (result.dataset_type, result.dataset_split, result.metric_name): result.metric_value
        for result in ModelCard(text).data.get("eval_results")
    }


def index_of(path, results, model="runs/my-model"):
    write_model_index(path / "model_index.yaml", results, model)
    return yaml.safe_load((path / "model_index.yaml").read_text(encoding="utf-8"))


def test_the_index_holds_task_dataset_and_metrics_as_the_hub_defines_them(tmp_path):
    index = index_of(tmp_path, {"ade20k-150": scored(0.123456, pq=0.25, ap=0.5)})
    assert index == {
        "model-index": [
            {
                "name": "my-model",
                "results": [
                    {
                        "task": {"type": "image-segmentation", "name": "Image segmentation"},
                        "dataset": {
                            "name": "ADE20K, 150 classes",
                            "type": "ade20k-150",
                            "split": "validation",
                            "args": {"num_images": 3},
                        },
                        "metrics": [
                            {"type": "mean_iou", "value": 0.1235, "name": "mean IoU"},
                            {"type": "pq", "value": 0.25, "name": "panoptic quality"},
                            {"type": "ap", "value": 0.5, "name": "mask AP at IoU 0.50:0.95"},
                        ],
                    }
                ],
            }
        ]
    }
    name, results = model_index_to_eval_results(index["model-index"])
    assert name == "my-model"
    assert [result.metric_value for result in results] == [0.1235, 0.25, 0.5]


def test_a_score_that_was_not_measured_is_not_in_the_index(tmp_path):
    index = index_of(tmp_path, {"scenes": scored(0.5, miou_unseen=math.nan)})
    assert [metric["name"] for metric in index["model-index"][0]["results"][0]["metrics"]] == ["mean IoU"]
    assert index_of(tmp_path, {"scenes": scored(math.nan)})["model-index"][0]["results"] == []


def test_the_yaml_can_be_pasted_as_a_front_matter(tmp_path):
    index_of(tmp_path, {"scenes": scored(0.5), "näme: {x}": scored(0.25, "test")}, "a: b # c")
    card = f"---\n{(tmp_path / 'model_index.yaml').read_text(encoding='utf-8')}---\n# A model\n"
    assert ModelCard(card).data.model_name == "a: b # c"
    assert values_of(card) == {
        ("scenes", "validation", "mean IoU"): 0.5,
        ("näme: {x}", "test", "mean IoU"): 0.25,
    }


CARD = """---
license: apache-2.0   # of the weights
tags: [one,
       "two"]
model-index:
- name: known name
  results:
  - task: {type: image-segmentation}
    dataset: {type: scenes, name: Scenes, split: validation}
    metrics:
    - {type: mean_iou, value: 0.1, name: mean IoU}
    - {type: outdated, value: 0.1, name: outdated}
  - task: {type: image-segmentation}
    dataset: {type: scenes, name: Scenes, split: test}
    metrics:
    - {type: mean_iou, value: 0.2, name: mean IoU}

base_model: some/model
custom: {kept: [1, 2]}
---

# A model

---
Text with a rule, `code` and trailing space.\x20
"""


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_card_keeps_its_text_and_everything_but_the_scores_that_are_replaced(tmp_path, line_end):
    card = tmp_path / "README.md"
    card.write_bytes(CARD.replace("\n", line_end).encode())
    assert update_model_card(card, {"scenes": scored(0.5), "cityscapes": scored(0.75)}) == card
    text = card.read_bytes().decode()
    assert text.endswith(CARD[CARD.index("\n# A model") :].replace("\n", line_end))
    assert "\n" not in text.replace("\r\n", "") if line_end == "\r\n" else "\r" not in text
    data = ModelCard(text).data
    assert (data.model_name, data.license, data.tags) == ("known name", "apache-2.0", ["one", "two"])
    assert (data.base_model, data.get("custom")) == ("some/model", {"kept": [1, 2]})
    assert values_of(text) == {
        ("scenes", "test", "mean IoU"): 0.2,
        ("scenes", "validation", "mean IoU"): 0.5,
        ("cityscapes", "validation", "mean IoU"): 0.75,
    }


def test_the_same_scores_twice_change_nothing(tmp_path):
    card = tmp_path / "README.md"
    card.write_text(CARD)
    once = update_model_card(card, {"scenes": scored(0.5)}).read_bytes()
    assert update_model_card(card, {"scenes": scored(0.5)}).read_bytes() == once


def test_a_card_without_an_index_gets_one_at_the_end_of_its_front_matter(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# Model\n")
    text = update_model_card(tmp_path, {"scenes": scored(0.5)}).read_text()
    assert text.startswith("---\nlicense: mit\nmodel-index:\n")
    assert text.endswith("\n---\n\n# Model\n")
    assert ModelCard(text).data.model_name == tmp_path.name
    assert values_of(text) == {("scenes", "validation", "mean IoU"): 0.5}


@pytest.mark.parametrize("body", ["", "# Model\n\nText.\n---\nmore\n"])
def test_a_card_without_a_front_matter_gets_one(tmp_path, body):
    card = tmp_path / "model" / "README.md"
    card.parent.mkdir()
    if body:
        card.write_text(body)
    text = update_model_card(card, {"scenes": scored(0.5)}).read_text()
    assert values_of(text) == {("scenes", "validation", "mean IoU"): 0.5}
    assert text.endswith(body)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("---\na: [1\n---\n", "front matter cannot be read"),
        ("---\n- a\n- b\n---\n", "front matter cannot be read"),
        ("---\nmodel-index:\n- name: x\n  results: 3\n---\n", "front matter cannot be read"),
        ("---\nmodel-index: {name: x}\n---\n", "front matter cannot be read"),
        ("---\nmodel-index: [{name: a, results: []}, {name: b, results: []}]\n---\n", "2 models"),
        (b"\xff\xfe\x00", "not a UTF-8"),
    ],
)
def test_a_card_that_cannot_be_read_is_named_and_left_alone(tmp_path, content, message):
    card = tmp_path / "README.md"
    content = content if isinstance(content, bytes) else content.encode()
    card.write_bytes(content)
    with pytest.raises(ITAError, match=message) as error:
        update_model_card(card, {"scenes": scored(0.5)})
    assert str(card) in str(error.value)
    assert card.read_bytes() == content


def test_the_text_of_the_shipped_card_stays_when_scores_are_added(tmp_path):
    shipped = (Path(__file__).parents[2] / "models" / "ita-tiny" / "README.md").read_text()
    (tmp_path / "README.md").write_text(shipped)
    text = update_model_card(tmp_path, {"scenes": scored(0.5)}).read_text()
    front, body = shipped.split("---\n", 2)[1:]
    assert text.endswith(body)
    new, old = yaml.safe_load(text.split("---\n", 2)[1]), yaml.safe_load(front)
    assert new.pop("model-index")[0]["results"][-1]["metrics"][0]["value"] == 0.5
    assert new == {key: value for key, value in old.items() if key != "model-index"}
