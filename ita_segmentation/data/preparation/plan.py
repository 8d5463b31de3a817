"""What a prepared data set will consist of: files of so many images each, known by what goes into them.

A shard's fingerprint covers everything that decides its bytes: the benchmark's classes, the code that reads and
writes, the shard's part of the index, and the size and date of each file that this part names. A file that is there
under its fingerprint need not be written again; one whose source has changed has another fingerprint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from ita_segmentation.data.benchmarks.release import Release, ReleaseError
from ita_segmentation.data.preparation.shard import features_of

IMAGES_PER_SHARD = 128
MANIFEST = ".prepare.json"
"""In the folder `data` of a prepared data set: what `read_manifest` reads."""
PROBED = 20  # images that are tried until one tells whether the release has segments


@dataclass(frozen=True)
class PlannedShard:
    """A part of a split's index and its fingerprint (hexadecimal)."""

    items: Sequence[Any]
    fingerprint: str


@dataclass(frozen=True)
class SplitPlan:
    """A split that is to be prepared."""

    shards: Sequence[PlannedShard]
    with_segments: bool
    schema: pyarrow.Schema

    @property
    def num_images(self) -> int:
        return sum(len(shard.items) for shard in self.shards)


@dataclass(frozen=True)
class WrittenShard:
    """A file of a prepared data set: its name in `data`, and what is known of it."""

    name: str
    fingerprint: str
    num_images: int
    file_bytes: int
    unpacked_bytes: int


@dataclass(frozen=True)
class Manifest:
    """What a prepared data set consists of.

    Attributes:
        schema: digest of the columns and classes, the same in all splits.
        limits: the number of images that each split was limited to.
        splits: the files of each split, in order.
    """

    benchmark: str
    schema: str
    limits: Mapping[str, int | None]
    splits: Mapping[str, Sequence[WrittenShard]]

    def to_json(self) -> bytes:
        return (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode()


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in a folder of parquet files; None if there is none that can be read."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        splits = {name: [WrittenShard(**row) for row in rows] for name, rows in content["splits"].items()}
        return Manifest(content["benchmark"], content["schema"], content["limits"], splits)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def plan_split(benchmark: str, release: Release, source: Path, split: str, limit: int | None) -> SplitPlan:
    """Lists a split's images and shares them out among shards.

    Raises:
        ReleaseError: the folder is not the release, or the split has no images.
    """
    items = list(release.index(source, split))[:limit]
    if not items:
        raise ReleaseError(f"{source} has no images of {split}: expected {release.layout}")
    with_segments = release.has_segments and _has_segments(release, source, items)
    schema = features_of(release, with_segments).arrow_schema
    common = f"{benchmark} {schema_digest(schema)} {code_digest(type(release).__module__)}"
    shards = []
    for start in range(0, len(items), IMAGES_PER_SHARD):
        some = items[start : start + IMAGES_PER_SHARD]
        digest = hashlib.sha256(common.encode())
        for item in some:
            digest.update(repr((item, files_of(source, item))).encode())
        shards.append(PlannedShard(some, digest.hexdigest()))
    return SplitPlan(shards, with_segments, schema)


def _has_segments(release: Release, source: Path, items: Sequence[Any]) -> bool:
    """Whether the first image that can be read has a panoptic map."""
    for item in items[:PROBED]:
        with contextlib.suppress(ReleaseError):
            return release.read(source, item).panoptic is not None
    return True


def files_of(source: Path, item: Any) -> list[tuple[str, int, int]]:
    """Name, size in bytes and date in nanoseconds of each file that an item of an index names."""
    found = []
    for name in _strings(item):
        with contextlib.suppress(OSError, ValueError):
            status = (source / name).stat()
            if stat.S_ISREG(status.st_mode):
                found.append((name, status.st_size, status.st_mtime_ns))
    return found


def _strings(value: Any) -> Iterator[str]:
    """The strings in plain values and dataclasses, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _strings(part)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _strings(getattr(value, field.name))


def schema_digest(schema: pyarrow.Schema) -> str:
    """Hexadecimal digest of columns and class names."""
    return hashlib.sha256(schema.serialize().to_pybytes()).hexdigest()


@lru_cache(maxsize=16)
def code_digest(module: str) -> str:
    """Hexadecimal digest of the code that reads releases and writes shards, with the module of a release."""
    here = Path(__file__).parent
    paths = {*(here.parent / "benchmarks").glob("*.py"), here / "shard.py"}
    release_file = getattr(sys.modules.get(module), "__file__", None)
    if release_file is not None:
        paths.add(Path(release_file))
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def describe_shard(path: Path, name: str, fingerprint: str) -> WrittenShard:
    """What is known of a finished file, which will have the name `name`.

    Raises:
        OSError, pyarrow.ArrowInvalid: it is missing or no whole parquet file.
    """
    metadata = pyarrow.parquet.read_metadata(path)
    unpacked = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    return WrittenShard(name, fingerprint, metadata.num_rows, path.stat().st_size, unpacked)


def shard_name(split: str, number: int, total: int) -> str:
    """`validation-00000-of-00016.parquet`."""
    return f"{split}-{number:05d}-of-{total:05d}.parquet"
