"""What a run does when something goes wrong: damaged checkpoints, a full disk, a loss that is no number, SIGTERM."""

import json
import signal
from typing import Any

import pytest
import torch

from helpers import training_runs
from ita_segmentation.cli import train as run_train
from ita_segmentation.training import checkpoints
from ita_segmentation.training.trainer import ITATrainer
from modeling_ita import ITAForOpenVocabSegmentation


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The command line of a run of six steps with three checkpoints, and its finished output folder."""
    folder = tmp_path_factory.mktemp("guards")
    changes = {"max_steps": 6, "save_steps": 2, "logging_steps": 1, "eval_strategy": "no"}
    words = training_runs.make_world(folder, **changes)
    run_train.main([*words, "--output_dir", str(folder / "whole")])
    return words, folder / "whole"


@pytest.fixture
def copy(world, tmp_path):
    """A copy of the finished output folder, which a test may harm."""
    import shutil

    return shutil.copytree(world[1], tmp_path / "copy")


def failure(words: list[str], capsys) -> tuple[Any, str]:
    """Exit status and last line of a run that does not end well."""
    with pytest.raises(SystemExit) as stop:
        run_train.main(words)
    return stop.value.code, capsys.readouterr().err.strip().splitlines()[-1]


# ------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_a_checkpoint_holds_the_frozen_weights_as_a_link_and_loads_like_a_model(world):
    _, output = world
    frozen = [output / f"checkpoint-{step}" / "model-00001-of-00002.safetensors" for step in (2, 4, 6)]
    assert len({file.stat().st_ino for file in frozen}) == 1
    final = ITAForOpenVocabSegmentation.from_pretrained(output).state_dict()
    last = ITAForOpenVocabSegmentation.from_pretrained(output / "checkpoint-6").state_dict()
    assert all(torch.equal(tensor, last[name]) for name, tensor in final.items())


@pytest.mark.parametrize("harm", ["cut", "changed", "missing", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(copy, capsys, harm):
    file = copy / "checkpoint-6" / "optimizer.pt"
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "changed":
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    elif harm == "missing":
        file.unlink()
    else:
        (copy / "checkpoint-6" / "manifest.json").unlink()
    assert run_train.find_checkpoint("last", copy) == str(copy / "checkpoint-4")
    line = capsys.readouterr().err
    assert "checkpoint-6 is damaged" in line and line.count("\n") == 1
    with pytest.raises(run_train.BadInput, match="checkpoint-6 is damaged"):
        run_train.find_checkpoint(str(copy / "checkpoint-6"), copy)


def test_auto_starts_anew_where_there_is_no_checkpoint_but_not_over_damaged_ones(copy, tmp_path):
    assert run_train.find_checkpoint("auto", tmp_path / "nowhere") is None
    for folder in copy.glob("checkpoint-*"):
        (folder / "manifest.json").unlink()
    with pytest.raises(run_train.BadInput, match="no whole checkpoint"):
        run_train.find_checkpoint("auto", copy)


def test_a_new_run_does_not_mix_its_checkpoints_with_others(world, capsys):
    words, output = world
    status, line = failure([*words, "--output_dir", str(output)], capsys)
    assert status == 2 and "checkpoints of an earlier run" in line


def test_a_run_with_another_clip_is_not_resumed(world, copy, tmp_path, capsys):
    words, _ = world
    torch.manual_seed(7)
    other = training_runs.make_clip(tmp_path / "other")
    weights = training_runs.load_file(other / "open_clip_model.safetensors")
    weights["logit_scale"] += 1
    training_runs.save_file(weights, other / "open_clip_model.safetensors")
    resumed = ["--output_dir", str(copy), "--resume_from_checkpoint", "last", "--max_steps", "8"]
    status, line = failure([*words, *resumed, "--clip", str(other)], capsys)
    assert status == 1 and "other frozen weights" in line


def test_a_run_that_ended_after_its_last_checkpoint_does_not_train_on(world, copy):
    words, whole = world
    (copy / "model.safetensors").unlink()
    run_train.main([*words, "--output_dir", str(copy), "--resume_from_checkpoint"])
    training_runs.assert_same_run(copy, whole)


def test_old_checkpoints_lose_their_name_before_their_files(copy, monkeypatch):
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda *_, **__: None)  # killed while deleting
    checkpoints.keep_latest(copy, limit=1, best=str(copy / "checkpoint-2"))
    assert [folder.name for folder in checkpoints.checkpoints_of(copy)] == ["checkpoint-6", "checkpoint-2"]
    monkeypatch.undo()
    assert checkpoints.clear_leftovers(copy) == [".removed-checkpoint-4"]
    assert not list(copy.glob(".*"))


# ------------------------------------------------------------------------------------------------------------
# A full disk


def test_a_full_disk_costs_a_checkpoint_but_neither_the_run_nor_the_checkpoint_before(
    world, tmp_path, monkeypatch, caplog
):
    words, whole = world
    original = ITATrainer._save_optimizer_and_scheduler

    def fail_at_step_4(self, folder):
        if self.state.global_step == 4:
            (checkpoints.Path(folder) / "optimizer.pt").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(self, folder)

    monkeypatch.setattr(ITATrainer, "_save_optimizer_and_scheduler", fail_at_step_4)
    run_train.main([*words, "--output_dir", str(tmp_path / "full")])
    assert [folder.name for folder in checkpoints.checkpoints_of(tmp_path / "full")] == [
        "checkpoint-6",
        "checkpoint-2",
    ]
    assert not list((tmp_path / "full").glob(".*"))
    assert all(checkpoints.damage(folder) is None for folder in checkpoints.checkpoints_of(tmp_path / "full"))
    training_runs.assert_same_run(tmp_path / "full", whole)


def test_a_process_that_may_write_no_more_ends_with_one_line_and_nothing_half(world, tmp_path):
    words, _ = world
    output, log = tmp_path / "limited", tmp_path / "log"
    status = training_runs.finish(
        training_runs.start([*words, "--output_dir", str(output)], log, file_bytes=100_000)
    )
    lines = [line for line in log.read_text().splitlines() if "could not be written" in line]
    assert status == [1] and len(lines) == 3 and "checkpoint-2" in lines[0]
    assert log.read_text().splitlines()[-1].startswith("run_train: ")
    assert not list(output.glob("checkpoint-*")) and not list(output.glob("*.safetensors"))
    assert not list(output.glob(".*"))


# ------------------------------------------------------------------------------------------------------------
# A loss that is no number


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_images(world, tmp_path, monkeypatch, capsys):
    words, _ = world
    original = ITATrainer.compute_loss
    names = []

    def spoil_step_3(self, model, inputs, **keywords):
        if self.state.global_step == 2:
            names.extend(inputs["image_names"])
            inputs["pixel_values"] = inputs["pixel_values"] * float("nan")
        return original(self, model, inputs, **keywords)

    monkeypatch.setattr(ITATrainer, "compute_loss", spoil_step_3)
    status, line = failure([*words, "--output_dir", str(tmp_path / "nan")], capsys)
    report = json.loads((tmp_path / "nan" / "nan_batch.json").read_text())
    assert status == 1 and "step 3" in line and names[0] in line
    assert report["step"] == 3 and report["learning_rate"] > 0
    [[batch]] = report["processes"]
    assert batch["image_names"] == names and batch["losses"]["loss_mask"] == "nan"
    assert [folder.name for folder in checkpoints.checkpoints_of(tmp_path / "nan")] == ["checkpoint-2"]


# ------------------------------------------------------------------------------------------------------------
# SIGTERM


def test_sigterm_saves_a_checkpoint_and_the_resumed_run_equals_the_unbroken_one(
    world, tmp_path, monkeypatch, capsys
):
    words, whole = world
    original = ITATrainer.compute_loss

    def terminate_in_step_3(self, *arguments, **keywords):
        if self.state.global_step == 2:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(ITATrainer, "compute_loss", terminate_in_step_3)
    output = ["--output_dir", str(tmp_path / "out")]
    status, line = failure([*words, *output], capsys)
    assert status == 143 and "checkpoint-3 is saved" in line
    monkeypatch.undo()
    run_train.main([*words, *output, "--resume_from_checkpoint"])
    training_runs.assert_same_run(tmp_path / "out", whole)
