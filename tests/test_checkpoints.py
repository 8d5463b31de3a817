"""Checkpoints as the commands find and load them: folders and Hub ids, and one line for what is wrong with one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

from helpers.tiny_checkpoint import save_tiny_checkpoint
from ita_segmentation.checkpoints import (
    checkpoint_digest,
    choose_dtype,
    domain_notice,
    load_checkpoint,
    resolve_checkpoint,
)
from ita_segmentation.cli.export import build_parser as export_parser
from ita_segmentation.cli.predict import predict
from ita_segmentation.errors import ITAError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def checkpoint(saved, tmp_path) -> Path:
    """A copy to damage, without code, which the commands never need."""
    return Path(shutil.copytree(saved, tmp_path / "tiny", ignore=shutil.ignore_patterns("*.py")))


@pytest.fixture
def hub_cache(checkpoint, tmp_path, monkeypatch) -> Path:
    """The Hub's cache with the repository someone/tiny: revisions main and v2."""
    repository = tmp_path / "cache" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    for revision, commit in (("main", "1" * 40), ("v2", "2" * 40)):
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(checkpoint, repository / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository


def refusal(model) -> str:
    with pytest.raises(ITAError) as error:
        load_checkpoint(model, "cpu")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_loads_in_eval_mode(checkpoint):
    model, processor = load_checkpoint(checkpoint, "cpu")
    assert not model.training and processor.size.shortest_edge == 64


@pytest.mark.parametrize(
    ("bf16", "tiles", "dtype"),
    [(False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16)],
)
def test_auto_is_bfloat16_where_the_cpu_computes_in_it(bf16, tiles, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles, raising=False)
    assert choose_dtype("auto", torch.device("cpu")) == dtype
    assert choose_dtype("float32", torch.device("cpu")) == torch.float32


def test_auto_is_float32_on_a_gpu_that_only_emulates_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert choose_dtype("auto", torch.device("cuda")) == torch.float32


def test_a_hub_id_loads_from_the_cache_in_offline_mode_at_the_revision_asked_for(hub_cache):
    assert resolve_checkpoint("someone/tiny") == hub_cache / "snapshots" / ("1" * 40)
    assert resolve_checkpoint(Path("someone/tiny@v2")) == hub_cache / "snapshots" / ("2" * 40)
    model, _ = load_checkpoint("someone/tiny", "cpu")
    assert model.default_vocabulary is not None


def test_a_command_takes_a_hub_id(hub_cache, tmp_path):
    image = ROOT / "examples" / "scene_1.png"
    predict(["--model", "someone/tiny", "--images", str(image), "--output", str(tmp_path / "out")])
    assert (tmp_path / "out").is_dir() and any((tmp_path / "out").iterdir())
    assert "OWNER/NAME" in export_parser().format_help()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("missing", "no such checkpoint folder: missing"),
        ("/no/such/folder", "no such checkpoint folder: /no/such/folder"),
        (
            "runs/best",
            "no such checkpoint folder: runs/best; nor is it in the Hub's cache, and offline mode is on",
        ),
        ("someone/tiny@v3", "nor is it in the Hub's cache"),
        ("someone/../tiny", "no such checkpoint folder"),
    ],
)
def test_what_is_neither_a_folder_nor_in_the_cache_is_one_line(hub_cache, model, message):
    assert message in refusal(model)


def test_a_hub_that_cannot_be_reached_is_one_line(hub_cache, monkeypatch):
    from huggingface_hub import errors

    def unreachable(*arguments, **options):
        raise errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    assert "and the Hub cannot be reached" in refusal("someone/other")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "has no image processor"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "must hold a JSON object"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x00" * 100), "cannot be loaded"),
        (lambda folder: change(folder, model_type="detr"), "is not an ITA checkpoint.*'detr'"),
        (lambda folder: change(folder, hidden_dim="32"), "cannot be loaded: .*hidden_dim"),
        (lambda folder: change(folder, decoder_layers=10**9), "cannot be loaded: .*decoder_layers"),
        (lambda folder: change(folder, templates=[3]), "cannot be loaded: .*template"),
        (lambda folder: change(folder, hidden_dim=64), "cannot be loaded|lacks"),
    ],
)
def test_a_damaged_checkpoint_is_one_line(checkpoint, damage, message):
    damage(checkpoint)
    with pytest.raises(ITAError, match=message):
        load_checkpoint(checkpoint, "cpu")


def change(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("text_cfg", "layers", 10**9),
        ("text_cfg", "context_length", 10**9),
        ("text_cfg", "width", -16),
        ("vision_cfg", "image_size", 10**9),
        ("vision_cfg", "timm_model_name", "no_such_model"),
        (None, "text_cfg", 3),
        (None, "embed_dim", "wide"),
    ],
)
def test_a_damaged_configuration_of_the_clip_is_one_line(checkpoint, part, field, value):
    config = json.loads((checkpoint / "config.json").read_text())
    clip = config["clip_model_config"]
    (clip[part] if part else clip)[field] = value
    change(checkpoint, clip_model_config=clip)
    assert "cannot be loaded" in refusal(checkpoint)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(checkpoint, value):
    weights = load_file(checkpoint / "model.safetensors")
    weights["void_embedding"][0, 3] = value
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert "NaN or infinite, such as void_embedding" in refusal(checkpoint)


def test_missing_weights_are_named(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    del weights["void_embedding"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 of its weights, such as void_embedding" in refusal(checkpoint)


def write_index(checkpoint: Path, weight_map: dict) -> None:
    """An index of weights in the place of one file of them."""
    (checkpoint / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))


def test_weights_in_shards_load(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    name = "model-00001-of-00001.safetensors"
    save_file(weights, checkpoint / name, metadata={"format": "pt"})
    write_index(checkpoint, dict.fromkeys(weights, name))
    assert load_checkpoint(checkpoint, "cpu")[0] is not None


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"void_embedding": "../stolen.safetensors"}, "names a file outside of its folder"),
        ({"void_embedding": "/etc/stolen.safetensors"}, "names a file outside of its folder"),
        ({"void_embedding": "..\\stolen.safetensors"}, "names a file outside of its folder"),
        ({"void_embedding": "C:\\stolen.safetensors"}, "names a file outside of its folder"),
        ({"void_embedding": "model-00002.safetensors"}, "lacks the weights in model-00002.safetensors"),
        ({"void_embedding": 3}, "does not say which file"),
        ({}, "does not say which file"),
    ],
)
def test_an_index_of_weights_names_files_of_its_folder_that_are_there(checkpoint, weight_map, message):
    write_index(checkpoint, weight_map)
    assert message in refusal(checkpoint)


def test_a_checkpoint_that_knows_no_photographs_says_so():
    notice = domain_notice(PreTrainedConfig(domain="synthetic images (Scenes)"))
    assert notice is not None and notice.startswith(
        "this checkpoint was trained on synthetic images (Scenes): "
    )
    for domain in (None, "", "photographs (COCO)", 3):
        assert domain_notice(PreTrainedConfig(domain=domain)) is None
    assert domain_notice(PreTrainedConfig()) is None


def test_the_digest_of_a_checkpoint_sees_every_byte_of_a_long_configuration(tmp_path):
    digests = set()
    for alpha in (0.4, 0.5):
        classes = {"vocabulary": [f"class {index}" for index in range(100_000)], "ensemble_alpha": alpha}
        (tmp_path / "config.json").write_text(
            json.dumps(classes | {"train_vocabulary": classes["vocabulary"][:70_001]})
        )
        digests.add(checkpoint_digest(tmp_path))
    assert len(digests) == 2
