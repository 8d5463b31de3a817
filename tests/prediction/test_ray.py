"""A dataset on a Ray cluster: what a plain run gives, whatever becomes of its actors."""

import heapq
import importlib.util
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from helpers.ray_work import open_work
from ita_segmentation.cli import predict as predict_command
from ita_segmentation.cli.predict_options import read_options
from ita_segmentation.errors import ITAError, UsageError
from ita_segmentation.prediction import ParquetFolder, ray_engine, rows, segment_dataset
from ita_segmentation.prediction.ray_engine import RayOptions, segment_on_ray

ROOT = Path(__file__).parents[2]


def folder_of(path: Path, count: int) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.fromarray(np.full((9, 12, 3), 40 * index % 256, np.uint8)).save(path / f"{index:03d}.png")
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    assert not list(folder.glob(".*"))
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def plain_run(work: Any, output: Path) -> dict[str, bytes]:
    opened, worker, plan = work(lambda part, length: None)
    segment_dataset(worker, opened, ParquetFolder(output), plan)
    return files_of(output)


def ray_run(work: Any, output: Path, **options: Any) -> Any:
    opened, _, plan = work(lambda part, length: None)
    return segment_on_ray(work, opened, ParquetFolder(output), plan, RayOptions(**options))


# ------------------------------------------------------------------------------------------------------------
# Without Ray: how units are dealt


class LostError(Exception):
    """An actor's process has ended."""


class StubRay:
    """Ray with actors in this process, in seconds that are only counted.

    Args:
        seconds: of a unit, for each actor.
        lost: numbers of the tasks, in the order of their beginning, that end with their actor.
    """

    exceptions = SimpleNamespace(
        RayActorError=LostError,
        ObjectLostError=LostError,
        RayTaskError=ZeroDivisionError,
        RayError=ArithmeticError,
    )

    def __init__(self, seconds: list[float], lost: tuple[int, ...] = ()):
        self.seconds, self.lost = list(seconds), lost
        self.now, self.numbers = 0.0, itertools.count()
        self.tasks: list[tuple[float, int]] = []
        self.results: dict[int, Any] = {}
        self.is_running = False

    def init(self, **options: Any) -> None:
        self.is_running, self.address = True, options["address"]

    def shutdown(self) -> None:
        self.is_running = False

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(len(self.seconds))}

    def remote(self, **options: Any) -> Any:
        return lambda kind: SimpleNamespace(remote=lambda *given: StubActor(self, kind, given))

    def wait(self, tasks: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        end, number = self.tasks[0][:2]
        if end > self.now + timeout:
            self.now += timeout
            return [], tasks
        self.now = end
        heapq.heappop(self.tasks)
        return [number], []

    def get(self, number: int) -> Any:
        return self.results.pop(number)()

    def begin(self, seconds: float, work: Any) -> int:
        number = next(self.numbers)
        self.results[number] = work
        heapq.heappush(self.tasks, (self.now + seconds, number))
        return number


class StubActor:
    def __init__(self, ray: StubRay, kind: Any, given: tuple[Any, ...]):
        self.ray, self.actor, self.make = ray, kind(*given), lambda: kind(*given)
        self.seconds = ray.seconds.pop(0)
        self.prepare = SimpleNamespace(
            options=lambda **options: SimpleNamespace(remote=lambda: ray.begin(0.0, self.actor_prepare))
        )
        self.segment = SimpleNamespace(remote=self.begin_unit)

    def actor_prepare(self) -> Any:
        return self.actor.prepare()

    def begin_unit(self, part: int, number: int) -> int:
        def work() -> Any:
            if task in self.ray.lost:
                self.actor = self.make()
                raise LostError("killed")
            return self.actor.segment(part, number)

        task = self.ray.begin(self.seconds, work)
        return task


@pytest.fixture
def stub(monkeypatch):
    def use(seconds: list[float], lost: tuple[int, ...] = ()) -> StubRay:
        ray = StubRay(seconds, lost)
        monkeypatch.setattr(ray_engine, "import_ray", lambda: ray)
        monkeypatch.setattr(ray_engine.time, "monotonic", lambda: ray.now)
        monkeypatch.setattr(ray_engine.UnitQueue.__init__, "__defaults__", (lambda: ray.now,))
        return ray

    return use


@pytest.fixture
def work(tmp_path):
    return partial(open_work, folder_of(tmp_path / "in", 47), 4, 0.0, None)


def test_actors_write_the_files_of_a_plain_run(work, stub, tmp_path):
    ray = stub([1.0, 1.0, 3.0])
    counts = ray_run(work, tmp_path / "out")
    assert files_of(tmp_path / "out") == plain_run(work, tmp_path / "plain")
    assert len(files_of(tmp_path / "out")) == 12 and counts.images == 47
    assert not ray.is_running


def test_without_an_address_a_cluster_that_happens_to_run_is_left_alone(work, stub, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for given, variable, used in (
        (None, None, "local"),
        (None, "host:1", "host:1"),
        ("auto", "host:1", "auto"),
    ):
        if variable is not None:
            monkeypatch.setenv("RAY_ADDRESS", variable)
        ray = stub([1.0])
        ray_run(work, tmp_path / used, address=given)
        assert ray.address == used


def test_a_unit_that_is_lost_with_its_actor_is_done_by_another(work, stub, tmp_path):
    stub([1.0, 1.0], lost=(3, 6, 7))
    assert ray_run(work, tmp_path / "out").images == 47
    assert files_of(tmp_path / "out") == plain_run(work, tmp_path / "plain")


def test_a_unit_that_ends_every_actor_is_named(work, stub, tmp_path):
    stub([1.0], lost=(3, 5, 7))
    with pytest.raises(ITAError, match="unit 00000-000002 was lost 3 times with its process: killed"):
        ray_run(work, tmp_path / "out")
    assert len(files_of(tmp_path / "out")) == 2


def test_a_slow_actor_holds_up_nobody(work, stub, tmp_path):
    ray = stub([1.0, 10.0])
    assert ray_run(work, tmp_path / "out").images == 47
    assert files_of(tmp_path / "out") == plain_run(work, tmp_path / "plain")
    assert (
        ray.now < 0.3 * 6 * 10.0
    )  # of 12 units dealt out evenly; the last one of the slow actor was repeated


def test_a_run_goes_on_where_another_engine_was_stopped(work, stub, tmp_path, monkeypatch):
    stub([1.0, 1.0], lost=(2, 4, 5, 6, 7, 8, 9, 10))
    with pytest.raises(ITAError):
        ray_run(work, tmp_path / "out")
    plain = plain_run(work, tmp_path / "plain")
    for name in list(plain)[:5]:
        shutil.copy(tmp_path / "plain" / name, tmp_path / "out" / name)
    stub([1.0, 1.0])
    assert ray_run(work, tmp_path / "out").images < 47
    assert files_of(tmp_path / "out") == plain
    ray = stub([])
    assert ray_run(work, tmp_path / "out").images == 0
    assert not ray.is_running


def test_a_stream_is_read_on_by_the_actors_that_have_it(stub, tmp_path):
    lengths = [9, 0, 4]

    def open_stream(note_length: Any) -> Any:
        opened, worker, plan = open_work(folder_of(tmp_path / "in", 47), 4, 0.0, None, note_length)
        streamed = rows.StreamedRows(
            3,
            lambda part: map(opened._row, range(10 * part, 10 * part + lengths[part])),
            ParquetFolder(tmp_path / "out").part_length,
            note_length,
            4,
        )
        return streamed, worker, plan

    stub([1.0, 1.0], lost=(3,))
    assert ray_run(open_stream, tmp_path / "out").images == 13
    assert files_of(tmp_path / "out") == plain_run(open_stream, tmp_path / "plain")
    assert ParquetFolder(tmp_path / "out").part_length(0) == 9


def test_actors_find_what_relative_paths_name_and_the_plan_keeps_them(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "model").symlink_to(checkpoint)
    folder_of(tmp_path / "in", 3)
    monkeypatch.chdir(tmp_path)
    work = predict_command.actor_work(
        read_options(["--model", "model", "--dataset", "in", "--output", "out"]), unit_size=4
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    opened, _, plan = work(lambda part, length: None)
    assert [row.image_id for row in opened.unit(0, 0).rows] == ["000.png", "001.png", "002.png"]
    assert (plan["model"], plan["dataset"]) == ("model", "in")


def test_a_machine_with_other_data_is_refused(work, stub, tmp_path):
    stub([1.0])
    opened, _, plan = work(lambda part, length: None)
    folder_of(tmp_path / "in", 48)
    with pytest.raises(ITAError, match="another dataset or checkpoint .different: digest, images"):
        segment_on_ray(work, opened, ParquetFolder(tmp_path / "out"), plan, RayOptions())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", ".", "--engine", "ray"], "--engine is for --dataset"),
        (["--dataset", ".", "--actors", "2"], "--actors is for --engine ray"),
        (["--dataset", ".", "--engine", "ray", "--device", "cpu"], "leave out --device"),
    ],
)
def test_options_of_ray_that_do_not_fit_are_one_line(arguments, message, predict, tmp_path):
    with pytest.raises(UsageError, match=message):
        predict(*arguments, "--output", tmp_path / "out")


def test_several_processes_and_ray_do_not_go_together(predict, tmp_path):
    with pytest.raises(UsageError, match="run it as one"):
        predict("--dataset", tmp_path, "--engine", "ray", "--output", tmp_path / "out", world_size=2)


def test_ray_is_named_where_it_is_missing(predict, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    folder_of(tmp_path / "in", 1)
    with pytest.raises(ITAError, match=r"needs Ray: pip install 'ita-segmentation\[ray\]'"):
        predict("--dataset", tmp_path / "in", "--engine", "ray", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------
# With Ray

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
ENVIRONMENT = {
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",  # whatever token another cluster has left in the home folder
    "RAY_agent_register_timeout_ms": "600000",
    "RAY_raylet_start_wait_time_s": "600",
}


class Cluster:
    """A cluster of this machine, which ends as `ray stop` ends one; other clusters of the machine are left alone."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        script = Path(sys.executable).with_name("ray")
        options = f"--head --port {port} --num-cpus 2 --include-dashboard false --disable-usage-stats --block"
        self.process = subprocess.Popen(
            [str(script), "start", *options.split(), "--object-store-memory", "100000000"],
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 300
        while not self._has_node(script):
            assert self.process.poll() is None and time.monotonic() < deadline, "no cluster came up"
            time.sleep(1)

    def _has_node(self, script: Path) -> bool:
        command = [str(script), "health-check", "--address", self.address]
        environment = {**os.environ, **ENVIRONMENT}
        return subprocess.run(command, capture_output=True, env=environment).returncode == 0

    def stop(self) -> None:
        """End all of its processes."""
        processes = psutil.Process(self.process.pid).children(recursive=True)
        for one in (*processes, self.process):
            one.terminate()
        _, alive = psutil.wait_procs(processes, timeout=20)
        for one in alive:
            one.kill()
        self.process.wait(20)


@pytest.fixture(scope="module")
def cluster():
    started = Cluster()
    yield started
    started.stop()


@pytest.fixture
def slow_work(tmp_path):
    return partial(open_work, folder_of(tmp_path / "in", 47), 4, 0.1, None)


def wait_until(condition: Any, what: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@needs_ray
@pytest.mark.slow
def test_two_actors_and_a_plain_run_give_the_same_bytes(cluster, checkpoint, predict, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "UNIT_SIZE", 4)
    given = ["--dataset", folder_of(tmp_path / "in", 18), "--task", "panoptic", "--threshold", 0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as an actor with one CPU has: last digits of sums depend on it
    assert predict(*given, "--output", tmp_path / "plain") == 0
    torch.set_num_threads(threads)
    ray_options = ["--engine", "ray", "--address", cluster.address, "--actors", 2]
    assert predict(*given, *ray_options, "--output", tmp_path / "out") == 0
    plain = files_of(tmp_path / "plain")
    assert len(plain) == 5 and files_of(tmp_path / "out") == plain


@needs_ray
@pytest.mark.slow
def test_of_an_actor_that_is_killed_no_row_is_lost_and_none_is_there_twice(cluster, slow_work, tmp_path):
    output = tmp_path / "out"

    def kill_one() -> None:
        wait_until(lambda: len(list(output.glob("*.parquet"))) >= 3, "no unit was written")
        own = {str(os.getpid())}
        pids = {path.name.strip(".").split(".")[0] for path in (tmp_path / "in").glob(".*.pid")} - own
        killed.append(int(min(pids)))
        os.kill(killed[0], signal.SIGKILL)

    killed: list[int] = []
    killer = threading.Thread(target=kill_one)
    killer.start()
    counts = ray_run(slow_work, output, address=cluster.address, actors=2)
    killer.join()
    assert killed and not psutil.pid_exists(killed[0])
    found = files_of(output)
    assert found == plain_run(slow_work, tmp_path / "plain") and counts.images == 47
    ids = [row["image_id"] for name in found for row in parquet.read_table(output / name).to_pylist()]
    assert sorted(ids) == [f"{index:03d}.png" for index in range(47)]


@needs_ray
@pytest.mark.slow
def test_one_actor_ten_times_slower_takes_less_than_six_tenths_of_an_even_split(cluster, tmp_path):
    source, seconds = folder_of(tmp_path / "in", 48), 0.2
    work = partial(open_work, source, 4, seconds, tmp_path / "slow")
    opened, _, plan = partial(open_work, source, 4, seconds, None)(lambda part, length: None)
    started, first = time.monotonic(), []

    def progress(images: int) -> None:
        first.append(time.monotonic())  # loading the models is not what is measured

    segment_on_ray(
        work, opened, ParquetFolder(tmp_path / "out"), plan, RayOptions(cluster.address, 2), progress
    )
    wall = time.monotonic() - first[0] + 4 * seconds
    even = 24 * 10 * seconds
    said = f"dealt out: {wall:.1f} s, {first[0] - started:.1f} before; an even split: {even:.1f} s"
    sys.stdout.write(f"\n{said}\n")
    assert len(first) == 12
    assert wall < 0.6 * even, said


@needs_ray
@pytest.mark.slow
def test_after_the_cluster_was_stopped_the_same_command_goes_on(slow_work, tmp_path):
    cluster, output = Cluster(), tmp_path / "out"
    program = tmp_path / "run.py"
    program.write_text(
        "import sys\nfrom functools import partial\nfrom pathlib import Path\n"
        "from helpers.ray_work import open_work\nfrom prediction.test_ray import ray_run\n"
        f"work = partial(open_work, Path({str(tmp_path / 'in')!r}), 4, 0.1, None)\n"
        f"ray_run(work, Path({str(output)!r}), address={cluster.address!r}, actors=2)\n"
    )
    driver = subprocess.Popen(
        [sys.executable, str(program)],
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: len(list(output.glob("*.parquet"))) >= 3, "no unit was written")
    cluster.stop()
    assert driver.wait(120) != 0
    left = {path.name: path.read_bytes() for path in output.glob("*.parquet")}
    assert 3 <= len(left) < 12
    plain = plain_run(slow_work, tmp_path / "plain")
    again = Cluster()
    try:
        counts = ray_run(slow_work, output, address=again.address, actors=2)
    finally:
        again.stop()
    assert counts.images == 47 - sum(parquet.read_metadata(output / name).num_rows for name in left)
    assert files_of(output) == plain
