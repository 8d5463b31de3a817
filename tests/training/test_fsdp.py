"""FSDP2: weights, gradients and moments sharded among processes learn what whole ones learn."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import fsdp_cpu, training_runs


def run(arguments: list[str], output: Path, environment: dict[str, str], *more: str) -> Path:
    log = output.with_suffix(".log")
    processes = training_runs.start(
        [*arguments, "--output_dir", str(output), *more], log, num_processes=2, more_environment=environment
    )
    assert training_runs.finish(processes, 1800) == [0, 0], log.read_text()[-6000:]
    return output


@pytest.mark.slow
@pytest.mark.parametrize("train_clip", ["none", "all"])
def test_fsdp2_on_two_processes_learns_what_ddp_learns_and_resumes(train_clip, tmp_path):
    settings = {"max_steps": 3, "logging_steps": 1, "save_steps": 2, "ema_decay": 0.0, "warmup_steps": 0}
    arguments = training_runs.make_inputs(tmp_path, **settings, eval_steps=3, train_clip=train_clip)
    ddp = run(arguments, tmp_path / "ddp", {})
    fsdp = run(arguments, tmp_path / "fsdp", fsdp_cpu.ENVIRONMENT)
    assert (ddp / "config.json").read_text() == (fsdp / "checkpoint-2" / "config.json").read_text()
    assert not list(fsdp.glob("_*.py"))
    losses = training_runs.losses_of(ddp)
    assert len(losses) == 3 and losses[2] != losses[0]
    assert training_runs.losses_of(fsdp) == pytest.approx(losses, rel=1e-5)

    begun = tmp_path / "resumed"
    shutil.copytree(fsdp / "checkpoint-2", begun / "checkpoint-2")
    resumed = run(arguments, begun, fsdp_cpu.ENVIRONMENT, "--resume_from_checkpoint")
    assert training_runs.losses_of(resumed) == pytest.approx(training_runs.losses_of(fsdp), rel=1e-6)
    expected, found, again = (load_file(one / "model.safetensors") for one in (ddp, fsdp, resumed))
    assert expected.keys() == found.keys() == again.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-4), name
        assert torch.allclose(again[name], found[name], atol=1e-4), name
