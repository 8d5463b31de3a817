"""When something goes wrong: damaged checkpoints, a full disk, two runs in one folder, non-finite losses, signals."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import training_runs
from ita_segmentation.errors import ITAError, UsageError
from ita_segmentation.training import ITATrainer, checkpoints
from modeling_ita import ITAForOpenVocabSegmentation


def names_of(output: Path) -> list[str]:
    return [folder.name for folder in checkpoints.checkpoints_of(output)]


# ------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_checkpoints_share_the_frozen_weights_and_load_like_a_model(finished):
    frozen = [finished / f"checkpoint-{step}" / checkpoints.FROZEN for step in (2, 4, 6)]
    assert len({file.stat().st_ino for file in frozen}) == 1
    final = ITAForOpenVocabSegmentation.from_pretrained(finished).state_dict()
    last = ITAForOpenVocabSegmentation.from_pretrained(finished / "checkpoint-6").state_dict()
    assert all(torch.equal(tensor, last[name]) for name, tensor in final.items())


@pytest.mark.parametrize("harm", ["cut", "changed", "missing", "no manifest", "bad manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(copy, caplog, harm):
    file = copy / "checkpoint-6" / "optimizer.pt"
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "changed":
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    elif harm == "missing":
        file.unlink()
    elif harm == "no manifest":
        (copy / "checkpoint-6" / "manifest.json").unlink()
    else:
        (copy / "checkpoint-6" / "manifest.json").write_text('{"files": [1]}')
    assert checkpoints.find_checkpoint("last", copy) == copy / "checkpoint-4"
    assert caplog.text.count("checkpoint-6 is damaged") == 1
    with pytest.raises(UsageError, match="checkpoint-6 is damaged"):
        checkpoints.find_checkpoint(str(copy / "checkpoint-6"), copy)


def test_auto_starts_a_new_run_where_there_is_no_checkpoint_but_not_over_damaged_ones(copy, tmp_path):
    assert checkpoints.find_checkpoint("auto", tmp_path / "nowhere") is None
    for folder in copy.glob("checkpoint-*"):
        (folder / "manifest.json").unlink()
    with pytest.raises(UsageError, match="no undamaged checkpoint"):
        checkpoints.find_checkpoint("auto", copy)


def test_a_new_run_does_not_mix_its_checkpoints_with_others(arguments, finished, capsys):
    status, line = training_runs.failure(capsys, arguments, "--output_dir", str(finished))
    assert status == 2 and "checkpoints of an earlier run" in line and "\n" not in line


def test_a_run_with_another_clip_is_not_resumed(arguments, copy, tmp_path, capsys):
    clip = training_runs.make_clip(tmp_path / "other")
    weights = load_file(clip / "open_clip_model.safetensors")
    weights["logit_scale"] += 1
    save_file(weights, clip / "open_clip_model.safetensors")
    more = ["--output_dir", str(copy), "--resume_from_checkpoint", "last", "--max_steps", "8"]
    status, text = training_runs.failure(capsys, arguments, *more, "--clip", str(clip))
    assert status == 1 and "other frozen weights" in text.splitlines()[-1]


def test_an_average_is_neither_dropped_nor_invented(arguments, copy, capsys):
    more = ["--output_dir", str(copy), "--resume_from_checkpoint", "--max_steps", "8", "--ema_decay", "0.9"]
    status, text = training_runs.failure(capsys, arguments, *more)
    assert status == 1 and "has no averaged weights" in text.splitlines()[-1]


def test_old_checkpoints_lose_their_name_before_their_files(copy, monkeypatch):
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda *_, **__: None)  # killed while deleting
    checkpoints.keep_latest(copy, limit=1, best=str(copy / "checkpoint-2"))
    assert names_of(copy) == ["checkpoint-6", "checkpoint-2"]
    monkeypatch.undo()
    checkpoints.clear_temporary(copy)
    assert not list(copy.glob(".*"))


# ------------------------------------------------------------------------------------------------------------
# Two runs in one folder

HOLD = """
import sys, time
from pathlib import Path
from ita_segmentation.training.checkpoints import output_lock
with output_lock(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_folder_in_use_is_refused_and_a_dead_process_s_lock_does_not_count(arguments, tmp_path, capsys):
    output = tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLD, str(output)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        more = ["--output_dir", str(output), "--report_to", "none"]
        status, text = training_runs.failure(capsys, arguments, *more)
        assert status == 1 and f"is in use by another training run (process {other.pid} on" in text
        other.kill()
    assert (output / ".lock").is_file()
    with checkpoints.output_lock(output):
        assert f"process {os.getpid()}" in (output / ".lock").read_text()
    assert not (output / ".lock").exists()


# ------------------------------------------------------------------------------------------------------------
# A full disk


def test_a_full_disk_costs_a_checkpoint_but_neither_the_run_nor_the_checkpoint_before(
    arguments, finished, tmp_path, monkeypatch, caplog
):
    original = ITATrainer._save_optimizer_and_scheduler

    def fail_at_step_4(self, folder):
        if self.state.global_step == 4:
            (Path(folder) / "optimizer.pt").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(self, folder)

    monkeypatch.setattr(ITATrainer, "_save_optimizer_and_scheduler", fail_at_step_4)
    output = training_runs.run(arguments, tmp_path / "full", "--report_to", "none", "--sample_images", "0")
    assert names_of(output) == ["checkpoint-6", "checkpoint-2"] and not list(output.glob(".*"))
    assert all(checkpoints.damage_of(output / name) is None for name in names_of(output))
    assert caplog.text.count("checkpoint-4 could not be written, the run continues") == 1
    training_runs.assert_same_run(output, finished)


def test_a_process_that_may_write_no_more_ends_with_one_line_and_nothing_half(arguments, tmp_path):
    output, log = tmp_path / "limited", tmp_path / "log"
    more = ["--output_dir", str(output), "--report_to", "none", "--sample_images", "0"]
    status = training_runs.finish(training_runs.start([*arguments, *more], log, file_bytes=100_000))
    lines = [line for line in log.read_text().splitlines() if "could not be written, the run" in line]
    assert status == [1] and len([line for line in lines if "checkpoint-" in line]) == 3
    assert "the model could not be written to" in log.read_text().splitlines()[-1]
    assert not list(output.glob("checkpoint-*")) and not list(output.rglob("*.safetensors"))
    assert not list(output.glob(".*"))


def test_results_that_cannot_be_written_do_not_end_the_run(arguments, tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ita_segmentation.training.trainer.write_results", refuse)
    more = ["--max_steps", "1", "--save_strategy", "no", "--report_to", "none"]
    output = training_runs.run(arguments, tmp_path / "out", *more)
    assert (output / "model.safetensors").is_file() and not (output / "results.png").exists()
    assert "the results could not be written, the run continues" in caplog.text


# ------------------------------------------------------------------------------------------------------------
# Non-finite losses and gradients


def test_a_non_finite_loss_ends_the_run_and_names_the_images(arguments, tmp_path, monkeypatch, capsys):
    original = ITATrainer.compute_loss
    names = []

    def spoil_step_3(self, model, inputs, **keywords):
        if self.state.global_step == 2:
            names.extend(inputs["image_names"])
            self.network.void_embedding.data.fill_(float("nan"))
        return original(self, model, inputs, **keywords)

    monkeypatch.setattr(ITATrainer, "compute_loss", spoil_step_3)
    output = tmp_path / "nan"
    more = ["--output_dir", str(output), "--report_to", "none"]
    status, text = training_runs.failure(capsys, arguments, *more)
    line = text.splitlines()[-1]
    assert status == 1 and "not finite at step 3" in line and names[0] in line
    report = json.loads((output / "non_finite_batch.json").read_text())
    assert report["step"] == 3 and report["learning_rate"] > 0
    [[batch]] = report["processes"]
    assert batch["image_names"] == names and batch["losses"]["loss_ce"] == "nan"
    assert names_of(output) == ["checkpoint-2"]
    assert training_runs.losses_of(output)[:2] and (output / "results.png").is_file()


def test_a_non_finite_gradient_ends_the_run_before_it_is_in_a_checkpoint(
    arguments, tmp_path, monkeypatch, capsys
):
    original = ITATrainer.compute_loss

    def spoil_gradient(self, model, inputs, **keywords):
        loss = original(self, model, inputs, **keywords)
        if self.state.global_step == 3:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(ITATrainer, "compute_loss", spoil_gradient)
    more = ["--output_dir", str(tmp_path / "out"), "--report_to", "none", "--max_grad_norm", "0"]
    status, text = training_runs.failure(capsys, arguments, *more)
    assert status == 1 and "not finite at step 4" in text.splitlines()[-1]
    assert names_of(tmp_path / "out") == ["checkpoint-2"]


def test_a_non_finite_loss_ends_two_processes_and_the_first_one_says_so(arguments, tmp_path):
    options = {
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "lr_scheduler_type": "constant",
        "learning_rate": "1e38",
        "max_grad_norm": "1e38",
        "warmup_steps": "0",
        "output_dir": str(tmp_path / "out"),
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    processes = training_runs.start([*arguments, *words], tmp_path / "log", 2)
    assert training_runs.finish(processes, 120.0) == [1, 1]
    assert (tmp_path / "log").read_text().count("not finite at step 2") == 1
    assert training_runs.losses_of(tmp_path / "out")[:1] and (tmp_path / "out" / "results.png").is_file()


# ------------------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_a_checkpoint_and_the_resumed_run_equals_the_unbroken_one(
    arguments, finished, tmp_path, monkeypatch, capsys, number, expected
):
    original = ITATrainer.compute_loss

    def interrupt_step_5(self, *positional, **keywords):
        if self.state.global_step == 4:
            signal.raise_signal(number)
        return original(self, *positional, **keywords)

    monkeypatch.setattr(ITATrainer, "compute_loss", interrupt_step_5)
    output = tmp_path / "out"
    more = ["--report_to", "none", "--sample_images", "0"]
    status, text = training_runs.failure(capsys, arguments, "--output_dir", str(output), *more)
    assert status == expected
    assert text.splitlines()[-1].endswith(
        f"stopped by {number.name} after step 5; {output / 'checkpoint-5'} is saved"
    )
    if number == signal.SIGINT:
        monkeypatch.undo()
        training_runs.run(arguments, output, "--resume_from_checkpoint", *more)
        training_runs.assert_same_run(output, finished)


@pytest.fixture
def terminal():
    """Ctrl-C as in a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_interrupt_stops_at_once(terminal, arguments, tmp_path, monkeypatch, capsys):
    def interrupt_twice(self, *_, **__):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ITATrainer, "compute_loss", interrupt_twice)
    more = ["--output_dir", str(tmp_path / "out"), "--report_to", "none"]
    status, text = training_runs.failure(capsys, arguments, *more)
    assert status == 130 and text.splitlines()[-1].endswith("interrupted")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_output_folder_that_is_a_file_is_named(arguments, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    status, text = training_runs.failure(capsys, arguments, "--output_dir", str(tmp_path / "file"))
    assert status in (1, 2) and str(tmp_path / "file") in text and "\n" not in text
    with pytest.raises(ITAError, match="cannot write to"), checkpoints.output_lock(tmp_path / "file"):
        pass
