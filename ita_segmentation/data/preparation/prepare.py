"""Turns an official release into a `datasets` data set on disk: planned, written in parallel, published at once.

    output/README.md                                     the dataset card
    output/data/{split}-00000-of-000NN.parquet           what `ita_segmentation/data/prepared.py` describes
    output/data/.prepare.json                            what each file was made from
    output/.incomplete/                                  finished files while others are missing

A data set is seen whole or not at all: files are finished in `.incomplete/shards`, gathered in `.incomplete/data`, and
that folder is renamed to `data` in one step. A run that was killed, at any moment, goes on where it was; one that
finds everything done does nothing; one that finds some images changed writes the files with those again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from tqdm import tqdm

from ita_segmentation.data.benchmarks.release import Release
from ita_segmentation.data.preparation.card import SplitSize, dataset_card
from ita_segmentation.data.preparation.plan import (
    MANIFEST,
    Manifest,
    SplitPlan,
    WrittenShard,
    describe_shard,
    plan_split,
    read_manifest,
    schema_digest,
    shard_name,
)
from ita_segmentation.data.preparation.shard import Shard, features_of, write_shard
from ita_segmentation.data.prepared import UNFINISHED
from ita_segmentation.files import write_files

PROBLEMS_FILE = "problems.txt"


class PrepareError(Exception):
    """A data set that cannot be made, said in one line; `problems` has a line for each image that is to blame."""

    def __init__(self, message: str, problems: Sequence[str] = ()):
        super().__init__(message)
        self.problems = list(problems)


@dataclass(frozen=True)
class Preparation:
    """A data set that is wanted.

    Attributes:
        splits: those of the release's that are to be prepared.
        limit: the first so many images of each split; None for all.
        num_proc: processes that read and write.
    """

    benchmark: str
    release: Release
    source: Path
    output: Path
    splits: Sequence[str]
    limit: int | None = None
    num_proc: int = 1

    @property
    def data(self) -> Path:
        return self.output / "data"

    @property
    def work(self) -> Path:
        return self.output / UNFINISHED


@dataclass(frozen=True)
class Outcome:
    """What was done: the images of each split, and how many of them were written by this run."""

    num_images: Mapping[str, int]
    written: int


def prepare(wanted: Preparation) -> Outcome:
    """Makes a data set, or what is missing of it.

    Raises:
        ReleaseError: the source is not the release.
        PrepareError: images are missing or malformed (each is named in `problems` and in output/problems.txt), the
            output holds something else, or it cannot be written.
    """
    try:
        _finish_publishing(wanted)
        manifest = read_manifest(wanted.data)
        _check_output(wanted, manifest)
        plans = {
            split: plan_split(wanted.benchmark, wanted.release, wanted.source, split, wanted.limit)
            for split in wanted.splits
        }
        _check_schemas(wanted, plans, manifest)
        num_images = {split: plan.num_images for split, plan in plans.items()}
        (wanted.output / PROBLEMS_FILE).unlink(missing_ok=True)
        if manifest is not None and _up_to_date(wanted, plans, manifest):
            shutil.rmtree(wanted.work, ignore_errors=True)
            return Outcome(num_images, written=0)
        written = _write_missing(wanted, plans, manifest)
        _publish(wanted, plans, manifest)
        return Outcome(num_images, written)
    except BrokenProcessPool as error:
        raise PrepareError(
            "a process was ended from outside (out of memory?): finished files are kept, run again to go on"
        ) from error
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise PrepareError(f"{wanted.output} cannot be prepared: {error}") from error


# ------------------------------------------------------------------------------------------------------------
# Before writing


def _check_output(wanted: Preparation, manifest: Manifest | None) -> None:
    """Raises PrepareError if the output holds what would be lost."""
    output = wanted.output
    if output.resolve() == wanted.source.resolve():
        raise PrepareError(f"the output {output} is the source: choose another folder")
    if manifest is None:
        foreign = [name for name in ("data", "README.md") if (output / name).exists()]
        if foreign:
            raise PrepareError(
                f"{output}/{foreign[0]} was not made by run_prepare.py: choose another output, or remove it"
            )
        return
    if manifest.benchmark != wanted.benchmark:
        raise PrepareError(
            f"{output} holds {manifest.benchmark}: choose another output for {wanted.benchmark}"
        )
    for split in wanted.splits:
        before = manifest.limits.get(split, wanted.limit)
        if wanted.limit is not None and before != wanted.limit:
            raise PrepareError(
                f"{output} holds {split} with {'all images' if before is None else f'limit {before}'}: choose "
                f"another output for limit {wanted.limit}, or remove it"
            )


def _check_schemas(wanted: Preparation, plans: Mapping[str, SplitPlan], manifest: Manifest | None) -> None:
    """Raises PrepareError if the splits of the data set would differ in columns or classes."""
    digests = {split: schema_digest(plan.schema) for split, plan in plans.items()}
    if manifest is not None:
        digests |= {split: manifest.schema for split in manifest.splits if split not in plans}
    if len(set(digests.values())) > 1:
        raise PrepareError(
            f"the splits {', '.join(digests)} differ in classes or in whether there are segments: prepare them again "
            "together, or into folders of their own"
        )


def _up_to_date(wanted: Preparation, plans: Mapping[str, SplitPlan], manifest: Manifest) -> bool:
    """Whether the output has every file of the plans, and the card."""
    if not (wanted.output / "README.md").is_file():
        return False
    for split, plan in plans.items():
        files = manifest.splits.get(split, [])
        if [file.fingerprint for file in files] != [shard.fingerprint for shard in plan.shards]:
            return False
    return all(
        (wanted.data / file.name).is_file() and (wanted.data / file.name).stat().st_size == file.file_bytes
        for files in manifest.splits.values()
        for file in files
    )


# ------------------------------------------------------------------------------------------------------------
# Writing


def _write_missing(wanted: Preparation, plans: Mapping[str, SplitPlan], manifest: Manifest | None) -> int:
    """Finishes every shard of the plans in `.incomplete/shards`; returns the number of images written.

    Raises:
        PrepareError: some images are missing or malformed. Shards without such images are kept.
    """
    finished = wanted.work / "shards"
    finished.mkdir(parents=True, exist_ok=True)
    for leftover in finished.glob(".*.tmp"):
        leftover.unlink()
    _take_over(wanted, plans, manifest)
    missing = []
    for plan in plans.values():
        for shard in plan.shards:
            path = finished / f"{shard.fingerprint}.parquet"
            if not _is_finished(path, len(shard.items)):
                missing.append(
                    Shard(wanted.release, wanted.source, shard.items, path, plan.with_segments, plan.schema)
                )
    total = sum(plan.num_images for plan in plans.values())
    left = sum(len(shard.items) for shard in missing)
    with tqdm(total=total, initial=total - left, unit="image", desc=wanted.benchmark) as bar:
        problems = write_shards(missing, wanted.num_proc, bar)
    if problems:
        path = wanted.output / PROBLEMS_FILE
        write_files({path: ("\n".join(problems) + "\n").encode()})
        raise PrepareError(f"{len(problems):,} of {total:,} images cannot be used (all in {path})", problems)
    return left


def _take_over(wanted: Preparation, plans: Mapping[str, SplitPlan], manifest: Manifest | None) -> None:
    """Puts files of the published data set that are still good beside the finished shards."""
    good = {shard.fingerprint for plan in plans.values() for shard in plan.shards}
    for files in manifest.splits.values() if manifest is not None else ():
        for file in files:
            path = wanted.work / "shards" / f"{file.fingerprint}.parquet"
            if file.fingerprint in good and not path.exists() and (wanted.data / file.name).is_file():
                _link(wanted.data / file.name, path)


def _is_finished(path: Path, num_images: int) -> bool:
    with contextlib.suppress(OSError, pyarrow.ArrowInvalid):
        return describe_shard(path, path.name, "").num_images == num_images
    return False


def _link(path: Path, new: Path) -> None:
    """The same file under a second name, or a copy where the disk knows no second names."""
    try:
        os.link(path, new)
    except OSError:
        temporary = new.with_name(f".{new.name}.{os.getpid()}.tmp")
        shutil.copyfile(path, temporary)
        os.replace(temporary, new)


def write_shards(shards: Sequence[Shard], num_proc: int, bar: Any) -> list[str]:
    """Writes shards, in this process or in several; returns a line for each bad image, in order.

    Args:
        bar: a progress bar of images, with `update` and `n`.
    """
    if num_proc == 1 or len(shards) < 2:
        return [line for shard in shards for line in write_shard(shard, bar.update)]
    known = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in known else "spawn")
    context.set_forkserver_preload([__name__])
    counter = context.Value("q", bar.n)
    pool = ProcessPoolExecutor(min(num_proc, len(shards)), context, _start_worker, (counter,))
    try:
        futures = [pool.submit(_work, shard) for shard in shards]
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=0.2)
            if counter.value > bar.n:
                bar.update(counter.value - bar.n)
            for future in done:
                future.result()
        return [line for future in futures for line in future.result()]
    finally:
        pool.shutdown(cancel_futures=True)


_counter: Any = None  # in a worker: images read by all workers


def _start_worker(counter: Any) -> None:
    """Readies a process of the pool; it leaves at once when its parent does, however that ends."""
    global _counter
    _counter = counter
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _work(shard: Shard) -> list[str]:
    return write_shard(shard, _count_image)


def _count_image() -> None:
    with _counter.get_lock():
        _counter.value += 1


# ------------------------------------------------------------------------------------------------------------
# Publishing


def _publish(wanted: Preparation, plans: Mapping[str, SplitPlan], manifest: Manifest | None) -> None:
    """Gathers the finished shards, and the splits that stay as they are, and puts them in the place of `data`."""
    gathered = wanted.work / "data"
    shutil.rmtree(gathered, ignore_errors=True)
    gathered.mkdir()
    before = {} if manifest is None else manifest.splits
    known = dict.fromkeys([*wanted.release.splits, *before])
    splits: dict[str, Sequence[WrittenShard]] = {}
    for split in known:
        if split in plans:
            splits[split] = _gather(wanted, split, plans[split])
        elif split in before:
            splits[split] = before[split]
            for file in before[split]:
                _link(wanted.data / file.name, gathered / file.name)

    plan = next(iter(plans.values()))
    features = features_of(wanted.release, plan.with_segments)
    sizes = {name: _size(files) for name, files in splits.items()}
    write_files({wanted.work / "README.md": dataset_card(wanted.benchmark, wanted.release, features, sizes)})
    limits = {} if manifest is None else dict(manifest.limits)
    limits = {name: wanted.limit if name in plans else limits.get(name) for name in splits}
    ready = Manifest(wanted.benchmark, schema_digest(plan.schema), limits, splits)
    write_files({gathered / MANIFEST: ready.to_json()})
    _finish_publishing(wanted)
    shutil.rmtree(wanted.work)


def _gather(wanted: Preparation, split: str, plan: SplitPlan) -> list[WrittenShard]:
    """Gives a split's finished shards their names."""
    files = []
    for number, shard in enumerate(plan.shards):
        name = shard_name(split, number, len(plan.shards))
        path = wanted.work / "data" / name
        _link(wanted.work / "shards" / f"{shard.fingerprint}.parquet", path)
        files.append(describe_shard(path, name, shard.fingerprint))
    return files


def _size(files: Sequence[WrittenShard]) -> SplitSize:
    return SplitSize(
        sum(file.num_images for file in files),
        sum(file.file_bytes for file in files),
        sum(file.unpacked_bytes for file in files),
    )


def _finish_publishing(wanted: Preparation) -> None:
    """Puts gathered files in their place, if all are gathered; the steps may be interrupted and taken again."""
    gathered, card = wanted.work / "data", wanted.work / "README.md"
    if read_manifest(gathered) is not None:
        (wanted.output / "README.md").unlink(missing_ok=True)
        if wanted.data.exists():
            shutil.rmtree(wanted.work / "old", ignore_errors=True)
            os.rename(wanted.data, wanted.work / "old")
        os.rename(gathered, wanted.data)
    if card.exists() and not gathered.exists():
        os.replace(card, wanted.output / "README.md")
