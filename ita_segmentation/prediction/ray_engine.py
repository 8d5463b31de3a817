"""Ray as the scheduler of a dataset's units: actors on any number of machines segment them, this process writes them.

Each actor holds a model and opens the dataset by itself; what travels are the place of a unit, and its file's bytes on
the way back. An actor gets its next unit when it has done the one before, so a slow one holds up nobody. A unit whose
actor or machine is lost goes to another one; when there is nothing else left to begin, an idle actor repeats the unit
that has been running longest, and what is there first is written. Files are those of a run without Ray.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.prediction.dataset import DatasetCounts, ParquetFolder, ParquetSegmenter, unit_name
from ita_segmentation.prediction.rows import Place, Rows

MAX_LOSSES = 3
"""Of actors at one unit, or of one actor before it has segmented anything."""
SLOW = 2.0
"""A unit that runs this many times as long as one does on average is repeated by an idle actor."""

Plan = Mapping[str, Any]
OpenWork = Callable[[Callable[[int, int], None]], tuple[Rows, ParquetSegmenter, Plan]]
"""Opens the dataset and loads the model; is told what to call with the number of rows of a part."""


@dataclass(frozen=True)
class RayOptions:
    """How Ray is used.

    Attributes:
        address: of a cluster, as `ray.init` takes it; None starts Ray on this machine, unless `RAY_ADDRESS` is set.
        actors: how many; None for one for each GPU of the cluster, or for each `cpus` of its CPUs where it has none.
        cpus: CPUs of an actor.
    """

    address: str | None = None
    actors: int | None = None
    cpus: int = 1


@dataclass
class UnitResult:
    """What an actor did with a unit.

    Attributes:
        content: the bytes of its file; None where there is no such unit.
        counts: its images.
        lengths: numbers of rows of parts that the actor has come to know.
        problem: what stops everything, in one line.
    """

    content: bytes | None
    counts: DatasetCounts
    lengths: dict[int, int]
    problem: str | None = None


class UnitActor:
    """Segments units of a dataset, in a process of its own."""

    def __init__(self, open_work: OpenWork, plan: Plan):
        self._open_work, self._plan = open_work, dict(plan)
        self._work: tuple[Rows, ParquetSegmenter] | None = None
        self._lengths: dict[int, int] = {}

    def prepare(self) -> str | None:
        """Load the model and open the dataset. Returns what is wrong, in one line."""
        if self._work is not None:
            return None
        try:
            rows, worker, plan = self._open_work(self._lengths.__setitem__)
        except ITAError as error:
            return one_line(error)
        plan = {**rows.description, **plan}
        other = sorted(key for key in {*plan, *self._plan} if plan.get(key) != self._plan.get(key))
        if other:
            return (
                f"a machine of the cluster has another dataset or checkpoint (different: {', '.join(other)})"
            )
        self._work = rows, worker
        return None

    def segment(self, part: int, number: int) -> UnitResult:
        """Segment a unit, after `prepare`."""
        assert self._work is not None
        rows, worker = self._work
        try:
            unit = rows.unit(part, number)
            content, counts = (None, DatasetCounts()) if unit is None else worker.segment(unit)
        except ITAError as error:
            return UnitResult(None, DatasetCounts(), {}, one_line(error))
        lengths = dict(self._lengths)
        self._lengths.clear()
        return UnitResult(content, counts, lengths)


class UnitQueue:
    """The units that are still to be done, those that are running, and what became of them."""

    def __init__(
        self, rows: Rows, is_done: Callable[[int, int], bool], clock: Callable[[], float] = time.monotonic
    ):
        self._rows, self._is_done, self._clock = rows, is_done, clock
        self._waiting: Iterator[Place] = rows.places(is_done)
        self._again: deque[Place] = deque()
        self._started: dict[Place, float] = {}
        self._running: Counter[Place] = Counter()
        self._lost: Counter[Place] = Counter()
        self._seconds: list[float] = []

    @property
    def is_running(self) -> bool:
        """Whether a unit is being segmented."""
        return bool(self._running)

    def take(self) -> Place | None:
        """Return a unit for an idle actor, None where there is none at the moment."""
        place = self._again.popleft() if self._again else next(self._waiting, None)
        if place is None:
            place = self._slowest()
        else:
            self._started[place] = self._clock()
        if place is not None:
            self._running[place] += 1
        return place

    def _slowest(self) -> Place | None:
        """The unit that has been running longest, alone, and for too long."""
        alone = [place for place, actors in self._running.items() if actors == 1]
        oldest = min(alone, key=self._started.__getitem__, default=None)
        if oldest is None or not self._seconds:
            return None
        limit = SLOW * sum(self._seconds) / len(self._seconds)
        return oldest if self._clock() - self._started[oldest] > limit else None

    def finish(self, place: Place) -> bool:
        """Note that a unit was segmented. Returns whether it is the first time."""
        if place not in self._running:
            return False
        del self._running[place]
        self._seconds.append(self._clock() - self._started.pop(place))
        following = self._rows.place_after(place, self._is_done)
        if following is not None:
            self._again.appendleft(following)
        return True

    def lose(self, place: Place, reason: str) -> None:
        """Note that an actor was lost with a unit."""
        if place not in self._running:
            return
        self._lost[place] += 1
        if self._lost[place] >= MAX_LOSSES:
            raise ITAError(f"unit {unit_name(*place)} was lost {MAX_LOSSES} times with its process: {reason}")
        self._running[place] -= 1
        if not self._running[place]:
            del self._running[place]
            self._again.appendleft(place)


def segment_on_ray(
    open_work: OpenWork,
    rows: Rows,
    folder: ParquetFolder,
    plan: Plan,
    options: RayOptions,
    progress: Callable[[int], object] = lambda images: None,
) -> DatasetCounts:
    """Segment a dataset on a Ray cluster.

    Args:
        open_work: gives an actor the dataset, what segments it, and its plan.
        rows: the dataset, as this process sees it.
        folder: where results go; only this process writes there.
        plan: what decides the results, as for `segment_dataset`.
        options: how Ray is used.
        progress: called with the number of images done since it was called last.

    Raises:
        ITAError: Ray is missing or cannot be reached, or what stops everything; files that are done stay.
    """
    ray = import_ray()
    plan = {**rows.description, **plan}
    folder.begin(plan)
    if next(rows.places(folder.is_done), None) is None:
        return DatasetCounts()
    try:
        # Without an address Ray would join any cluster that happens to run on this machine.
        address = options.address or os.environ.get("RAY_ADDRESS") or "local"
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except Exception as error:
        raise ITAError(f"no Ray cluster can be reached or started: {one_line(error, 200)}") from error
    try:
        run = _Run(ray, UnitQueue(rows, folder.is_done), folder, progress)
        return run.run(_actors(ray, open_work, plan, options))
    except ray.exceptions.RayTaskError:  # not foreseen: its traceback says where
        raise
    except ray.exceptions.RayError as error:
        raise ITAError(
            f"the Ray cluster was lost: {one_line(error, 200)}; the same command goes on"
        ) from error
    finally:
        ray.shutdown()


def import_ray() -> Any:
    """Import Ray."""
    try:
        import ray
    except ImportError as error:
        raise ITAError("--engine ray needs Ray: pip install 'ita-segmentation[ray]'") from error
    return ray


def _actors(ray: Any, open_work: Any, plan: Plan, options: RayOptions) -> list[Any]:
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    count = options.actors or gpus or cpus // options.cpus
    if count == 0:
        raise ITAError(f"the Ray cluster has {cpus} CPUs, and an actor needs {options.cpus}")
    kind = ray.remote(max_restarts=-1, num_cpus=options.cpus, num_gpus=1 if gpus else 0)(UnitActor)
    return [kind.remote(open_work, plan) for _ in range(count)]


class _Run:
    """Deals units to actors until all are done."""

    def __init__(self, ray: Any, queue: UnitQueue, folder: ParquetFolder, progress: Callable[[int], object]):
        self._ray, self._queue, self._folder, self._progress = ray, queue, folder, progress
        self._tasks: dict[Any, tuple[Any, Place | None]] = {}
        self._idle: list[Any] = []
        self._losses: Counter[Any] = Counter()
        self._total = DatasetCounts()

    def run(self, actors: list[Any]) -> DatasetCounts:
        """Deal until all units are done."""
        for actor in actors:
            self._prepare(actor)
        while True:
            self._deal()
            if self._idle and not self._queue.is_running:
                return self._total
            if not self._tasks:
                raise ITAError("no actor of the Ray cluster could be started")
            done, _ = self._ray.wait(list(self._tasks), timeout=1.0)
            for task in done:
                self._end(task, *self._tasks.pop(task))

    def _prepare(self, actor: Any) -> None:
        self._tasks[actor.prepare.options(max_task_retries=MAX_LOSSES).remote()] = (actor, None)

    def _deal(self) -> None:
        """Give each idle actor a unit, as far as there are any."""
        for actor in tuple(self._idle):
            place = self._queue.take()
            if place is None:
                return
            self._idle.remove(actor)
            self._tasks[actor.segment.remote(*place)] = (actor, place)

    def _end(self, task: Any, actor: Any, place: Place | None) -> None:
        """Take what an actor has done; what is lost with it is dealt again, and it is prepared anew."""
        errors = self._ray.exceptions
        try:
            result = self._ray.get(task)
        except (errors.RayActorError, errors.ObjectLostError) as error:
            reason = one_line(error, 200)
            if place is not None:
                self._queue.lose(place, reason)
            self._losses[actor] += 1
            if self._losses[actor] < MAX_LOSSES:
                self._prepare(actor)
            elif not self._tasks and not self._idle:
                raise ITAError(f"no actor of the Ray cluster stays alive: {reason}") from error
            return
        if place is None:
            if result is not None:
                raise ITAError(result)
        else:
            self._losses[actor] = 0
            self._keep(place, result)
        self._idle.append(actor)

    def _keep(self, place: Place, result: UnitResult) -> None:
        if result.problem is not None:
            raise ITAError(result.problem)
        for part, length in result.lengths.items():
            self._folder.note_length(part, length)
        if self._queue.finish(place) and result.content is not None:
            self._folder.write(*place, result.content)
            self._total += result.counts
            self._progress(result.counts.images)
