"""Every recipe is one that `ita train` takes, and every configuration of accelerate one that accelerate takes."""

from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from open_clip.model import CustomTextCLIP

from helpers.tiny_checkpoint import tiny_config
from ita_segmentation.cli.train import parse_arguments
from ita_segmentation.data.training import ShortestEdgeCrop, build_augmentation
from ita_segmentation.errors import UsageError
from ita_segmentation.training import read_clip
from modeling_ita.clip_backbone import resolve_clip_config

RECIPES = Path(__file__).parents[2] / "recipes"
TRAINING = sorted(path.name for path in RECIPES.glob("*.yaml") if path.name != "scenes_clip.yaml")
COCO = [name for name in TRAINING if name.startswith("coco_panoptic_ita")]
LAUNCHES = sorted(path.name for path in (RECIPES / "accelerate").glob("*.yaml"))


def read(name: str, folder: Path):
    words = ["--config", str(RECIPES / name), "--output_dir", str(folder), "--use_cpu", "true"]
    return parse_arguments(words)


@pytest.mark.parametrize("name", TRAINING)
def test_a_recipe_holds_nothing_but_arguments_of_ita_train(name, tmp_path):
    model, data, _ = read(name, tmp_path)
    assert (model.clip is None) or (model.model is None)
    assert build_augmentation(data).size == data.image_size
    given = yaml.safe_load((RECIPES / name).read_text())
    assert data.image_size == given["image_size"] and set(model.config_changes) == set(
        given.get("model_config", {})
    )


def test_the_recipes_of_the_paper_are_there():
    towers = ["convnext_base", "convnext_large", "convnext_xxlarge", "rn50"]
    assert [f"coco_panoptic_ita_{tower}.yaml" for tower in towers] == COCO


@pytest.mark.parametrize("name", COCO)
def test_a_coco_recipe_names_a_clip_that_open_clip_has_and_the_network_takes(name, tmp_path):
    model, tag = read(name, tmp_path)[0].clip.split(":")
    assert tag in open_clip.list_pretrained_tags_by_model(model)
    assert resolve_clip_config(model, None)["embed_dim"] > 0


def test_fine_tuning_starts_from_the_model_that_ships(tmp_path):
    model, data, _ = read("finetune_folder.yaml", tmp_path)
    assert (RECIPES.parent / model.model / "config.json").is_file()
    assert isinstance(build_augmentation(data), ShortestEdgeCrop)


# ------------------------------------------------------------------------------------------------------------
# accelerate


@pytest.mark.parametrize("name", LAUNCHES)
def test_accelerate_reads_its_configurations(name):
    config = load_config_from_file(str(RECIPES / "accelerate" / name))
    processes = {"ddp_2cpu.yaml": 2, "multi_node_64gpu.yaml": 64}.get(name, 8)
    assert config.num_processes == processes and not config.use_cpu
    assert str(config.distributed_type.value) == ("FSDP" if name.startswith("fsdp2") else "MULTI_GPU")


@pytest.mark.parametrize("name", LAUNCHES)
def test_accelerate_would_launch_with_them(name):
    path = str(RECIPES / "accelerate" / name)
    words = ["--config_file", path, "run_train.py"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert arguments.num_processes == defaults.num_processes > 1
    assert arguments.use_fsdp == name.startswith("fsdp2")
    if arguments.use_fsdp:
        assert arguments.fsdp_version == 2 and arguments.fsdp_state_dict_type == "FULL_STATE_DICT"


# ------------------------------------------------------------------------------------------------------------
# What `clip:` may name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nowhere", "there is no folder nowhere"),
        ("convnext_enormous:laion", "knows no CLIP named 'convnext_enormous'"),
        ("RN50:laion", "openai, yfcc15m, cc12m, not 'laion'"),
        ("RN50:openai", "cannot be downloaded"),
        ("hf-hub:nobody/nothing", "hf-hub:nobody/nothing cannot be downloaded"),
    ],
)
def test_a_clip_that_cannot_be_had_is_named_in_one_line(text, said, monkeypatch):
    def offline(*_, **__):
        raise FileNotFoundError("no\nnetwork")

    monkeypatch.setattr("open_clip.pretrained.hf_hub_download", offline)
    monkeypatch.setattr("open_clip.factory.download_pretrained", offline)
    with pytest.raises(UsageError, match=r"^--clip: ") as caught:
        read_clip(text)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_clip_of_open_clip_s_list_comes_with_its_name_normalization_and_activation(monkeypatch):
    config = dict(tiny_config().clip_model_config)
    config.pop("custom_text")
    clip = CustomTextCLIP(**config)
    asked = {}

    def create_model(name, **options):
        asked.update(options, name=name)
        return clip

    monkeypatch.setattr(open_clip, "create_model", create_model)
    config, weights = read_clip("RN50:openai")
    assert asked["pretrained"] == "openai" and asked["require_pretrained"] and asked["force_quick_gelu"]
    assert config["name"] == "RN50" and config["model_cfg"]["quick_gelu"] is True
    assert config["preprocess_cfg"]["mean"] == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)
    assert all(torch.equal(weights[key], value) for key, value in clip.state_dict().items())
