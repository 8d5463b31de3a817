"""run_train: a tiny run on Scenes, resuming, frozen CLIP, budgets, data sets on disk, and bad input."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from open_clip.model import CustomTextCLIP
from PIL import Image
from safetensors.torch import load_file, save_file

from ita_segmentation.cli import train as run_train
from ita_segmentation.data.scenes.dataset import SPLITS, scenes_dataset
from ita_segmentation.data.training import (
    LargeScaleJitter,
    ScenesEvaluation,
    ScenesTraining,
    TrainingCollator,
    load_disk,
    scenes_classes,
)
from ita_segmentation.data.training.classes import class_names
from ita_segmentation.data.training.targets import IGNORE_INDEX, segment_targets, semantic_targets
from ita_segmentation.errors import ITAError
from ita_segmentation.training.history import read_history
from modeling_ita import ITAForOpenVocabSegmentation, ITAImageProcessor

LOSS_NAMES = [f"loss_{part}{suffix}" for suffix in ("", "_sum") for part in ("ce", "mask", "dice")]

CLIP_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {
        "timm_model_name": "resnet10t",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": 64,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}

RECIPE = """
dataset: scenes
image_size: 64
eval_images: 2
model_config:
  hidden_dim: 32
  mask_dim: 32
  num_attention_heads: 4
  num_learned_queries: 6
  num_dominant_categories: 4
  encoder_layers: 1
  encoder_ffn_dim: 32
  decoder_layers: 2
  decoder_ffn_dim: 32
  train_num_points: 64
  templates: ["a photo of a {}."]
max_steps: 3
per_device_train_batch_size: 2
learning_rate: 1e-3
max_grad_norm: 1.0
warmup_steps: 1
logging_steps: 1
save_steps: 2
eval_strategy: steps
eval_steps: 2
use_cpu: true
disable_tqdm: true
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds a tiny random CLIP in `clip` and a recipe in `recipe.yaml`."""
    folder = tmp_path_factory.mktemp("train")
    torch.manual_seed(0)
    clip = CustomTextCLIP(**CLIP_CONFIG)
    (folder / "clip").mkdir()
    (folder / "clip" / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": CLIP_CONFIG, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.2] * 3}})
    )
    save_file(
        {name: tensor.contiguous() for name, tensor in clip.state_dict().items()},
        folder / "clip" / "open_clip_model.safetensors",
    )
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def words(folder: Path, output: str, *more: str) -> list[str]:
    recipe, clip = str(folder / "recipe.yaml"), str(folder / "clip")
    return ["--config", recipe, "--clip", clip, "--output_dir", str(folder / output), *more]


@pytest.fixture(scope="module")
def finished(folder) -> Path:
    """The output folder of a run of three steps."""
    run_train.main(words(folder, "out"))
    return folder / "out"


def history(output: Path) -> list[dict]:
    return read_history(output)


def test_a_run_logs_every_part_of_the_loss_and_the_scores(finished):
    steps = [entry for entry in history(finished) if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3]
    for entry in steps:
        assert all(entry[name] > 0 for name in LOSS_NAMES)
        assert entry["loss"] == pytest.approx(sum(entry[name] for name in LOSS_NAMES[3:]), rel=1e-4)
    scored = [entry for entry in history(finished) if "eval_miou" in entry]
    assert scored[0]["step"] == 2 and scored[-1]["step"] == 3
    assert {"eval_miou_seen", "eval_miou_unseen", "eval_pacc"} <= set(scored[0])


def test_a_run_leaves_a_checkpoint_that_knows_its_vocabulary(finished):
    model = ITAForOpenVocabSegmentation.from_pretrained(finished).eval()
    processor = ITAImageProcessor.from_pretrained(finished)
    assert list(processor.image_mean) == [0.5] * 3
    classes = scenes_classes()
    assert len(model.config.id2label) == len(classes.classes)
    assert len(model.config.train_vocabulary) == sum(classes.seen) < len(classes.classes)
    image = Image.fromarray(np.zeros((40, 70, 3), np.uint8))
    with torch.no_grad():
        outputs = model(**processor(images=image, return_tensors="pt"))
    assert processor.post_process_semantic_segmentation(outputs, target_sizes=[(40, 70)])[0].shape == (40, 70)


def test_clip_stays_as_it_was_and_the_rest_learns(folder, finished):
    trained = load_file(finished / "model.safetensors")
    for name, tensor in load_file(folder / "clip" / "open_clip_model.safetensors").items():
        assert torch.equal(trained[f"clip_backbone.clip.{name}"], tensor), name
    first = ITAForOpenVocabSegmentation.from_pretrained(finished / "checkpoint-2").state_dict()
    changed = {name for name in trained if not torch.equal(trained[name], first[name])}
    assert changed and not any(name.startswith("clip_backbone.") for name in changed)


def test_the_optimizer_holds_trainable_parameters_only_and_spares_norms_and_embeddings(folder):
    trainer, _ = run_train.build_trainer(run_train.parse_arguments(words(folder, "unused")))
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert decayed | spared == trainable and not any("clip_backbone" in name for name in trainable)
    assert {"void_embedding", "image_text_aggregation.learned_queries"} <= spared
    assert any("norm" in name for name in spared) and not any("norm" in name for name in decayed)
    trainer.model.train()
    assert not any(module.training for module in trainer.model.clip_backbone.modules())


def test_resuming_goes_on_at_the_step_and_ends_where_the_whole_run_ended(folder, finished):
    last = str(finished / "checkpoint-2")
    run_train.main(words(folder, "resumed", "--resume_from_checkpoint", last))
    entries = [entry for entry in history(folder / "resumed") if "loss" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    whole = [entry for entry in history(finished) if "loss" in entry]
    assert entries[-1]["learning_rate"] == pytest.approx(whole[-1]["learning_rate"])
    assert entries[-1]["loss"] == pytest.approx(whole[-1]["loss"], rel=1e-4)


def test_resuming_a_finished_run_writes_the_same_model_again(folder, finished):
    base = shutil.copytree(finished, folder / "base")
    (base / "examples").mkdir()
    Image.new("RGB", (8, 8)).save(base / "examples" / "one.png")
    arguments = ["--config", str(folder / "recipe.yaml"), "--model", str(base), "--max_steps", "1"]
    arguments += ["--eval_strategy", "no", "--output_dir", str(folder / "again")]
    run_train.main(arguments)
    weights = load_file(folder / "again" / "model.safetensors")
    (folder / "again" / "model.safetensors").unlink()
    run_train.main([*arguments, "--resume_from_checkpoint"])
    written = load_file(folder / "again" / "model.safetensors")
    assert all(torch.equal(tensor, written[name]) for name, tensor in weights.items())
    assert (folder / "again" / "examples" / "one.png").is_file()


def test_the_word_last_names_the_latest_checkpoint(folder, finished):
    arguments = run_train.parse_arguments(words(folder, "out", "--resume_from_checkpoint"))
    assert run_train.checkpoint_to_resume(arguments[2]) == str(finished / "checkpoint-3")


def test_a_checkpoint_can_be_fine_tuned(folder, finished):
    arguments = run_train.parse_arguments(
        [
            "--config",
            str(folder / "recipe.yaml"),
            "--model",
            str(finished),
            "--output_dir",
            str(folder / "fine"),
        ]
        + ["--model_config.train_num_points", "32"]
    )
    trainer, _ = run_train.build_trainer(arguments)
    assert trainer.model.config.train_num_points == 32 and trainer.model.criterion.num_points == 32
    weights = load_file(finished / "model.safetensors")
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_the_command_line_goes_before_the_file(folder):
    model, data, training = run_train.parse_arguments(
        words(
            folder,
            "x",
            "--max_steps=7",
            "--image_size",
            "96",
            "--model_config.decoder_self_attention",
            "true",
        )
    )
    assert (training.max_steps, data.image_size, training.learning_rate) == (7, 96, 1e-3)
    assert model.config_changes["decoder_self_attention"] is True and model.config_changes["hidden_dim"] == 32


# ------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--clip", "nowhere"], "there is no folder nowhere"),
        (["--no_such_option", "1"], "--no_such_option"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--max_steps", "-1"], "give max_steps or max_minutes"),
        (["--model_config.hiden_dim", "64"], "hiden_dim"),
        (["--model_config.hidden_dim", "33"], "hidden_dim"),
        (["--dataset", "nowhere"], "nowhere"),
        (["--model", "nowhere"], "one of --clip CLIP"),
        (["--resume_from_checkpoint", "nowhere"], "nowhere"),
        (["--image_size", "8"], "image_size"),
        (["--max_minutes", "0"], "max_minutes"),
        (["--lr_scheduler_type", "zigzag"], "zigzag"),
        (["--learning_rate", "much"], "much"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(folder, capsys, more, message):
    with pytest.raises(SystemExit) as stop:
        run_train.main(words(folder, "bad", *more))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and message in lines[-1] and lines[-1].startswith("run_train: ")
    assert not any(line.startswith("usage:") for line in lines)
    assert not (folder / "bad").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "learning_rat"),
        ("- a\n- b", "mapping"),
        ("a: [1", "YAML"),
        ("model_config: 3", "model_config"),
    ],
)
def test_a_bad_configuration_file_is_one_line_and_exit_status_2(tmp_path, capsys, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        run_train.main(["--config", str(tmp_path / "bad.yaml")])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_clip_that_is_cut_off_is_refused(folder, tmp_path, capsys):
    (tmp_path / "open_clip_config.json").write_text((folder / "clip" / "open_clip_config.json").read_text())
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"\x08")
    with pytest.raises(SystemExit) as stop:
        run_train.main(words(folder, "bad", "--clip", str(tmp_path)))
    assert stop.value.code == 2 and "cannot be read as a CLIP" in capsys.readouterr().err


def test_help_lists_the_arguments(capsys):
    with pytest.raises(SystemExit) as stop:
        run_train.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "--max_minutes" in text and "--clip" in text


# ------------------------------------------------------------------------------------------------------------
# Budget


def test_a_budget_of_minutes_stops_the_run(folder):
    run_train.main(
        words(folder, "budget", "--max_steps", "500", "--max_minutes", "0.001", "--eval_strategy", "no")
    )
    assert max(entry["step"] for entry in history(folder / "budget")) < 500


# ------------------------------------------------------------------------------------------------------------
# Targets and data sets


def test_things_are_masks_one_by_one_and_stuff_is_one_mask_per_class():
    panoptic = np.array([[1, 1, 2, 3], [4, 4, 5, 0]])
    segments = [
        {"id": 1, "class_id": 0, "isthing": True},
        {"id": 2, "class_id": 0, "isthing": True},
        {"id": 3, "class_id": 2, "isthing": False},
        {"id": 4, "class_id": 2, "isthing": False},
        {"id": 5, "class_id": 1, "isthing": True},
        {"id": 9, "class_id": 0, "isthing": True},
    ]
    masks, labels = segment_targets(panoptic, segments, np.array([0, -1, 1])).masks()
    assert labels.tolist() == [0, 0, 1]
    assert [mask.nonzero().tolist() for mask in masks] == [
        [[0, 0], [0, 1]],
        [[0, 2]],
        [[0, 3], [1, 0], [1, 1]],
    ]


def test_a_label_map_gives_one_mask_per_seen_class():
    masks, labels = semantic_targets(np.array([[0, 2], [1, IGNORE_INDEX]]), np.array([0, -1, 1])).masks()
    assert labels.tolist() == [0, 1] and masks.sum((1, 2)).tolist() == [1, 1]
    masks, labels = semantic_targets(np.full((2, 3), IGNORE_INDEX), np.array([0])).masks()
    assert masks.shape == (0, 2, 3) and labels.shape == (0,)


def test_training_scenes_hold_seen_classes_only_and_are_the_same_every_time():
    dataset, classes = ScenesTraining(seed=3, size=64), scenes_classes()
    first, again = dataset[5], dataset[5]
    assert first["image_id"] == again["image_id"] == "scenes3[5]"
    assert all(torch.equal(first[key], again[key]) for key in ("image", "mask_labels", "class_labels"))
    assert not torch.equal(first["image"], dataset[6]["image"])
    assert first["mask_labels"].sum(0).max() == 1
    assert first["class_labels"].max() < len(classes.seen_classes)
    labels = np.unique(
        np.concatenate([np.unique(example["label"]) for example in ScenesEvaluation(4, 64, 8)])
    )
    assert {bool(classes.seen[label]) for label in labels if label != IGNORE_INDEX} == {True, False}


def test_jitter_keeps_labels_on_their_pixels_and_never_exceeds_the_crop():
    image = torch.zeros(3, 50, 80, dtype=torch.uint8)
    image[:, :, 40:] = 200
    labels = (image[0] > 100).long()
    torch.manual_seed(0)
    for _ in range(20):
        pil_image, label_map = LargeScaleJitter(64, 0.2, 2.0)(image, labels)
        assert pil_image.shape[1:] == label_map.shape and max(label_map.shape) <= 64
        assert ((pil_image[0] > 100).long() == label_map).float().mean() > 0.9


@pytest.mark.parametrize("panoptic", [True, False])
def test_a_data_set_on_disk_trains_with_its_own_classes(folder, tmp_path, panoptic):
    label = np.zeros((40, 56), np.uint8)
    label[:, 30:], label[:5] = 1, IGNORE_INDEX
    columns = {
        "image": [Image.fromarray(np.full((40, 56, 3), 90, np.uint8))] * 3,
        "label": [Image.fromarray(label)] * 3,
    }
    features = {"image": datasets.Image(), "label": datasets.Image()}
    names = datasets.ClassLabel(names=["sofa,couch", "wall"])
    if panoptic:
        columns["panoptic"] = [
            Image.fromarray(np.where(label == IGNORE_INDEX, 0, label + 1).astype(np.uint8))
        ] * 3
        rows = [{"id": 1, "category_id": 0, "isthing": True}, {"id": 2, "category_id": 1, "isthing": False}]
        columns["segments"] = [rows] * 3
        segment = {"id": datasets.Value("int32"), "category_id": names, "isthing": datasets.Value("bool")}
        features |= {"panoptic": datasets.Image(), "segments": datasets.List(segment)}
    else:
        columns["classes"], features["classes"] = [[0, 1]] * 3, datasets.List(names)
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    datasets.DatasetDict(train=table, validation=table).save_to_disk(tmp_path / "data")
    run_train.main(
        words(
            folder,
            f"disk{panoptic}",
            "--dataset",
            str(tmp_path / "data"),
            "--max_steps",
            "1",
            "--eval_steps",
            "1",
        )
    )
    model = ITAForOpenVocabSegmentation.from_pretrained(folder / f"disk{panoptic}")
    assert model.config.vocabulary == [["sofa", "couch"], ["wall"]]


def test_scenes_saved_to_disk_keep_their_synonyms_and_their_split(tmp_path):
    saved = scenes_dataset("train", num_images=2, size=64)
    saved.save_to_disk(tmp_path / "scenes")
    jitter = LargeScaleJitter(64, 1.0, 1.0, flip=False)
    classes, training, evaluation = load_disk(
        str(tmp_path / "scenes"),
        train_split="train",
        eval_split="validation",
        unseen=[],
        augmentation=jitter,
        eval_images=1,
    )
    assert classes == scenes_classes() and evaluation is None
    drawn = ScenesTraining(SPLITS["train"].seed, 64)[1]
    read = training[1]
    assert torch.equal(read["image"], drawn["image"]) and torch.equal(
        read["mask_labels"], drawn["mask_labels"]
    )
    assert torch.equal(read["class_labels"], drawn["class_labels"])


def test_a_data_set_without_class_names_or_columns_is_refused(tmp_path):
    table = datasets.Dataset.from_dict({"image": [1], "label": [2]})
    table.save_to_disk(tmp_path / "plain")
    options = {
        "train_split": "train",
        "eval_split": "validation",
        "augmentation": LargeScaleJitter(64),
        "eval_images": 1,
    }
    with pytest.raises(ITAError, match="no class names"):
        load_disk(str(tmp_path / "plain"), unseen=[], **options)
    table.remove_columns("label").save_to_disk(tmp_path / "bare")
    with pytest.raises(ITAError, match="needs columns"):
        load_disk(str(tmp_path / "bare"), unseen=[], **options)
    assert class_names({"a": datasets.List({"b": datasets.ClassLabel(names=["x"])})}) == ["x"]


def test_masks_are_padded_like_their_images():
    examples = [
        {
            "image": torch.zeros(3, height, 50, dtype=torch.uint8),
            "mask_labels": torch.ones(2, height, 50, dtype=torch.bool),
            "class_labels": torch.tensor([0, 1]),
        }
        for height in (40, 64)
    ]
    batch = TrainingCollator(ITAImageProcessor())(examples)
    assert batch["pixel_values"].shape == (2, 3, 64, 64)
    assert [masks.shape for masks in batch["mask_labels"]] == [(2, 64, 64)] * 2
    assert torch.equal(batch["mask_labels"][0][0], batch["pixel_mask"][0].bool())
    assert "pixel_mask" not in TrainingCollator(ITAImageProcessor())(
        [
            {
                "image": torch.zeros(3, 64, 32, dtype=torch.uint8),
                **{k: examples[1][k] for k in ("class_labels",)},
                "mask_labels": torch.zeros(0, 64, 32),
            }
        ]
    )


def test_half_weights_halve_the_file_and_still_load_in_float32(folder):
    sizes = {}
    for half in ("false", "true"):
        arguments = words(folder, f"half_{half}", "--half_weights", half)
        trainer, _ = run_train.build_trainer(run_train.parse_arguments(arguments))
        run_train.save(trainer)
        sizes[half] = (folder / f"half_{half}" / "model.safetensors").stat().st_size
        loaded = ITAForOpenVocabSegmentation.from_pretrained(folder / f"half_{half}")
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert sizes["true"] < 0.52 * sizes["false"]
