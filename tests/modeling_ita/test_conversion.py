"""Original checkpoints: what is read, what is refused, and how."""

import gzip
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel

from helpers.parity_checkpoint import FIXTURES, load_parity, original_tensors, untold_settings
from ita_segmentation.class_names import read_vocabulary
from ita_segmentation.cli.convert import main
from ita_segmentation.conversion import ConversionError, convert_checkpoint, load_original, system_name


@pytest.fixture(scope="module")
def original():
    description, _ = load_parity("ita_convnext_tiny")
    return description, original_tensors(description)


class Malice:
    def __init__(self, victim):
        self.victim = str(victim)

    def __reduce__(self):
        return os.mkdir, (self.victim,)


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, suffix):
    victim, path = tmp_path / "executed", tmp_path / f"evil{suffix}"
    if suffix == ".pth":
        torch.save({"model": Malice(victim)}, path)
    else:
        path.write_bytes(pickle.dumps({"model": Malice(victim)}))
    with pytest.raises(ConversionError, match="cannot be read safely") as refusal:
        load_original(path)
    assert not victim.exists()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
def test_every_format_gives_the_same_tensors(tmp_path, suffix):
    tensors = {"a.weight": torch.randn(3, 4), "b": torch.tensor(2.5)}
    path = tmp_path / f"model{suffix}"
    if suffix == ".pth":
        torch.save({"model": tensors, "iteration": 7}, path)
    elif suffix == ".pkl":
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        path.write_bytes(
            pickle.dumps({"model": arrays, "__author__": "somebody", "matching_heuristics": True})
        )
    else:
        save_file(tensors, path)
    loaded = load_original(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"PK\x03\x04 cut off"])
@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors", ".zip"])
def test_a_damaged_file_is_one_clear_line(tmp_path, content, suffix):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(ConversionError) as refusal:
        load_original(path)
    assert "broken" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_tensors_that_do_not_fit_are_listed(original):
    description, tensors = original
    changed = dict(tensors)
    changed["sem_seg_head.predictor.new_thing.weight"] = torch.zeros(2)
    del changed["sem_seg_head.predictor.decoder_norm.bias"]
    changed["void_embedding.weight"] = torch.zeros(1, 7)
    with pytest.raises(ConversionError) as refusal:
        convert_checkpoint(changed, description["clip_model_config"])
    for name in ("new_thing.weight", "image_text_aggregation.norm.bias", "void_embedding"):
        assert name in str(refusal.value)


def test_buffers_of_real_checkpoints_are_passed_over(original):
    description, tensors = original
    extra = {
        "criterion.empty_weight": torch.ones(134),
        "pixel_mean": torch.zeros(3, 1, 1),
        "pixel_std": torch.ones(3, 1, 1),
    }
    convert_checkpoint({**tensors, **extra}, description["clip_model_config"])


def test_something_else_is_neither_of_the_two():
    with pytest.raises(ConversionError, match="not a checkpoint of ITA, FC-CLIP"):
        convert_checkpoint({"layer.weight": torch.zeros(2)}, "RN50")


def test_the_command_converts_and_the_result_loads(original, tmp_path):
    description, tensors = original
    checkpoint, clip, vocabulary = (tmp_path / name for name in ("model.pth", "clip.json", "classes.txt"))
    torch.save({"model": tensors}, checkpoint)
    clip.write_text(json.dumps(description["clip_model_config"]))
    vocabulary.write_text("0:invalid_class_id\n1:cat,kitty\n2:dog\n")
    output = tmp_path / "converted"
    command = [
        "--checkpoint",
        checkpoint,
        "--clip_model",
        clip,
        "--vocabulary",
        vocabulary,
        "--output",
        output,
    ]
    assert main([str(argument) for argument in command]) == 0
    model = AutoModel.from_pretrained(output)
    assert model.config.id2label == {0: "cat", 1: "dog"}
    assert model.config.vocabulary == read_vocabulary(vocabulary) == [["cat", "kitty"], ["dog"]]
    assert AutoImageProcessor.from_pretrained(output) is not None
    assert main([str(argument) for argument in command]) == 1  # not over what is there


def test_the_command_answers_bad_input_in_one_line(tmp_path, capsys):
    good = tmp_path / "classes.txt"
    good.write_text("1:cat\n")
    arguments = [
        "--checkpoint",
        "missing.pth",
        "--clip_model",
        "RN50",
        "--vocabulary",
        str(good),
        "--output",
        "x",
    ]
    assert main(arguments) != 0
    error = capsys.readouterr().err
    assert "missing.pth" in error and error.count("\n") == 1


PUBLIC = json.loads(gzip.decompress((FIXTURES / "family_checkpoint_keys.json.gz").read_bytes()))
"""Names and shapes of all tensors of the public checkpoints of Mask-Adapter and MAFT+, and their settings."""


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_checkpoint_of_the_family_is_told_by_its_tensors(name):
    public = PUBLIC[name]
    tensors = {key: torch.empty(shape, device="meta") for key, shape in public["keys"].items()}
    config = convert_checkpoint(tensors, public["clip"], vocabulary=["cat", "dog"]).config
    forms = {None: None, False: "post_norm", True: "res_post_norm"}
    assert config.text_transfer == forms[public["residual_outside_norm"]]
    assert config.num_learned_queries == public["queries"]
    assert not config.mask_padding
    if public["mask_threshold"] is None:
        assert (config.mask_pooling, config.ensemble_alpha, config.ensemble_beta) == ("hard", 1, 1)
    else:
        assert config.mask_pooling == "adapter"
        assert config.adapter_mask_threshold == public["mask_threshold"]
        assert (config.ensemble_alpha, config.ensemble_beta) == (public["alpha"], public["beta"])
    assert system_name(tensors).startswith("MAFT+") == name.startswith("maftp")
    assert ("Mask-Adapter" in system_name(tensors)) == name.endswith("maskadapter")


def test_what_no_tensor_shows_is_asked_for():
    description, _ = load_parity("maskadapter_maftp_tiny")
    tensors = original_tensors(description)
    with pytest.raises(ConversionError) as refusal:
        convert_checkpoint(tensors, description["clip_model_config"], description["vocabulary"])
    for field in untold_settings(description):
        assert field in str(refusal.value)
    tensors["cdt.novelty"] = tensors.pop("cdt.cross_atten.norm.bias")
    with pytest.raises(ConversionError) as refusal:
        convert_checkpoint(
            tensors,
            description["clip_model_config"],
            description["vocabulary"],
            **untold_settings(description),
        )
    assert "unknown tensor cdt.novelty" in str(refusal.value)
    assert "no tensor for mask_classifier.text_transfer.norm.bias" in str(refusal.value)
