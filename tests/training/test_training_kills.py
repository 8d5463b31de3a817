"""kill -9 at any moment, also while a checkpoint is being written: the resumed run equals the unbroken one, bitwise.

By default a run is killed three times. With ITA_SLOW_TESTS=1 there are 20 kills on one process and 20 on two.
"""

import os
import sys
import time

import pytest

from helpers import training_runs

slow = pytest.mark.skipif(
    os.environ.get("ITA_SLOW_TESTS") != "1", reason="20 kills take minutes: set ITA_SLOW_TESTS=1"
)


def check(folder, num_kills: int, num_processes: int, seed: int, **changes) -> None:
    words = training_runs.make_world(folder, **changes)
    started = time.monotonic()
    whole = training_runs.start(
        [*words, "--output_dir", str(folder / "whole")], folder / "log", num_processes
    )
    assert training_runs.finish(whole) == [0] * num_processes, (folder / "log").read_text()[-2000:]
    seconds = time.monotonic() - started  # kills come within the time that the whole run took
    counts = training_runs.kill_until_finished(
        words, folder / "killed", num_kills, num_processes, seconds, seed
    )
    sys.stdout.write(f"{num_processes} processes, kills: {counts}\n")
    for round_ in range(counts["rounds"]):
        training_runs.assert_same_run(folder / f"killed-{round_}", folder / "whole")


def test_a_run_that_is_killed_three_times_equals_the_unbroken_run(tmp_path):
    check(tmp_path, num_kills=3, num_processes=1, seed=1, max_steps=12)


@slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_run_that_is_killed_twenty_times_equals_the_unbroken_run(tmp_path, num_processes):
    check(tmp_path, num_kills=20, num_processes=num_processes, seed=num_processes)
