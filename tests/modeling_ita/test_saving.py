"""Weights as the model starts with them, and saving and loading it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForSemanticSegmentation, AutoModelForUniversalSegmentation

from helpers.tiny_checkpoint import tiny_config
from helpers.tiny_model import CLASSES, assert_same, build, pixels, segment
from modeling_ita import ITAConfig, ITAForOpenVocabSegmentation


def clip_alone(model) -> ITAForOpenVocabSegmentation:
    state = {name: value for name, value in model.state_dict().items() if name.startswith("clip_backbone.")}
    return ITAForOpenVocabSegmentation.from_pretrained(None, config=model.config, state_dict=state)


@pytest.mark.parametrize("made_by", [lambda model: model, clip_alone], ids=["new", "clip alone"])
def test_weights_start_as_in_the_published_networks(made_by):
    model = made_by(build())
    attention = model.detail_enhancement.layers[0].attention
    assert (attention.sampling_offsets.weight == 0).all() and (attention.attention_weights.bias == 0).all()
    steps = attention.sampling_offsets.bias.detach().reshape(attention.heads, attention.levels, -1, 2)
    expected = torch.tensor([[[i + 1.0, 0.0] for i in range(attention.points)]] * attention.levels)
    torch.testing.assert_close(steps, torch.stack([expected, -expected]), atol=1e-6, rtol=0)
    q_proj = model.image_text_aggregation.layers[0].cross_attention.q_proj
    assert (q_proj.bias == 0).all() and q_proj.weight.abs().max() <= (6 / 64) ** 0.5
    assert q_proj.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.1)
    assert model.image_text_aggregation.logit_scale.item() == pytest.approx(2.6593, abs=1e-4)
    assert model.void_embedding.std().item() == pytest.approx(1, rel=0.4)


def test_a_model_built_without_memory_can_be_initialized():
    """As distributed training does: on the meta device, then memory, then weights."""
    with torch.device("meta"):
        model = ITAForOpenVocabSegmentation(tiny_config()).eval()
    model.to_empty(device="cpu")
    model.init_weights()
    assert all(value.isfinite().all() for value in model.state_dict().values())
    mask = model.clip_backbone.text_tower.attn_mask
    assert torch.equal(mask, torch.full_like(mask, float("-inf")).triu_(1))
    assert not any(parameter.requires_grad for parameter in model.clip_backbone.parameters())
    assert segment(model, pixels(1, 3, 64, 64)).class_queries_logits.isfinite().all()


def test_a_saved_model_computes_the_same_to_the_bit(tower_model, tmp_path):
    tower_model.save_pretrained(tmp_path)
    image = pixels(2, 3, 64, 96)
    expected = segment(tower_model, image, vocabulary=["lamp", ["road", "street"]])
    for auto in (AutoModel, AutoModelForUniversalSegmentation, AutoModelForSemanticSegmentation):
        loaded = auto.from_pretrained(tmp_path).eval()
        outputs = segment(loaded, image, vocabulary=["lamp", ["road", "street"]])
        assert torch.equal(outputs.class_queries_logits, expected.class_queries_logits)
        assert torch.equal(outputs.masks_queries_logits, expected.masks_queries_logits)
    buffers = dict(loaded.named_buffers())
    assert buffers.keys() == dict(tower_model.named_buffers()).keys()
    assert all(torch.equal(buffers[name], value) for name, value in tower_model.named_buffers())
    assert not any(parameter.requires_grad for parameter in loaded.clip_backbone.parameters())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_on_the_disk_are_brought_in_when_they_are_needed(tower_model, tmp_path):
    tower_model.save_pretrained(tmp_path / "model")
    device_map: dict = {name: "disk" for name, _ in tower_model.named_children()}
    device_map |= {"mask_classifier": "cpu", "void_embedding": "cpu"}
    model = ITAForOpenVocabSegmentation.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "disk"
    )
    for vocabulary in (["lamp", "road"], CLASSES):
        found, expected = (
            segment(one, pixels(1, 3, 64, 64), vocabulary=vocabulary) for one in (model, tower_model)
        )
        assert_same(found.class_queries_logits, expected.class_queries_logits)
        assert_same(found.masks_queries_logits, expected.masks_queries_logits)
    assert all(parameter.is_meta for parameter in model.clip_backbone.parameters())


def test_a_checkpoint_without_its_clip_is_refused(model, tmp_path):
    state = {name: value for name, value in model.state_dict().items() if "clip.visual" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="frozen CLIP"):
        ITAForOpenVocabSegmentation.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["void_embedding", "clip_backbone.clip.text.positional_embedding"])
def test_weights_that_are_nan_or_infinite_are_named(model, tmp_path, name, value):
    state = model.state_dict()
    state[name] = state[name].clone()
    state[name][0, -1] = value
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=f"NaN or infinite, such as {name}"):
        ITAForOpenVocabSegmentation.from_pretrained(tmp_path)


def test_weights_of_another_clip_are_refused(model):
    state = model.clip_backbone.clip.state_dict()
    state.pop(next(iter(state)))
    with pytest.raises(ValueError, match="do not fit"):
        ITAForOpenVocabSegmentation.from_clip(tiny_config(), state)


def test_classes_overridden_at_load_are_the_vocabulary(model, tmp_path):
    model.save_pretrained(tmp_path)
    other = AutoModel.from_pretrained(tmp_path, vocabulary=["lamp", ["road", "street"]])
    assert other.config.id2label == {0: "lamp", 1: "road"}
    labels = {0: "lamp", 1: "road"}
    other = AutoModel.from_pretrained(tmp_path, id2label=labels, label2id={"lamp": 0, "road": 1})
    assert other.default_vocabulary == [["lamp"], ["road"]]
    assert other.config.id2label == labels


def test_fields_that_go_together_are_overridden_at_once(tmp_path):
    ITAConfig(clip_model_name="RN50", dense_upsample=4).save_pretrained(tmp_path)
    config = ITAConfig.from_pretrained(tmp_path, mask_pooling="adapter", dense_upsample=1)
    assert (config.mask_pooling, config.dense_upsample) == ("adapter", 1)
    with pytest.raises(ValueError, match="dense_upsample"):
        ITAConfig.from_pretrained(tmp_path, mask_pooling="adapter")


def test_a_model_that_runs_from_its_checkpoints_code_can_be_saved_when_the_checkpoint_is_gone(
    model, tmp_path
):
    """In a process of its own, where this package cannot be imported."""
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    model.save_pretrained(first)
    program = f"""
import shutil, sys, torch
class Block:
    def find_spec(self, name, path=None, target=None):
        if path is None and name in {{"modeling_ita", "configuration_ita", "image_processing_ita", "pipeline_ita"}}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
from transformers import AutoModel
model = AutoModel.from_pretrained({str(first)!r}, trust_remote_code=True).eval()
shutil.rmtree({str(first)!r})
model.save_pretrained({str(second)!r})
again = AutoModel.from_pretrained({str(second)!r}, trust_remote_code=True).eval()
image = torch.ones(1, 3, 64, 64)
with torch.no_grad():
    results = [m(image, vocabulary=["cat", "sky"]).class_queries_logits for m in (model, again)]
assert torch.equal(*results)
torch.save(results[0], {str(third)!r})
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, env=environment, timeout=300)
    here = segment(model, torch.ones(1, 3, 64, 64), vocabulary=["cat", "sky"])
    assert torch.equal(torch.load(third), here.class_queries_logits)


def test_an_index_of_weights_may_not_name_files_outside_of_its_folder(tmp_path):
    build().save_pretrained(tmp_path / "inside")
    weights = tmp_path / "inside" / "model.safetensors"
    weights.rename(tmp_path / "outside.safetensors")
    names = dict.fromkeys(build().state_dict(), "../outside.safetensors")
    index = tmp_path / "inside" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(ValueError, match="outside of its folder"):
        AutoModel.from_pretrained(tmp_path / "inside")
