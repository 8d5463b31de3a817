"""Convert an official release to a `datasets` dataset on disk (the format is described in `prepared.py`).

    output/README.md                                the dataset card
    output/data/{split}-00000-of-000NN.parquet      the shards
    output/data/.prepare.json                       the benchmark, and the fingerprint of each shard
    output/.incomplete/                             finished shards while others are missing

A fingerprint covers everything that determines a shard's content. A run writes the shards whose fingerprint it does
not find, so it resumes after it was killed, does nothing where nothing changed, and rewrites only what did. When all
shards are finished they are linked into a folder that takes the place of `data` by renaming: a dataset is complete or
absent at any moment. `datasets`' own builder starts again after it was killed and stops at the first bad image.
"""

import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet
from tqdm import tqdm

from ita_segmentation.data.benchmarks.base import ImageEntry, SourceDataset
from ita_segmentation.data.dataset_card import dataset_card
from ita_segmentation.data.encoding import encode_row, features_of
from ita_segmentation.data.prepared import INCOMPLETE, columns_of
from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.files import atomic_path, write_files

IMAGES_PER_SHARD = 128
ROWS_PER_GROUP = 32
MANIFEST = ".prepare.json"
PROBLEMS_FILE = "problems.txt"
Manifest = Mapping[str, Mapping[str, str]]  # for each split, the names of its shards and their fingerprints


class PrepareError(ITAError):
    """Images that are missing or malformed; `problems` has one line for each."""

    def __init__(self, message: str, problems: Sequence[str]):
        super().__init__(message)
        self.problems = list(problems)


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare: the first `limit` images of some splits; other splits in the output are kept."""

    benchmark: str
    dataset: SourceDataset
    source: Path
    output: Path
    splits: Sequence[str]
    limit: int | None = None
    num_proc: int = 1

    @property
    def data(self) -> Path:
        """The folder of the finished shards."""
        return self.output / "data"

    @property
    def work(self) -> Path:
        """The folder of an unfinished run."""
        return self.output / INCOMPLETE


@dataclass(frozen=True)
class PrepareResult:
    """The number of images of each split, and how many of them this run wrote."""

    num_images: Mapping[str, int]
    written: int


@dataclass(frozen=True)
class Shard:
    """One parquet file of `data` to write; the fingerprint digests everything that determines its content."""

    name: str
    fingerprint: str
    entries: Sequence[ImageEntry]
    schema: pyarrow.Schema


def prepare(config: PrepareConfig) -> PrepareResult:
    """Prepare a dataset, or what is missing of it.

    Raises:
        PrepareError: if images are missing or malformed; all are named in `problems` and in output/problems.txt.
        ITAError: if the source is not the release, or the output contains something else or cannot be written.
    """
    try:
        _replace_data(config)
        manifest = _read_manifest(config)
        plan = {split: plan_split(config, split) for split in config.splits}
        _check_plan(config, plan, manifest)
        (config.output / PROBLEMS_FILE).unlink(missing_ok=True)
        written = 0
        if not _is_up_to_date(config, plan, manifest):
            written = _write_missing(config, plan, manifest)
            _commit(config, plan, manifest)
        card = dataset_card(config.benchmark, config.dataset, config.data, _read_manifest(config))
        path = config.output / "README.md"
        if not path.is_file() or path.read_bytes() != card:
            write_files({path: card})
        shutil.rmtree(config.work, ignore_errors=True)
    except BrokenProcessPool as error:
        raise ITAError(
            "a worker process was killed (out of memory?); finished shards are kept: run again to continue"
        ) from error
    except (OSError, pyarrow.ArrowException) as error:
        raise ITAError(f"{config.output} cannot be prepared: {one_line(error)}") from error
    num_images = {split: sum(len(shard.entries) for shard in shards) for split, shards in plan.items()}
    return PrepareResult(num_images, written)


# ------------------------------------------------------------------------------------------------------------
# Plan


def plan_split(config: PrepareConfig, split: str) -> list[Shard]:
    """List the images of a split and distribute them among shards."""
    dataset = config.dataset
    entries = dataset.index(config.source, split)[: config.limit]
    if not entries:
        raise ITAError(f"{config.source} has no images of {split}: expected {dataset.layout}")
    schema = features_of(dataset, entries[0].has_segments).arrow_schema
    common = schema.serialize().to_pybytes() + code_digest(type(dataset).__module__).encode()
    starts = range(0, len(entries), IMAGES_PER_SHARD)
    shards = []
    for number, start in enumerate(starts):
        part = entries[start : start + IMAGES_PER_SHARD]
        digest = hashlib.sha256(config.benchmark.encode() + common)
        for entry in part:
            files = [_size_and_date(config.source / name) for name in entry.files]
            digest.update(repr((entry, files)).encode())
        name = f"{split}-{number:05d}-of-{len(starts):05d}.parquet"
        shards.append(Shard(name, digest.hexdigest(), part, schema))
    return shards


def _size_and_date(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=16)
def code_digest(module: str) -> str:
    """Digest the code that reads releases and writes shards, and the module of one release."""
    here = Path(__file__)
    paths = {here, here.with_name("encoding.py"), *here.parent.glob("benchmarks/*.py")}
    paths.add(Path(str(sys.modules[module].__file__)))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(paths))).hexdigest()


def _read_manifest(config: PrepareConfig) -> Manifest:
    """Read the manifest of the output, empty for a new one; ITAError if something else would be lost."""
    if config.output.resolve() == config.source.resolve():
        raise ITAError(f"the output {config.output} is the source: choose another folder")
    try:
        content = json.loads((config.data / MANIFEST).read_text(encoding="utf-8"))
        benchmark = content["benchmark"]
        splits = {
            split: {row["name"]: row["fingerprint"] for row in rows}
            for split, rows in content["splits"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        foreign = [name for name in ("data", "README.md") if (config.output / name).exists()]
        if foreign:
            raise ITAError(
                f"{config.output / foreign[0]} was not made by ita prepare: choose another output, or remove it"
            ) from None
        return {}
    if benchmark != config.benchmark:
        raise ITAError(f"{config.output} holds {benchmark}: choose another output for {config.benchmark}")
    return splits


def _check_plan(config: PrepareConfig, plan: Mapping[str, Sequence[Shard]], manifest: Manifest) -> None:
    """Raise `ITAError` if images would be lost, or if splits would differ in columns or classes."""
    columns = {split: columns_of(shards[0].schema) for split, shards in plan.items()}
    for split, shards in manifest.items():
        readable = [name for name in shards if _num_rows(config.data / name)]
        if split not in plan and readable:
            columns[split] = columns_of(pyarrow.parquet.read_schema(config.data / readable[0]))
        elif config.limit is not None and split in plan:
            found = sum(_num_rows(config.data / name) for name in readable)
            if found > sum(len(shard.entries) for shard in plan[split]):
                raise ITAError(
                    f"{config.output} holds {split} with {found:,} images: choose another output for "
                    f"--limit {config.limit}, or remove it"
                )
    if len(set(columns.values())) > 1:
        raise ITAError(
            f"the splits {', '.join(columns)} differ in classes or in whether there are segments: prepare them "
            "together, or into folders of their own"
        )


def _num_rows(path: Path) -> int:
    """Read the number of rows of a parquet file; 0 if it is missing, empty or truncated."""
    try:
        return pyarrow.parquet.read_metadata(path).num_rows
    except (OSError, pyarrow.ArrowException):
        return 0


def _is_up_to_date(config: PrepareConfig, plan: Mapping[str, Sequence[Shard]], manifest: Manifest) -> bool:
    planned = {split: {shard.name: shard.fingerprint for shard in shards} for split, shards in plan.items()}
    return all(manifest.get(split) == shards for split, shards in planned.items()) and all(
        _num_rows(config.data / shard.name) == len(shard.entries)
        for shards in plan.values()
        for shard in shards
    )


# ------------------------------------------------------------------------------------------------------------
# Write


def _write_missing(config: PrepareConfig, plan: Mapping[str, Sequence[Shard]], manifest: Manifest) -> int:
    """Finish all shards of the plan that have no bad image; return the number of images written."""
    shards = [shard for split in plan.values() for shard in split]
    _finished(config, "").parent.mkdir(parents=True, exist_ok=True)
    for leftover in _finished(config, "").parent.glob(".*.tmp"):
        leftover.unlink()
    planned = {shard.fingerprint for shard in shards}
    for name, fingerprint in [item for split in manifest.values() for item in split.items()]:
        path = _finished(config, fingerprint)
        if fingerprint in planned and not _num_rows(path) and _num_rows(config.data / name):
            path.unlink(missing_ok=True)
            _link(config.data / name, path)

    missing = [s for s in shards if _num_rows(_finished(config, s.fingerprint)) != len(s.entries)]
    total, left = (sum(len(shard.entries) for shard in some) for some in (shards, missing))
    with tqdm(total=total, initial=total - left, unit="image", desc=config.benchmark) as bar:
        problems = _write_shards(config, missing, bar)
    if problems:
        path = config.output / PROBLEMS_FILE
        write_files({path: "\n".join([*problems, ""]).encode(errors="backslashreplace")})
        raise PrepareError(f"{len(problems):,} of {total:,} images cannot be used (all in {path})", problems)
    for split, of_split in plan.items():
        if not any(_has_labels(_finished(config, shard.fingerprint)) for shard in of_split):
            raise ITAError(f"all labels of {split} are ignored: do the label values match the class names?")
    return left


def _finished(config: PrepareConfig, fingerprint: str) -> Path:
    return config.work / "shards" / f"{fingerprint}.parquet"


def _link(path: Path, new: Path) -> None:
    """Make a hard link, or a copy where the file system has no links."""
    try:
        os.link(path, new)
    except OSError:
        with atomic_path(new) as temporary:
            shutil.copyfile(path, temporary)


def _has_labels(path: Path) -> bool:
    classes = pyarrow.parquet.read_table(path, columns=["classes"])["classes"]
    return pyarrow.compute.sum(pyarrow.compute.list_value_length(classes)).as_py() > 0


def _write_shards(config: PrepareConfig, shards: Sequence[Shard], bar: Any) -> list[str]:
    """Write shards in this process or in several; return one line for each bad image, in order."""
    if config.num_proc == 1 or len(shards) < 2:
        problems = []
        for shard in shards:
            problems += write_shard(config, shard)
            bar.update(len(shard.entries))
        return problems
    pool = ProcessPoolExecutor(
        min(config.num_proc, len(shards)), multiprocessing.get_context("spawn"), _start_worker
    )
    try:
        futures = {pool.submit(write_shard, config, shard): shard for shard in shards}
        for future in as_completed(futures):
            future.result()
            bar.update(len(futures[future].entries))
        return [line for future in futures for line in future.result()]
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Let a worker process end at an interrupt, and when its parent has been killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def exit_with_parent() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def write_shard(config: PrepareConfig, shard: Shard) -> list[str]:
    """Write a shard if all of its images are good; return one line for each that is not, in order."""
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    has_segments = "panoptic" in shard.schema.names
    for entry in shard.entries:
        try:
            rows.append(encode_row(config.dataset, config.dataset.read(config.source, entry), has_segments))
        except ITAError as error:
            problems.append(str(error))
    if not problems:
        table = pyarrow.Table.from_pylist(rows, shard.schema)
        with atomic_path(_finished(config, shard.fingerprint)) as path:
            pyarrow.parquet.write_table(
                table, path, row_group_size=ROWS_PER_GROUP, use_dictionary=False, write_statistics=False
            )
    return problems


# ------------------------------------------------------------------------------------------------------------
# Commit


def _commit(config: PrepareConfig, plan: Mapping[str, Sequence[Shard]], manifest: Manifest) -> None:
    """Link the finished shards, and the shards of other splits, into a folder and put it in the place of `data`."""
    gathered = config.work / "gathered"
    shutil.rmtree(gathered, ignore_errors=True)
    gathered.mkdir()
    splits: dict[str, dict[str, str]] = {}
    for split in dict.fromkeys([*config.dataset.splits, *manifest]):
        if split in plan:
            splits[split] = {shard.name: shard.fingerprint for shard in plan[split]}
            for name, fingerprint in splits[split].items():
                _link(_finished(config, fingerprint), gathered / name)
        elif split in manifest:
            splits[split] = dict(manifest[split])
            for name in splits[split]:
                _link(config.data / name, gathered / name)
    rows = {
        split: [{"name": name, "fingerprint": fingerprint} for name, fingerprint in shards.items()]
        for split, shards in splits.items()
    }
    content = json.dumps({"benchmark": config.benchmark, "splits": rows}, indent=1)
    (gathered / MANIFEST).write_text(content + "\n", encoding="utf-8")
    os.replace(gathered, config.work / "data")
    _replace_data(config)


def _replace_data(config: PrepareConfig) -> None:
    """Move a complete new `data` folder into its place. Run again, it goes on where it was interrupted."""
    if (config.work / "data").exists():
        if config.data.exists():
            shutil.rmtree(config.work / "old", ignore_errors=True)
            os.replace(config.data, config.work / "old")
        os.replace(config.work / "data", config.data)
