"""Segment a dataset into parquet files, on any number of processes, which can be ended at any time.

The output folder gets
- plan.json: what is segmented and how; another run in the same folder must say the same;
- PART-UNIT.parquet, complete or absent: a row for each image of a unit of work (see `rows.py`);
- parts/PART: the number of rows of each part of a stream, once it is known.
Processes do not communicate: each does the units whose number falls to it and that are not there yet.
"""

from __future__ import annotations

import http.client
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.files import json_bytes, read_text, write_files
from ita_segmentation.images import DECODING_ERRORS
from ita_segmentation.prediction.formats import label_png
from ita_segmentation.prediction.rows import Row, Rows, Unit, batches
from ita_segmentation.prediction.segmenter import SegmentedImage, Segmenter

DATASET_FORMATS = ("labels", "segments", "coco")
DEFAULT_DATASET_FORMATS = ("labels", "segments")
READING_ERRORS = (*DECODING_ERRORS, http.client.HTTPException)
"""What is wrong with one image, and not with the dataset."""
MAX_DECODERS = 4


@dataclass
class DatasetCounts:
    """What was done."""

    images: int = 0
    errors: int = 0

    def __add__(self, other: DatasetCounts) -> DatasetCounts:
        return DatasetCounts(self.images + other.images, self.errors + other.errors)


class ParquetFolder:
    """The output folder of a run over a dataset.

    Args:
        folder: made with the first file.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Write the plan, or compare it with the one that is there.

        Raises:
            ITAError: the folder holds the results of another plan.
        """
        path = self.folder / "plan.json"
        if not path.exists():
            write_files({path: json_bytes(plan)})
            return
        try:
            there = json.loads(read_text(path))
        except ValueError as error:
            raise ITAError(f"{path} is not the plan of a run: choose another --output") from error
        asked = json.loads(json_bytes(plan))
        other = sorted(key for key in {*there, *asked} if there.get(key) != asked.get(key))
        if other:
            raise ITAError(
                f"{self.folder} holds results of another run (different: {', '.join(other)}): choose another --output"
            )

    def path(self, part: int, number: int) -> Path:
        """Return the file of a unit."""
        return self.folder / f"{unit_name(part, number)}.parquet"

    def is_done(self, part: int, number: int) -> bool:
        """Tell whether a unit's file is there and can be read."""
        import pyarrow
        from pyarrow import parquet

        try:
            return parquet.read_metadata(self.path(part, number)).num_rows > 0
        except (OSError, pyarrow.ArrowException):
            return False

    def part_length(self, part: int) -> int | None:
        """Return the number of rows of a part, None where it was never read to its end."""
        path = self.folder / "parts" / f"{part:05d}"
        text = read_text(path).strip() if path.is_file() else ""
        return int(text) if text.isdecimal() else None

    def note_length(self, part: int, length: int) -> None:
        """Keep the number of rows of a part that was read to its end."""
        write_files({self.folder / "parts" / f"{part:05d}": f"{length}\n".encode()})

    def write(self, part: int, number: int, content: bytes) -> None:
        """Write a unit's file; raises ITAError."""
        write_files({self.path(part, number): content}, one_writer=True)


def unit_name(part: int, number: int) -> str:
    """Return what a unit is called."""
    return f"{part:05d}-{number:06d}"


def process_of() -> tuple[int, int, int]:
    """Return (rank, number of processes, rank on this machine), as `accelerate launch` and torchrun set them."""
    rank, world_size, local_rank = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return int(rank or 0), int(world_size or 1), int(local_rank or 0)


class ParquetSegmenter:
    """Segments units into the contents of their files. Images of a batch are decoded while the one before is segmented.

    Args:
        segmenter: what segments the images.
        formats: the columns that are written, of `DATASET_FORMATS`.
        batch_size: images in one pass.
        run_lengths: gives the entries of the column of the format "coco".
    """

    def __init__(
        self,
        segmenter: Segmenter,
        formats: Sequence[str],
        batch_size: int = 1,
        run_lengths: Callable[[SegmentedImage], list[dict[str, Any]]] | None = None,
    ):
        self.segmenter, self.batch_size = segmenter, batch_size
        self._formats, self._run_lengths = formats, run_lengths

    def segment(
        self, unit: Unit, progress: Callable[[int], object] = lambda images: None
    ) -> tuple[bytes, DatasetCounts]:
        """Segment a unit.

        Args:
            unit: its rows.
            progress: called with the number of images done since it was called last.

        Returns:
            The parquet file's bytes, and how many images it has.

        Raises:
            ITAError: the dataset cannot be read.
        """
        records: list[dict[str, Any]] = []
        try:
            for batch in decoded_batches(unit.rows, self.batch_size):
                records += self._segment_batch(unit.part, batch)
                progress(len(batch))
        except (OSError, ValueError) as error:  # a file of the dataset, not an image of it
            name = unit_name(unit.part, unit.number)
            raise ITAError(f"the dataset cannot be read in unit {name}: {one_line(error, 200)}") from error
        return _parquet_bytes(records), DatasetCounts(len(records), sum("error" in one for one in records))

    def _segment_batch(self, part: int, batch: Sequence[tuple[Row, Any]]) -> list[dict[str, Any]]:
        """A record for each row; one that cannot be read or segmented has its `error` and nothing else."""
        images = [image for _, image in batch if not isinstance(image, str)]
        results: Iterator[Any] = iter(self.segmenter.segment_images(images))
        return [
            {
                "image_id": row.image_id,
                "part": part,
                "row": row.number,
                **self._record(image if isinstance(image, str) else next(results)),
            }
            for row, image in batch
        ]

    def _record(self, result: SegmentedImage | ITAError | str) -> dict[str, Any]:
        if isinstance(result, ITAError | str):
            return {"error": one_line(result)}
        record: dict[str, Any] = {"width": result.width, "height": result.height}
        record["dominant_categories"] = result.dominant_categories
        if "labels" in self._formats:
            record["label_map"] = label_png(result.label_map)
        if "segments" in self._formats:
            record["segments"] = result.segments
        if "coco" in self._formats and self._run_lengths is not None:
            record["run_lengths"] = self._run_lengths(result)
        return record


def segment_dataset(
    worker: ParquetSegmenter,
    rows: Rows,
    folder: ParquetFolder,
    plan: Mapping[str, Any],
    progress: Callable[[int], object] = lambda images: None,
) -> DatasetCounts:
    """Segment this process's share of a dataset.

    Args:
        worker: what segments the units.
        rows: the images, see `open_rows`.
        folder: where results go.
        plan: what decides the results; the same in every process and in every later run.
        progress: called with the number of images done since it was called last.

    Raises:
        ITAError: what stops everything; files that are done stay.
    """
    rank, world_size, _ = process_of()
    folder.begin({**rows.description, **plan})
    total = DatasetCounts()
    for unit in rows.units(rank, world_size, folder.is_done):
        content, counts = worker.segment(unit, progress)
        folder.write(unit.part, unit.number, content)
        total += counts
    return total


def decoded_batches(rows: Iterable[Row], size: int) -> Iterator[list[tuple[Row, Any]]]:
    """Yield lists of `size` rows with their images, or with what is wrong with them in a line.

    Threads decode the images of the next list while the caller works on this one.
    """
    with ThreadPoolExecutor(min(size, MAX_DECODERS)) as pool:
        ahead: list[tuple[Row, Future[Any]]] = []
        for batch in batches(rows, size):
            current, ahead = ahead, [(row, pool.submit(_decoded, row)) for row in batch]
            if current:
                yield [(row, image.result()) for row, image in current]
        if ahead:
            yield [(row, image.result()) for row, image in ahead]


def _decoded(row: Row) -> Any:
    from modeling_ita.image_io import read_image

    if row.image is None:
        return "there is no image in this row"
    try:
        return read_image(row.image)
    except READING_ERRORS as error:
        return one_line(error)


def _parquet_bytes(records: Sequence[Mapping[str, Any]]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist(list(records), schema=_schema())
    stream = io.BytesIO()
    parquet.write_table(table, stream, compression="zstd")
    return stream.getvalue()


def _schema() -> Any:
    import pyarrow as pa

    segment = pa.struct(
        {
            "id": pa.int32(),
            "label": pa.string(),
            "label_id": pa.int32(),
            "score": pa.float32(),
            "area": pa.int64(),
            "bbox": pa.list_(pa.int32()),
        }
    )
    run_length = pa.struct(
        {
            "category_id": pa.int32(),
            "counts": pa.string(),
            "score": pa.float32(),
            "area": pa.int64(),
            "bbox": pa.list_(pa.float32()),
        }
    )
    return pa.schema(
        {
            "image_id": pa.string(),
            "part": pa.int32(),
            "row": pa.int64(),
            "width": pa.int32(),
            "height": pa.int32(),
            "dominant_categories": pa.list_(pa.string()),
            "label_map": pa.binary(),
            "segments": pa.list_(segment),
            "run_lengths": pa.list_(run_length),
            "error": pa.string(),
        }
    )
