"""One finished run that most of these tests look at."""

import shutil
from pathlib import Path

import pytest

from helpers import training_runs

SHARED_RUN = {
    "max_steps": 6,
    "save_steps": 2,
    "logging_steps": 1,
    "eval_steps": 3,
    "sample_images": 2,
    "ema_decay": 0.0,
    "report_to": "tensorboard",
}


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> tuple[list[str], Path]:
    """The arguments of a run of six steps with three checkpoints, and its finished output folder."""
    folder = tmp_path_factory.mktemp("run")
    arguments = training_runs.make_inputs(folder, **SHARED_RUN)
    return arguments, training_runs.run(arguments, folder / "finished")


@pytest.fixture(scope="session")
def arguments(run) -> list[str]:
    """The arguments of the finished run, without its output folder."""
    return run[0]


@pytest.fixture(scope="session")
def finished(run) -> Path:
    """The output folder of the finished run, not to be changed."""
    return run[1]


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A copy of the finished output folder."""
    return shutil.copytree(finished, tmp_path / "copy")
