"""The images of a folder or of a dataset's column, cut into units of work that never change.

A unit is `UNIT_SIZE` neighboring images of one part. A folder, or a dataset on disk, is one part; a stream has a part
for each of its files (at most `MAX_PARTS`, of several files each then). Which images make a unit depends on nothing
else, and above all not on how many processes share the work: any number can go on with what others left.

Folders, datasets on disk and parquet files are read from any unit on; other streams only from their beginning.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.files import path_text
from ita_segmentation.images import IMAGE_SUFFIXES
from ita_segmentation.prediction.parquet_parts import ParquetPart

UNIT_SIZE = 256
MAX_PARTS = 1024


@dataclass(frozen=True)
class Row:
    """An image of a dataset.

    Attributes:
        number: its number in its part.
        image_id: what results call it.
        image: a path, a URL, the bytes of a file or a PIL image; None where there is none.
    """

    number: int
    image_id: str
    image: Any


@dataclass(frozen=True)
class Unit:
    """A unit of work."""

    part: int
    number: int
    rows: Iterable[Row]


IsDone = Callable[[int, int], bool]
Place = tuple[int, int]
"""The part of a unit and its number there."""


class ListedRows:
    """Images that can be reached by their number."""

    def __init__(self, length: int, row: Callable[[int], Row], digest: str, unit_size: int):
        self._length, self._row, self._unit_size = length, row, unit_size
        self.description = {"unit_size": unit_size, "images": length, "digest": digest}

    def units(self, rank: int, world_size: int, is_done: IsDone) -> Iterator[Unit]:
        """Yield the units of process `rank` of `world_size` that `is_done(part, number)` does not have yet."""
        for number in range(rank, -(-self._length // self._unit_size), world_size):
            if not is_done(0, number):
                yield self.unit(0, number)

    def places(self, is_done: IsDone) -> Iterator[Place]:
        """Yield the places of all units that are not done yet."""
        return (
            (0, number) for number in range(-(-self._length // self._unit_size)) if not is_done(0, number)
        )

    def place_after(self, place: Place, is_done: IsDone) -> Place | None:
        """Return None: no unit waits for another."""
        return None

    def unit(self, part: int, number: int) -> Unit:
        """Return a unit."""
        start = number * self._unit_size
        return Unit(part, number, map(self._row, range(start, min(self._length, start + self._unit_size))))


class ParquetRows:
    """Images in parquet files, of which a process reads the row groups of its own units."""

    def __init__(
        self,
        parts: Sequence[Sequence[str]],
        row: Callable[[dict[str, Any], int], Row],
        columns: Sequence[str],
        part_length: Callable[[int], int | None],
        note_length: Callable[[int, int], None],
        unit_size: int,
    ):
        self._parts, self._row, self._columns, self._unit_size = parts, row, columns, unit_size
        self._part_length, self._note_length = part_length, note_length
        self._open: tuple[int, ParquetPart] | None = None
        self.description = {"unit_size": unit_size, "parts": len(parts)}

    def units(self, rank: int, world_size: int, is_done: IsDone) -> Iterator[Unit]:
        """Yield the units of process `rank` of `world_size` that are not done yet.

        Processes share the parts where there are enough, else the units of all parts, neighbors together. A part that
        is known to be done is not opened.
        """
        if len(self._parts) >= world_size:
            share = self._units_of(range(rank, len(self._parts), world_size))
        else:
            units = list(self._units_of(range(len(self._parts))))
            first, last = (len(units) * one // world_size for one in (rank, rank + 1))
            share = iter(units[first:last])
        for part, number in share:
            if not is_done(part, number):
                yield self.unit(part, number)

    def places(self, is_done: IsDone) -> Iterator[Place]:
        """Yield the places of all units that are not done yet."""
        return (place for place in self._units_of(range(len(self._parts))) if not is_done(*place))

    def place_after(self, place: Place, is_done: IsDone) -> Place | None:
        """Return None: no unit waits for another."""
        return None

    def unit(self, part: int, number: int) -> Unit:
        """Return a unit."""
        return Unit(part, number, self._rows(part, number))

    def sharing_notice(self, processes: int) -> str | None:
        """Say what it costs that processes share files or row groups; None where there are enough of them."""
        parts = range(len(self._parts))
        if len(parts) >= processes:
            return None
        units = sum(math.ceil(self._opened(part).num_rows / self._unit_size) for part in parts)
        if units < processes:
            return (
                f"the images make {units} unit{'' if units == 1 else 's'} of {self._unit_size}: {processes - units} of "
                f"{processes} processes have nothing to do"
            )
        groups = sum(self._opened(part).num_row_groups for part in parts)
        if groups >= processes:
            return None
        return (
            f"{groups} row group{'' if groups == 1 else 's'} for {processes} processes: each also decompresses the "
            f"rows before its own (files written with row_group_size={self._unit_size} avoid this)"
        )

    def _units_of(self, parts: Iterable[int]) -> Iterator[Place]:
        for part in parts:
            length = self._part_length(part)
            if length is None:
                length = self._opened(part).num_rows
                self._note_length(part, length)
            yield from ((part, number) for number in range(-(-length // self._unit_size)))

    def _opened(self, part: int) -> ParquetPart:
        if self._open is None or self._open[0] != part:
            self._open = (part, ParquetPart(self._parts[part], self._columns))
        return self._open[1]

    def _rows(self, part: int, number: int) -> Iterator[Row]:
        start = number * self._unit_size
        examples = self._opened(part).rows(start, start + self._unit_size)
        return (self._row(example, start + index) for index, example in enumerate(examples))


class StreamedRows:
    """Images that can only be read in their order, part after part.

    Args:
        num_parts: how many parts there are.
        part: opens one.
        part_length: gives the number of rows of a part, None where it was never read to its end.
        note_length: is told the number of rows of a part that was read to its end.
        unit_size: images in a unit.
    """

    def __init__(
        self,
        num_parts: int,
        part: Callable[[int], Iterable[Row]],
        part_length: Callable[[int], int | None],
        note_length: Callable[[int, int], None],
        unit_size: int,
    ):
        self._num_parts, self._part = num_parts, part
        self._part_length, self._note_length, self._unit_size = part_length, note_length, unit_size
        self._open: tuple[int, int, Iterator[Row]] | None = None
        self.description = {"unit_size": unit_size, "parts": num_parts}

    def units(self, rank: int, world_size: int, is_done: IsDone) -> Iterator[Unit]:
        """Yield the units of process `rank` of `world_size` that are not done yet.

        Processes share the parts where there are enough, else the units of each part; rows that are another's, or
        done, are read but not decoded. A part that is known to be done is not opened.
        """
        by_part = self._num_parts >= world_size
        for part in range(rank if by_part else 0, self._num_parts, world_size if by_part else 1):
            length = self._part_length(part)
            if length is not None and all(is_done(part, one) for one in range(-(-length // self._unit_size))):
                continue
            rows, count = iter(self._part(part)), 0
            for number in itertools.count():
                counted = _Counted(itertools.islice(rows, self._unit_size))
                first = next(counted, None)
                if first is None:
                    break
                if (by_part or (part + number) % world_size == rank) and not is_done(part, number):
                    yield Unit(part, number, itertools.chain([first], counted))
                deque(counted, maxlen=0)
                count += counted.count
            self._note_length(part, count)

    def places(self, is_done: IsDone) -> Iterator[Place]:
        """Yield the place of the first unit of each part that is not done yet."""
        return (place for part in range(self._num_parts) if (place := self.place_after((part, -1), is_done)))

    def place_after(self, place: Place, is_done: IsDone) -> Place | None:
        """Return the next unit of the part that is not done yet; there may turn out to be no such unit."""
        part, number = place
        length = self._part_length(part)
        for one in itertools.count(number + 1):
            if length is not None and one * self._unit_size >= length:
                return None
            if not is_done(part, one):
                return part, one
        return None

    def unit(self, part: int, number: int) -> Unit | None:
        """Return a unit, None where its part ends before. What was read last is read on from there."""
        start = number * self._unit_size
        if self._open is None or self._open[0] != part or self._open[1] > start:
            self._open = (part, 0, iter(self._part(part)))
        skipped = _Counted(itertools.islice(self._open[2], start - self._open[1]))
        deque(skipped, maxlen=0)
        read = list(itertools.islice(self._open[2], self._unit_size))
        position = self._open[1] + skipped.count + len(read)
        self._open = (part, position, self._open[2])
        if len(read) < self._unit_size:
            self._note_length(part, position)
        return Unit(part, number, read) if read else None


Rows = ListedRows | ParquetRows | StreamedRows


class _Counted:
    """An iterator that counts what it has given."""

    def __init__(self, items: Iterator[Row]):
        self._items, self.count = items, 0

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> Row:
        item = next(self._items)
        self.count += 1
        return item


def open_rows(
    dataset: str,
    split: str | None,
    image_column: str,
    id_column: str | None,
    part_length: Callable[[int], int | None],
    note_length: Callable[[int, int], None],
    unit_size: int | None = None,
) -> Rows:
    """Open a folder of images (at any depth), a dataset on disk, parquet files, or a dataset of the Hub.

    All but the first two are streamed.

    Args:
        dataset: path or name.
        split: may be None where there is only one.
        image_column: the column with images, paths or URLs.
        id_column: the column that names the rows of the results; None for the image's path or the row's number.
        part_length: gives the number of rows of a part of a stream, None where it is not known.
        note_length: is told the number of rows of a part of a stream.
        unit_size: images in a unit; None for `UNIT_SIZE`.

    Raises:
        ITAError: it cannot be found or read, has no such split or column, or holds no image.
    """
    path, unit_size = Path(dataset), unit_size or UNIT_SIZE
    if path.is_dir() and not _is_dataset(path):
        return _folder_rows(path, unit_size)
    loaded, files = _load(dataset, split)
    columns = loaded.column_names
    for column in (image_column, id_column):
        if columns is not None and column is not None and column not in columns:
            raise ITAError(f"the dataset {dataset} has no column {column!r}: it has {', '.join(columns)}")
    loaded = _undecoded(loaded, image_column)
    if hasattr(loaded, "__len__"):
        # A dataset's fingerprint is of its files and how it was made: the same one is the same rows.
        return ListedRows(
            len(loaded),
            lambda number: _row_of(loaded[number], number, image_column, id_column),
            str(loaded._fingerprint),
            unit_size,
        )
    num_parts = min(loaded.num_shards, MAX_PARTS)
    if files is not None and len(files) == loaded.num_shards:
        return ParquetRows(
            _split(files, num_parts),
            lambda example, number: _row_of(example, number, image_column, id_column),
            [image_column] if id_column is None else [image_column, id_column],
            part_length,
            note_length,
            unit_size,
        )

    def part(index: int) -> Iterator[Row]:
        for number, example in enumerate(loaded.shard(num_shards=num_parts, index=index)):
            yield _row_of(example, number, image_column, id_column)

    return StreamedRows(num_parts, part, part_length, note_length, unit_size)


def _is_dataset(path: Path) -> bool:
    known = ("state.json", "dataset_dict.json")
    return any((path / name).is_file() for name in known) or next(path.rglob("*.parquet"), None) is not None


def _folder_rows(folder: Path, unit_size: int) -> ListedRows:
    names = sorted(os.path.relpath(path, folder) for path in _images_below(folder))
    if not names:
        raise ITAError(f"no images in the folder {folder}")
    digest = hashlib.sha256(b"\0".join(map(os.fsencode, names))).hexdigest()[:16]

    def row(number: int) -> Row:
        return Row(number, path_text(names[number]), folder / names[number])

    return ListedRows(len(names), row, digest, unit_size)


def _images_below(folder: Path) -> Iterator[str]:
    """Regular files with the suffix of an image, at any depth; nothing hidden."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _images_below(Path(entry.path))
            elif entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file():
                yield entry.path


def _load(dataset: str, split: str | None) -> tuple[Any, list[str] | None]:
    """The dataset, and the files of it where it is a stream of parquet files."""
    import datasets

    path = Path(dataset)
    builder: Any = None
    try:
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            loaded: Any = datasets.load_from_disk(dataset)
        else:
            source = ("parquet", dataset) if path.is_file() else (dataset, None)
            builder = datasets.load_dataset_builder(source[0], data_files=source[1])
            loaded = builder.as_streaming_dataset()
        if isinstance(loaded, dict):
            split = _only_split(loaded, dataset, split)
            loaded = loaded[split]
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise ITAError(f"the dataset {dataset} cannot be read: {one_line(error, 200)}") from error
    return loaded, _parquet_files(builder, split)


def _only_split(splits: dict[str, Any], dataset: str, split: str | None) -> str:
    if split is None and len(splits) == 1:
        return next(iter(splits))
    if split not in splits:
        wanted = "give --split" if split is None else f"no split {split!r}"
        raise ITAError(f"{wanted}: the dataset {dataset} has {', '.join(map(str, splits))}")
    return split


def _parquet_files(builder: Any, split: str | None) -> list[str] | None:
    """The files of a split, where they are plain parquet files, in the dataset's order."""
    from datasets.packaged_modules.parquet.parquet import Parquet

    if not isinstance(builder, Parquet) or split is None:
        return None
    files = [str(file) for file in builder.config.data_files[split]]
    plain = all(file.endswith(".parquet") and "::" not in file for file in files)
    return files if plain else None


def _split(files: Sequence[str], num_parts: int) -> list[Sequence[str]]:
    """Cut into `num_parts` runs of neighbors; the first ones have one more where it does not divide."""
    size, longer = divmod(len(files), num_parts)
    starts = [size * part + min(part, longer) for part in range(num_parts + 1)]
    return [files[start:stop] for start, stop in itertools.pairwise(starts)]


def _undecoded(dataset: Any, image_column: str) -> Any:
    """The dataset with images as the bytes of their files: a broken one is a row like any other."""
    from datasets import Image as ImageFeature

    if isinstance((dataset.features or {}).get(image_column), ImageFeature):
        return dataset.cast_column(image_column, ImageFeature(decode=False))
    return dataset


def _row_of(example: dict[str, Any], number: int, image_column: str, id_column: str | None) -> Row:
    image, path = example.get(image_column), None
    if isinstance(image, dict):
        path = image.get("path")
        image = image.get("bytes") or path
    elif isinstance(image, str):
        path = image
    if id_column is not None:
        return Row(number, str(example.get(id_column)), image)
    return Row(number, str(number) if path is None else str(path), image)


def batches(rows: Iterable[Row], size: int) -> Iterator[Sequence[Row]]:
    """Yield lists of `size` rows; the last may be shorter."""
    iterator = iter(rows)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
