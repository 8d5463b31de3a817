"""kill -9 at any moment, also while a checkpoint is being written: the resumed run equals the unbroken one, bitwise."""

import time
from pathlib import Path

import pytest

from helpers import training_runs


def check(folder: Path, num_kills: int, num_processes: int, seed: int) -> None:
    arguments = training_runs.make_inputs(folder)
    whole, started = folder / "whole", time.monotonic()
    processes = training_runs.start([*arguments, "--output_dir", str(whole)], folder / "log", num_processes)
    assert training_runs.finish(processes) == [0] * num_processes, (folder / "log").read_text()[-2000:]
    seconds = time.monotonic() - started  # kills come within the time that the whole run took
    killed = folder / "killed"
    num_finished = training_runs.kill_until_finished(
        arguments, killed, num_kills, num_processes, seconds, seed
    )
    for number in range(num_finished):
        training_runs.assert_same_run(folder / f"killed-{number}", whole)


def test_a_run_that_is_killed_twice_equals_the_unbroken_run(tmp_path):
    check(tmp_path, num_kills=2, num_processes=1, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_run_that_is_killed_twenty_times_equals_the_unbroken_run(tmp_path, num_processes):
    check(tmp_path, num_kills=20, num_processes=num_processes, seed=num_processes)
