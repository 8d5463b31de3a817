"""Runs a predictor over a benchmark: on one process or several, in one go or in several.

Images are cut into batches once and for all; batches are dealt out to processes and done in any order. So the
number of processes, an interruption and the place where it came leave the scores as they are, to the last bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.evaluation.benchmarks import Benchmark
from ita_segmentation.evaluation.predictors import Predictor
from ita_segmentation.evaluation.progress import Progress
from ita_segmentation.evaluation.scores import BenchmarkScores
from ita_segmentation.images import DECODING_ERRORS


@dataclass(frozen=True)
class Workload:
    """How the work is cut.

    Attributes:
        batch_size: images at a time.
        limit: only so many images, from the first; None for all.
        num_workers: threads that decode images while the model computes.
    """

    batch_size: int = 1
    limit: int | None = None
    num_workers: int = 2


def evaluate_benchmark(
    predictor: Predictor,
    benchmark: Benchmark,
    tasks: frozenset[str],
    workload: Workload,
    progress: Progress,
    title: str = "",
) -> BenchmarkScores | None:
    """Scores of a predictor on a benchmark.

    Args:
        predictor: on every process alike.
        tasks: what is scored.
        progress: where counts are kept from time to time, and taken up again.
        title: what the progress bar is called.

    Returns:
        the scores, on the main process; None on the others.

    Raises:
        ITAError: an image or its labels cannot be scored.
    """
    state = PartialState()
    count = benchmark.num_images if workload.limit is None else min(workload.limit, benchmark.num_images)
    batches = range(-(-count // workload.batch_size))
    earlier, done = _take_up(benchmark, tasks, progress, state)
    own = [number for number in batches if number not in done][state.process_index :: state.num_processes]
    scores = BenchmarkScores(len(benchmark.classes), benchmark.ignore_index, benchmark.is_thing, tasks)
    bar = tqdm(
        total=len(batches),
        initial=len(done),
        desc=title,
        unit="batch",
        disable=not state.is_main_process,
    )
    with bar:
        work = _Work(predictor, benchmark, tasks, workload, count, own)
        for finished in work.counted(scores):
            if progress.due() or len(finished) == len(own):
                progress.write(finished, scores.state_dict())
            bar.update(min(state.num_processes, len(batches) - bar.n))
    parts = gather_object([scores.state_dict()])
    if not state.is_main_process:
        return None
    for part in parts:
        loaded = BenchmarkScores(*scores.arguments)
        loaded.load_state_dict(part)
        earlier = earlier + loaded
    return earlier


def _take_up(
    benchmark: Benchmark, tasks: frozenset[str], progress: Progress, state: PartialState
) -> tuple[BenchmarkScores, set[int]]:
    """What an interrupted run had counted (on the main process), and the numbers of its batches (on all)."""
    total = BenchmarkScores(len(benchmark.classes), benchmark.ignore_index, benchmark.is_thing, tasks)
    done: set[int] = set()
    if state.is_main_process:
        done, parts = progress.read()
        for part in parts:
            loaded = BenchmarkScores(*total.arguments)
            loaded.load_state_dict(part)
            total = total + loaded
    shared = [done]
    broadcast_object_list(shared)
    return total, shared[0]


@dataclass(frozen=True)
class _Work:
    """The batches of one process."""

    predictor: Predictor
    benchmark: Benchmark
    tasks: frozenset[str]
    workload: Workload
    count: int
    batches: Sequence[int]

    def counted(self, scores: BenchmarkScores) -> Iterator[list[int]]:
        """Adds one batch after the other to `scores`, and yields the batches that are in."""
        finished: list[int] = []
        numbers = [number for batch in self.batches for number in self._members(batch)]
        samples = self._decoded(numbers)
        for batch in self.batches:
            members = self._members(batch)
            some = list(islice(samples, len(members)))
            if len(some) < len(members):
                raise ITAError(
                    f"the data set ends before image {members[-1] + 1} of the {self.count} that it promises"
                )
            sizes = [sample["label"].shape for sample in some]
            predictions = self.predictor([sample["image"] for sample in some], sizes, self.tasks)
            for number, sample, prediction in zip(members, some, predictions, strict=True):
                try:
                    scores.update(number, sample, prediction)
                except ValueError as error:
                    raise ITAError(f"image {sample['image_id']}: {one_line(error)}") from error
            finished.append(batch)
            yield finished

    def _members(self, batch: int) -> range:
        size = self.workload.batch_size
        return range(batch * size, min((batch + 1) * size, self.count))

    def _decoded(self, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The samples with these numbers, in order, decoded by threads a little ahead of their use."""
        waiting: deque[Future] = deque()
        ahead = self.workload.batch_size + self.workload.num_workers
        with ThreadPoolExecutor(self.workload.num_workers) as pool:
            for row in self.benchmark.samples(numbers):
                waiting.append(pool.submit(decoded, self.benchmark, row))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()


def decoded(benchmark: Benchmark, row: Any) -> dict[str, Any]:
    """One image and its labels.

    Raises:
        ITAError: they cannot be read, or are not of one size; the message names the image.
    """
    name = row.get("image_id", "?") if isinstance(row, dict) else "?"
    try:
        return benchmark.decode(row)
    except DECODING_ERRORS as error:
        raise ITAError(f"image {name} cannot be scored: {one_line(error, 160)}") from error
