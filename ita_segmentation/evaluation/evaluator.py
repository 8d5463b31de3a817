"""Run a predictor over a benchmark: on one process or several, in one go or in several.

Images are divided into batches first; batches are distributed over processes and done in any order. So neither the
number of processes nor an interruption changes the scores, to the last bit.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.evaluation.benchmarks import Benchmark
from ita_segmentation.evaluation.predictors import Predictor
from ita_segmentation.evaluation.resume import ResumeStore
from ita_segmentation.evaluation.scores import BenchmarkScores
from ita_segmentation.images import DECODING_ERRORS


@dataclass(frozen=True)
class EvalConfig:
    """How a benchmark is evaluated.

    Attributes:
        tasks: what is scored.
        batch_size: images at a time.
        limit: evaluate only the first images; None for all.
        num_workers: threads that decode images while the model computes.
    """

    tasks: frozenset[str] = frozenset({"semantic"})
    batch_size: int = 1
    limit: int | None = None
    num_workers: int = 2


def evaluate_benchmark(
    predictor: Predictor,
    benchmark: Benchmark,
    config: EvalConfig,
    store: ResumeStore | None = None,
    title: str = "",
) -> BenchmarkScores | None:
    """Score a predictor, the same on every process, on a benchmark.

    Args:
        predictor: what is scored.
        benchmark: the images with labels.
        config: what is scored, and how.
        store: where counts are saved from time to time, and read by the next run; None saves nothing.
        title: label of the progress bar.

    Returns:
        the scores on the main process; None on the others.

    Raises:
        ITAError: there is no labeled pixel, or an image or its labels cannot be scored.
    """
    state = PartialState()
    count = benchmark.num_images if config.limit is None else min(config.limit, benchmark.num_images)
    if count == 0:
        raise ITAError(f"{title or 'the benchmark'} has no images")
    batches = [
        range(start, min(start + config.batch_size, count)) for start in range(0, count, config.batch_size)
    ]
    done, earlier = set[int](), list[dict[str, np.ndarray]]()
    if store is not None and state.is_main_process:
        done, earlier = store.read()
    [done] = broadcast_object_list([done])
    own = [number for number in range(len(batches)) if number not in done]
    own = own[state.process_index :: state.num_processes]
    scores = BenchmarkScores(len(benchmark.classes), benchmark.ignore_index, benchmark.is_thing, config.tasks)
    quiet = not state.is_main_process
    with tqdm(total=len(batches), initial=len(done), desc=title, unit="batch", disable=quiet) as bar:
        mine = {number: batches[number] for number in own}
        for finished in _count(predictor, benchmark, config, mine, scores):
            if store is not None and (store.due() or len(finished) == len(own)):
                store.write(finished, scores.arrays())
            bar.update(min(state.num_processes, len(batches) - bar.n))
    gathered = gather_object([scores.arrays()])
    if not state.is_main_process:
        return None
    total = BenchmarkScores(len(benchmark.classes), benchmark.ignore_index, benchmark.is_thing, config.tasks)
    for part in [*earlier, *gathered]:
        total.merge(part)
    if "semantic" in config.tasks and not total.confusion.matrix.any():
        raise ITAError(f"{title or 'the benchmark'} has no labeled pixel: every label is ignored")
    return total


def _count(
    predictor: Predictor,
    benchmark: Benchmark,
    config: EvalConfig,
    batches: dict[int, range],
    scores: BenchmarkScores,
) -> Iterator[list[int]]:
    """Count one batch after the other; yield the numbers of those that are done."""
    finished: list[int] = []
    samples = _decode_ahead(benchmark, [index for batch in batches.values() for index in batch], config)
    for number, batch in batches.items():
        some = list(islice(samples, len(batch)))
        if len(some) < len(batch):
            raise ITAError(f"the dataset ends before image {batch[-1] + 1}, which its metadata promises")
        sizes = [sample["label"].shape for sample in some]
        try:
            predictions = predictor([sample["image"] for sample in some], sizes, config.tasks)
        except ValueError as error:
            raise ITAError(f"image {some[0]['image_id']} cannot be segmented: {one_line(error)}") from error
        for index, sample, prediction in zip(batch, some, predictions, strict=True):
            try:
                scores.update(index, sample, prediction)
            except ValueError as error:
                raise ITAError(f"image {sample['image_id']}: {one_line(error)}") from error
        finished.append(number)
        yield finished


def _decode_ahead(
    benchmark: Benchmark, indices: Sequence[int], config: EvalConfig
) -> Iterator[dict[str, Any]]:
    """Yield the samples with these indices, in order, decoded by threads slightly before they are needed."""
    waiting: deque[Future] = deque()
    ahead = config.batch_size + config.num_workers
    with ThreadPoolExecutor(config.num_workers) as pool:
        for row in benchmark.rows_at(indices):
            waiting.append(pool.submit(decode_sample, benchmark, row))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def decode_sample(benchmark: Benchmark, row: Any) -> dict[str, Any]:
    """Decode one image and its labels; ITAError names an image that cannot be read or whose labels differ in size."""
    name = row.get("image_id", "?") if isinstance(row, dict) else "?"
    try:
        return benchmark.decode(row)
    except DECODING_ERRORS as error:
        raise ITAError(f"image {name} cannot be scored: {one_line(error, 160)}") from error
