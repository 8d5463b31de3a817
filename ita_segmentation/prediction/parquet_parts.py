"""Rows of parquet files from any row on: a row group that is not asked for is not read."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from ita_segmentation.errors import ITAError, one_line

ROWS_AT_ONCE = 32
BUFFER_BYTES = 1 << 20
"""Bytes of a column that are read ahead; without this, a column of a whole row group is read at once."""


class ParquetPart:
    """The rows of some parquet files, one file after the other.

    The reader stays where it was: rows that follow those read last are read on, without going back to the beginning
    of their row group.
    """

    def __init__(self, files: Sequence[str], columns: Sequence[str]):
        self._files, self._columns = files, list(dict.fromkeys(columns))
        self._position = -1
        self._batches: Iterator[Any] = iter(())
        self._left: Any = None

    @cached_property
    def _groups(self) -> tuple[list[int], list[tuple[int, int]], int]:
        """The first row of each row group, its (file, number there), and the number of rows."""
        firsts, places, rows = [], [], 0
        for index in range(len(self._files)):
            with self._open(index) as opened:
                sizes = [opened.metadata.row_group(one).num_rows for one in range(opened.num_row_groups)]
            for group, size in enumerate(sizes):
                if size:
                    firsts.append(rows)
                    places.append((index, group))
                    rows += size
        return firsts, places, rows

    @property
    def num_rows(self) -> int:
        """The number of rows, of which only the files' footers are read."""
        return self._groups[2]

    @property
    def num_row_groups(self) -> int:
        """The number of row groups that have rows. Raises as `num_rows`."""
        return len(self._groups[0])

    def rows(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Yield the rows from `start` up to `stop`.

        Rows before `start` in its row group are passed over without becoming Python objects.
        """
        firsts, _, num_rows = self._groups
        stop = min(stop, num_rows)
        group = bisect.bisect_right(firsts, start) - 1
        if start < stop and not firsts[group] <= self._position <= start:
            self._batches, self._left, self._position = self._read_from(group), None, firsts[group]
        while self._position < start:
            self._take(start - self._position)
        while self._position < stop:
            yield from self._take(stop - self._position).to_pylist()

    def _take(self, count: int) -> Any:
        """The next rows, at most `count`."""
        batch = next(self._batches) if self._left is None else self._left
        taken = batch.slice(0, count)
        self._left = batch.slice(count) if batch.num_rows > count else None
        self._position += taken.num_rows
        return taken

    def _read_from(self, group: int) -> Iterator[Any]:
        """Record batches from a row group up to the end of the last file."""
        places = self._groups[1]
        first_file, first_group = places[group]
        for index in sorted({file for file, _ in places[group:]}):
            begin = first_group if index == first_file else 0
            with self._open(index) as opened:
                groups = range(begin, opened.num_row_groups)
                yield from opened.iter_batches(ROWS_AT_ONCE, row_groups=list(groups), columns=self._columns)

    def _open(self, index: int) -> Any:
        import fsspec
        from pyarrow import ArrowException, parquet

        file = self._files[index]
        try:
            source = fsspec.open(file, "rb").open() if "://" in file else file
            return parquet.ParquetFile(source, buffer_size=BUFFER_BYTES)
        except (OSError, ValueError, ArrowException) as error:
            raise ITAError(f"the file {file} cannot be read: {one_line(error, 200)}") from error
