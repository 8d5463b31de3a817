"""Original checkpoints: what is read, what is refused, and how."""

import gzip
import json
import os
import pickle
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel

from helpers.parity_checkpoint import FIXTURES, load_parity, original_tensors, untold_settings
from ita_segmentation.class_names import read_vocabulary
from ita_segmentation.cli.convert import convert
from ita_segmentation.cli.main import run_by_name
from ita_segmentation.conversion import ConversionError, convert_checkpoint, load_original, system_name
from ita_segmentation.errors import ITAError


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
    changed |= {f"sem_seg_head.predictor.new_thing.{index}.weight": torch.zeros(2) for index in range(20)}
    del changed["sem_seg_head.predictor.decoder_norm.bias"]
    changed["void_embedding.weight"] = torch.zeros(1, 7)
    changed["sem_seg_head.predictor.decoder_norm.weight"] = torch.full((96,), torch.nan)
    with pytest.raises(ConversionError) as refusal:
        convert_checkpoint(changed, description["clip_model_config"])
    message = str(refusal.value)
    assert message.startswith("23 tensors do not fit")
    for part in (
        "new_thing.5.weight and 14 more",
        "missing: image_text_aggregation.norm.bias",
        "of another shape: void_embedding (1, 7), needed (1, 64)",
        "not finite: image_text_aggregation.norm.weight",
    ):
        assert part in message
    assert "new_thing.6.weight" not in message
    assert "unknown: sem_seg_head.predictor.new_thing.19.weight" in refusal.value.problems


def test_buffers_of_real_checkpoints_are_passed_over(original):
    description, tensors = original
    extra = {
        "criterion.empty_weight": torch.ones(134),
        "pixel_mean": torch.zeros(3, 1, 1),
        "pixel_std": torch.ones(3, 1, 1),
    }
    usual, model = (
        convert_checkpoint(given, description["clip_model_config"])
        for given in (tensors, {**tensors, **extra})
    )
    assert model.state_dict().keys() == usual.state_dict().keys()


def test_something_else_is_refused():
    clip = {"visual.a": torch.zeros(1), "transformer.a": torch.zeros(1)}
    with pytest.raises(ConversionError, match="not a checkpoint of ITA, FC-CLIP"):
        convert_checkpoint({"layer.weight": torch.zeros(2)}, "RN50", clip_weights=clip)


def test_a_checkpoint_without_its_clip_is_completed_from_the_clips_own_weights(original):
    description, tensors = original
    clip = {
        name.removeprefix("backbone.clip_model."): tensor
        for name, tensor in tensors.items()
        if name.startswith("backbone.clip_model.")
    }
    head = {name: tensor for name, tensor in tensors.items() if not name.startswith("backbone.clip_model.")}
    with pytest.raises(ConversionError, match=r"lacks the weights of its frozen CLIP: .*\(--clip\)"):
        convert_checkpoint(head, description["clip_model_config"])
    completed = convert_checkpoint(head, description["clip_model_config"], clip_weights=clip).state_dict()
    expected = convert_checkpoint(tensors, description["clip_model_config"]).state_dict()
    assert all(torch.equal(completed[name], tensor) for name, tensor in expected.items())


def test_a_resnet_whose_activation_is_not_known_is_refused():
    """OpenAI's ResNets have QuickGELU; a text tower with GELU in its place computes other embeddings, silently."""
    description, _ = load_parity("fcclip_resnet_tiny")
    tensors = original_tensors(description)
    with pytest.raises(ConversionError, match="RN50 was trained with.*--clip_model RN50-quickgelu"):
        convert_checkpoint(tensors, "RN50")
    with pytest.raises(
        ConversionError, match="do not fit this CLIP"
    ):  # the activation is settled, the size is not
        convert_checkpoint(tensors, "RN50-quickgelu")
    known = {**description["clip_model_config"], "quick_gelu": True}
    assert convert_checkpoint(tensors, known).config.clip_model_config["quick_gelu"] is True
    assert convert_checkpoint(tensors, description["clip_model_config"]) is not None


@pytest.fixture
def command(original, tmp_path):
    """Arguments that convert the checkpoint, and the folder that it becomes."""
    description, tensors = original
    checkpoint, clip, vocabulary = (tmp_path / name for name in ("model.pth", "clip.json", "classes.txt"))
    torch.save({"model": tensors}, checkpoint)
    clip.write_text(json.dumps(description["clip_model_config"]))
    vocabulary.write_text("0:invalid_class_id\n1:cat,kitty\n2:dog\n")
    paths = {
        "checkpoint": checkpoint,
        "clip_model": clip,
        "vocabulary": vocabulary,
        "output": tmp_path / "converted",
    }
    return {key: str(path) for key, path in paths.items()}


def test_a_checkpoint_with_a_mask_adapter_gets_the_size_that_such_checkpoints_are_tested_at(tmp_path):
    description, _ = load_parity("maskadapter_fcclip_tiny")
    for name, content in (
        ("clip.json", json.dumps(description["clip_model_config"])),
        ("names.txt", "1:cat"),
    ):
        (tmp_path / name).write_text(content)
    torch.save(original_tensors(description), tmp_path / "model.pth")
    paths = {"checkpoint": "model.pth", "clip_model": "clip.json", "vocabulary": "names.txt", "output": "out"}
    convert([part for key, name in paths.items() for part in (f"--{key}", str(tmp_path / name))])
    size = AutoImageProcessor.from_pretrained(tmp_path / "out").size
    assert (size["shortest_edge"], size["longest_edge"]) == (896, 896)


def test_the_command_converts_and_the_result_loads(command, tmp_path, capsys):
    (tmp_path / "convert.json").write_text(json.dumps(command))
    convert(["--config", str(tmp_path / "convert.json"), "--model_config", "{ensemble_alpha: 0.3}"])
    assert "converted: ITA, " in capsys.readouterr().out
    model = AutoModel.from_pretrained(command["output"])
    assert model.config.id2label == {0: "cat", 1: "dog"}
    assert model.config.ensemble_alpha == 0.3
    assert model.config.vocabulary == [["cat", "kitty"], ["dog"]]
    assert AutoImageProcessor.from_pretrained(command["output"]) is not None
    assert "# converted\n" in (tmp_path / "converted" / "README.md").read_text()
    with pytest.raises(ITAError, match="exists and is not empty"):
        convert(["--config", str(tmp_path / "convert.json")])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "classes.txt",
        "clip.json",
        "convert.json",
        "converted",
        "model.pth",
    ]


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"checkpoint": "missing.pth"}, 1, "no such checkpoint: missing.pth"),
        ({"clip_model": "missing.json"}, 1, "cannot read missing.json"),
        ({"clip_model": "no_such_clip"}, 1, "open_clip knows no CLIP named 'no_such_clip'"),
        ({"vocabulary": "missing.txt"}, 1, "cannot read missing.txt"),
        ({"vocabulary": None}, 2, "give the NAME of a published checkpoint, or --checkpoint"),
        ({"model_config": "{text_transfr: post_norm}"}, 1, "ITAConfig has no field text_transfr"),
        ({"model_config": "{ensemble_beta: 3}"}, 1, "ensemble_beta must be a number from 0 to 1"),
        ({"output": None}, 2, "--output"),
    ],
)
def test_the_command_answers_bad_input_in_one_line(
    command, tmp_path, monkeypatch, capsys, change, status, message
):
    arguments = [text for key, value in (command | change).items() if value for text in (f"--{key}", value)]
    monkeypatch.setattr(sys, "argv", ["ita convert", *arguments])
    with pytest.raises(SystemExit) as exit_:
        run_by_name("convert")
    assert exit_.value.code == status
    error = capsys.readouterr().err
    assert message in error and error.startswith("ita convert: error: ") and error.count("\n") == 1
    assert not (tmp_path / "converted").exists()


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
    assert "unknown: cdt.novelty" in str(refusal.value)
    assert "missing: mask_classifier.text_transfer.norm.bias" in str(refusal.value)


def test_a_published_maft_plus_takes_its_image_tower_from_its_own_file_only():
    description, _ = load_parity("maftp_panoptic_tiny")
    tensors, clip = original_tensors(description), "backbone.clip_model."
    weights = {name.removeprefix(clip): tensor for name, tensor in tensors.items() if name.startswith(clip)}
    for name in weights:
        if not name.startswith("visual."):
            del tensors[clip + name]
    model = convert_checkpoint(
        tensors,
        description["clip_model_config"],
        ["cat"],
        clip_weights=weights,
        text_transfer="res_post_norm",
    )
    assert model.config.text_transfer == "res_post_norm"
    without = {name: tensor for name, tensor in tensors.items() if not name.startswith(clip)}
    with pytest.raises(ConversionError, match="lacks MAFT.'s image tower"):
        convert_checkpoint(without, description["clip_model_config"], ["cat"], clip_weights=weights)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 200_000, "nested too deeply"),
        ("1:cat\n1:dog\n", "the id 1 twice"),
        ("cat\ndog\n", "neither JSON nor lines"),
    ],
)
def test_a_damaged_vocabulary_is_one_line(tmp_path, content, message):
    (tmp_path / "classes.txt").write_text(content)
    with pytest.raises(ITAError, match=message) as refusal:
        read_vocabulary(tmp_path / "classes.txt")
    assert "\n" not in str(refusal.value)
