"""`ita train`: what a run logs and leaves, resuming, budgets, the command line and bad input."""

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from helpers import training_runs
from ita_segmentation.cli.train import parse_arguments, train
from ita_segmentation.training import read_history
from modeling_ita import ITAForOpenVocabSegmentation, ITAImageProcessor

LOSS_NAMES = [f"loss_{part}{suffix}" for suffix in ("", "_sum") for part in ("ce", "mask", "dice")]
CLIP = "clip_backbone."


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> list[str]:
    """Arguments for Scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    changes = {"dataset": "scenes", "max_steps": 2, "ema_decay": 0.0, "eval_strategy": "no"}
    return training_runs.make_inputs(folder, **changes)


# ------------------------------------------------------------------------------------------------------------
# What a run logs and leaves


def test_a_run_logs_every_part_of_the_loss_and_the_scores(finished):
    entries = [entry for entry in read_history(finished) if "loss" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6]
    for entry in entries:
        assert all(entry[name] > 0 for name in LOSS_NAMES)
        assert entry["loss"] == pytest.approx(sum(entry[name] for name in LOSS_NAMES[3:]))
    scored = [entry for entry in read_history(finished) if "eval_miou" in entry]
    assert [entry["step"] for entry in scored] == [3, 6] and 0 <= scored[-1]["eval_pacc"] <= 1


def test_the_logged_loss_is_the_trainer_s_own(finished):
    """transformers computes the mean training loss from the loss that each step returned."""
    mean = next(entry["train_loss"] for entry in read_history(finished) if "train_loss" in entry)
    assert np.mean(training_runs.losses_of(finished)) == pytest.approx(mean, rel=1e-4)


def test_a_run_leaves_a_checkpoint_that_knows_its_vocabulary(scenes, tmp_path, capsys):
    output = training_runs.run(scenes, tmp_path / "out", "--eval_strategy", "steps", "--eval_steps", "2")
    model = ITAForOpenVocabSegmentation.from_pretrained(output).eval()
    processor = ITAImageProcessor.from_pretrained(output)
    assert list(processor.image_mean) == [0.5] * 3
    assert len(model.config.id2label) == 178 and len(model.config.train_vocabulary) == 136
    image = Image.fromarray(np.zeros((40, 70, 3), np.uint8))
    with torch.no_grad():
        outputs = model(**processor(images=image, return_tensors="pt"))
    assert processor.post_process_semantic_segmentation(outputs, target_sizes=[(40, 70)])[0].shape == (40, 70)
    scored = [entry for entry in read_history(output) if "eval_miou" in entry]
    assert {"eval_miou_seen", "eval_miou_unseen"} <= set(scored[0])
    captured = capsys.readouterr()
    assert f"model     {output}" in captured.out and str(output / "results.png") in captured.out


def test_clip_stays_unchanged_and_the_rest_learns(run, finished):
    trained = load_file(finished / "model.safetensors")
    clip = load_file(finished.parent / "clip" / "open_clip_model.safetensors")
    for name, tensor in clip.items():
        assert torch.equal(trained[f"{CLIP}clip.{name}"], tensor), name
    first = ITAForOpenVocabSegmentation.from_pretrained(finished / "checkpoint-2").state_dict()
    changed = {name for name in trained if not torch.equal(trained[name], first[name])}
    assert changed and not any(name.startswith(CLIP) for name in changed)


def test_the_optimizer_has_trainable_parameters_only_and_spares_norms_and_embeddings(arguments, tmp_path):
    trainer = training_runs.build(arguments, tmp_path)
    names = {id(parameter): name for name, parameter in trainer.network.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    trainable = {name for name, p in trainer.network.named_parameters() if p.requires_grad}
    assert decayed | spared == trainable and not any(CLIP in name for name in trainable)
    assert {"void_embedding", "image_text_aggregation.learned_queries"} <= spared
    assert any("norm" in name for name in spared) and not any("norm" in name for name in decayed)
    trainer.network.train()
    assert not any(module.training for module in trainer.network.clip_backbone.modules())


@pytest.mark.parametrize("panoptic", [True, False])
def test_a_dataset_on_disk_trains_with_its_own_classes(arguments, tmp_path, panoptic):
    label = np.zeros((40, 56), np.uint8)
    label[:, 30:], label[:5] = 1, 255
    images = [Image.fromarray(np.full((40, 56, 3), 90, np.uint8))] * 3
    columns = {"image": images, "label": [Image.fromarray(label)] * 3}
    features = {"image": datasets.Image(), "label": datasets.Image()}
    names = datasets.ClassLabel(names=["sofa,couch", "wall"])
    if panoptic:
        ids = np.where(label == 255, 0, label + 1).astype(np.uint8)
        columns["panoptic"] = [Image.fromarray(ids)] * 3
        rows = [{"id": 1, "category_id": 0, "isthing": True}, {"id": 2, "category_id": 1, "isthing": False}]
        columns["segments"] = [rows] * 3
        segment = {"id": datasets.Value("int32"), "category_id": names, "isthing": datasets.Value("bool")}
        features |= {"panoptic": datasets.Image(), "segments": datasets.List(segment)}
    else:
        columns["classes"], features["classes"] = [[0, 1]] * 3, datasets.List(names)
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    datasets.DatasetDict(train=table, validation=table).save_to_disk(tmp_path / "data")
    more = [
        "--dataset",
        str(tmp_path / "data"),
        "--max_steps",
        "1",
        "--save_strategy",
        "no",
        "--report_to",
        "none",
    ]
    output = training_runs.run(arguments, tmp_path / "out", *more)
    config = ITAForOpenVocabSegmentation.from_pretrained(output).config
    assert config.vocabulary == [["sofa", "couch"], ["wall"]]


def test_half_weights_halve_the_file_and_still_load_in_float32(arguments, tmp_path):
    sizes = {}
    for half in ("false", "true"):
        output = tmp_path / half
        training_runs.build(arguments, output, "--half_weights", half).save_model()
        sizes[half] = (output / "model.safetensors").stat().st_size
        loaded = ITAForOpenVocabSegmentation.from_pretrained(output)
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert sizes["true"] < 0.52 * sizes["false"]


def test_a_checkpoint_can_be_fine_tuned(arguments, finished, tmp_path):
    more = ["--model", str(finished), "--model_config.train_num_points", "32"]
    without_clip = [*arguments, "--config", str(tmp_path / "recipe.yaml")]
    recipe = {**training_runs.RECIPE, "model_config": None, "dataset": str(finished.parent / "data")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    trainer = training_runs.build(without_clip[2:], tmp_path / "fine", *more)
    assert trainer.network.config.train_num_points == 32 and trainer.network.criterion.num_points == 32
    weights = load_file(finished / "model.safetensors")
    for name, tensor in trainer.network.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


# ------------------------------------------------------------------------------------------------------------
# Resuming and budgets


def test_resuming_a_finished_run_writes_the_same_model_again(copy, arguments, finished):
    (copy / "examples").mkdir()
    (copy / "examples" / "one.txt").write_text("kept")
    (copy / "model.safetensors").unlink()
    training_runs.run(arguments, copy, "--resume_from_checkpoint")
    training_runs.assert_same_run(copy, finished)
    assert (copy / "examples" / "one.txt").read_text() == "kept"


def test_a_run_resumed_elsewhere_from_a_named_checkpoint_equals_the_unbroken_one(
    arguments, finished, tmp_path
):
    checkpoint = str(finished / "checkpoint-4")
    output = training_runs.run(arguments, tmp_path / "out", "--resume_from_checkpoint", checkpoint)
    training_runs.assert_same_run(output, finished)


def test_a_budget_of_minutes_stops_the_run_and_its_last_step_is_logged(scenes, tmp_path):
    more = ["--max_steps", "500", "--max_minutes", "0.001", "--logging_steps", "100"]
    entries = read_history(training_runs.run(scenes, tmp_path / "out", *more))
    steps = [entry["step"] for entry in entries if "loss" in entry]
    assert steps[-1] == max(entry["step"] for entry in entries) < 500


# ------------------------------------------------------------------------------------------------------------
# The command line


def test_the_command_line_takes_precedence_over_the_file(arguments, tmp_path):
    more = ["--output_dir", str(tmp_path), "--max_steps=7", "--image_size", "96"]
    more += ["--model_config.decoder_self_attention", "true", "--model_config.templates=['{}']"]
    model, data, training = parse_arguments([*arguments, *more])
    assert (training.max_steps, data.image_size, training.learning_rate) == (7, 96, 1e-3)
    changes = model.config_changes
    assert changes["decoder_self_attention"] is True and changes["hidden_dim"] == 64
    assert changes["templates"] == ["{}"]
    assert (
        parse_arguments([*arguments, "--output_dir", "x", "--resume_from_checkpoint"])[
            2
        ].resume_from_checkpoint
        == "last"
    )


def test_the_recorded_arguments_are_a_recipe_of_the_same_run(arguments, finished):
    skipped = ("report_to", "model_config", "distributed_state")
    recorded = ["--config", str(finished / "arguments.yaml"), "--use_cpu"]
    for one, other in zip(
        parse_arguments(recorded), parse_arguments([*arguments, "--output_dir", str(finished)]), strict=True
    ):
        same = {name: value for name, value in vars(one).items() if name not in skipped}
        assert same == {name: vars(other)[name] for name in same}
    assert parse_arguments(recorded)[0].config_changes == training_runs.MODEL_CONFIG


def test_help_describes_ours_and_names_transformers_own(capsys):
    for words, expected in (["--help"], False), (["--help_all"], True):
        with pytest.raises(SystemExit) as stop:
            raise SystemExit(train(words))
        text = capsys.readouterr().out
        assert stop.value.code == 0 and "--max_minutes MAX_MINUTES" in text and "neftune_noise_alpha" in text
        assert ("--neftune_noise_alpha NEFTUNE" in text) == expected
        assert "--no_flip" not in text or expected
        assert len(text.splitlines()) < 250 or expected


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--clip", "nowhere"], "there is no folder nowhere"),
        (["--no_such_option", "1"], "--no_such_option"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--max_steps", "-1"], "give max_steps or max_minutes"),
        (["--model_config.hiden_dim", "64"], "hiden_dim"),
        (["--model_config.hidden_dim", "33"], "hidden_dim"),
        (["--model_config.hidden_dim", "[1"], "--model_config.hidden_dim"),
        (["--dataset", "nowhere"], "nowhere"),
        (["--model", "nowhere"], "one of --clip CLIP"),
        (["--resume_from_checkpoint", "nowhere"], "nowhere"),
        (["--image_size", "8"], "image_size"),
        (["--lr_scheduler_type", "zigzag"], "zigzag"),
        (["--learning_rate", "much"], "much"),
        (["--lr_milestones", "0.9", "0.8"], "lr_milestones must increase"),
        (["--ema_decay", "1"], "ema_decay"),
        (["--max_minutes", "0"], "max_minutes must be positive"),
        (["--max_minutes", "nan"], "max_minutes must be a finite number"),
        (["--max_minutes", "-3"], "max_minutes must not be negative"),
        (["--learning_rate", "nan"], "learning_rate must be a finite number"),
        (["--weight_decay", "inf"], "weight_decay must be a finite number"),
        (["--lr_milestones", "nan"], "lr_milestones must be a finite number"),
        (["--adam_epsilon", "-1"], "adam_epsilon must not be negative"),
        (["--logging_steps", "nan"], "logging_steps must be a finite number"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps must be positive"),
        (["--min_scale", "nan"], "min_scale must be a finite number"),
        (["--max_steps", "-7"], "max_steps must be positive"),
        (["--keep_vocabulary", "nan"], "keep_vocabulary"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(scenes, tmp_path, capsys, more, message):
    status, text = training_runs.failure(capsys, scenes, "--output_dir", str(tmp_path / "bad"), *more)
    assert status == 2 and message in text and len(text.splitlines()) == 1
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "learning_rat"),
        ("- a\n- b", "mapping"),
        ("a: [1", "YAML"),
        ("model_config: 3", "model_config"),
        ("a: " + "[" * 99 + "]" * 99, "nested"),
    ],
)
def test_a_bad_configuration_file_is_one_line_and_exit_status_2(tmp_path, capsys, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    arguments = ["--config", str(tmp_path / "bad.yaml"), "--clip", "x", "--max_steps", "1"]
    status, said = training_runs.failure(capsys, arguments, "--output_dir", str(tmp_path / "out"))
    assert status == 2 and message in said and len(said.splitlines()) == 1


def test_a_truncated_clip_is_refused(scenes, tmp_path, capsys):
    clip = training_runs.make_clip(tmp_path / "clip")
    (clip / "open_clip_model.safetensors").write_bytes(b"\x08")
    more = ["--output_dir", str(tmp_path / "bad"), "--clip", str(clip)]
    status, text = training_runs.failure(capsys, scenes, *more)
    assert status == 2 and "cannot be read as a CLIP" in text


def test_data_without_any_label_is_named(arguments, tmp_path, capsys):
    data = training_runs.make_data(tmp_path / "data", ignored=True)
    more = ["--output_dir", str(tmp_path / "bad"), "--dataset", str(data)]
    status, text = training_runs.failure(capsys, arguments, *more)
    assert status == 2 and "first 10 training images" in text and "no labels to learn" in text
    assert not (tmp_path / "bad").exists()


def test_resuming_on_other_classes_is_named(arguments, copy, tmp_path, capsys):
    data = training_runs.make_data(tmp_path / "data", names=("box", "curtain"))
    more = ["--output_dir", str(copy), "--dataset", str(data), "--resume_from_checkpoint", "--max_steps", "8"]
    status, text = training_runs.failure(capsys, arguments, *more)
    assert status == 2 and "curtain" in text and "was trained on 2 classes" in text
    withheld = ["--output_dir", str(copy), "--resume_from_checkpoint", "--unseen_classes", "wall"]
    status, text = training_runs.failure(capsys, arguments, *withheld)
    assert status == 2 and "2 seen classes, the dataset has 1" in text and "wall" in text
