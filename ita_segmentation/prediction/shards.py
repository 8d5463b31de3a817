"""Segment a dataset into parquet files, on any number of processes, which can be ended at any time.

The output folder gets
- plan.json: what is segmented and how; another run in the same folder must say the same;
- PART-UNIT.parquet, complete or absent: a row for each image of a unit of work (see `rows.py`);
- parts/PART: the number of rows of each part of a stream, once it is known.
Processes do not communicate: each does the units whose number falls to it and that are not there yet.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ita_segmentation.checkpoints import WEIGHT_FILES
from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.files import atomic_path, json_bytes, read_text, write_files
from ita_segmentation.images import DECODING_ERRORS
from ita_segmentation.prediction.formats import label_png
from ita_segmentation.prediction.rows import Row, Rows, Unit, batches
from ita_segmentation.prediction.segmenter import SegmentedImage, Segmenter

DATASET_FORMATS = ("labels", "segments", "coco")
DEFAULT_DATASET_FORMATS = ("labels", "segments")
READING_ERRORS = (*DECODING_ERRORS, http.client.HTTPException)
"""What is wrong with one image, and not with the dataset."""


@dataclass
class DatasetCounts:
    """What one process did.

    Attributes:
        images: number of images done.
        errors: how many of them have an error.
    """

    images: int = 0
    errors: int = 0


class ShardFolder:
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
                f"{self.folder} holds results of another run (its {', '.join(other)} differ): choose another --output"
            )

    def path(self, part: int, number: int) -> Path:
        """Return the file of a unit."""
        return self.folder / f"{part:05d}-{number:06d}.parquet"

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

    def write(self, unit: Unit, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a unit's file.

        Raises:
            ITAError: it cannot be written.
        """
        import pyarrow
        from pyarrow import parquet

        path = self.path(unit.part, unit.number)
        table = pyarrow.Table.from_pylist(list(rows), schema=_schema())
        with atomic_path(path, one_writer=True) as temporary:
            try:
                parquet.write_table(table, temporary, compression="zstd")
            except OSError as error:
                raise ITAError(f"cannot write {path}: {error.strerror or error}") from error


def process_of() -> tuple[int, int, int]:
    """Return (rank, number of processes, rank on this machine), as `accelerate launch` and torchrun set them."""
    rank, world_size, local_rank = (
        int(os.environ.get(name, default)) for name, default in _LAUNCH_VARIABLES.items()
    )
    return rank, world_size, local_rank


_LAUNCH_VARIABLES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def segment_dataset(
    segmenter: Segmenter,
    rows: Rows,
    folder: ShardFolder,
    plan: Mapping[str, Any],
    formats: Sequence[str],
    batch_size: int = 1,
    progress: Callable[[int], object] = lambda images: None,
    run_lengths: Callable[[SegmentedImage], list[dict[str, Any]]] | None = None,
) -> DatasetCounts:
    """Segment this process's share of a dataset.

    Args:
        segmenter: what segments the images.
        rows: the images, see `open_rows`.
        folder: where results go.
        plan: what decides the results; the same in every process and in every later run.
        formats: the columns that are written, of `DATASET_FORMATS`.
        batch_size: images in one pass.
        progress: called with the number of images done since it was called last.
        run_lengths: gives the entries of the column of the format "coco".

    Raises:
        ITAError: what stops everything; files that are done stay.
    """
    rank, world_size, _ = process_of()
    folder.begin({**rows.description, **plan})
    counts = DatasetCounts()
    for unit in rows.units(rank, world_size, folder.is_done):
        records: list[dict[str, Any]] = []
        try:
            for batch in batches(unit.rows, batch_size):
                records += _segment_batch(segmenter, unit.part, batch, formats, run_lengths)
                progress(len(batch))
        except (OSError, ValueError) as error:  # a file of the dataset, not an image of it
            name = folder.path(unit.part, unit.number).stem
            raise ITAError(f"the dataset cannot be read in unit {name}: {one_line(error, 200)}") from error
        folder.write(unit, records)
        counts.images += len(records)
        counts.errors += sum("error" in one for one in records)
    return counts


def checkpoint_digest(checkpoint: Path) -> dict[str, Any]:
    """Return what tells a checkpoint folder from another one, without reading its weights."""
    weights = [path for name in WEIGHT_FILES if (path := checkpoint / name).is_file()]
    config = checkpoint / "config.json"
    digest = hashlib.sha256(config.read_bytes()).hexdigest()[:16] if config.is_file() else None
    return {"model_config": digest, "model_bytes": sum(path.stat().st_size for path in weights)}


def _segment_batch(
    segmenter: Segmenter,
    part: int,
    batch: Sequence[Row],
    formats: Sequence[str],
    run_lengths: Callable[[SegmentedImage], list[dict[str, Any]]] | None,
) -> list[dict[str, Any]]:
    """A record for each row; that of an image that cannot be read or segmented has its `error` and nothing else."""
    from modeling_ita.image_io import read_image

    images: dict[int, Any] = {}
    records: dict[int, dict[str, Any]] = {}
    for index, row in enumerate(batch):
        try:
            if row.image is None:
                raise ValueError("there is no image in this row")
            images[index] = read_image(row.image)
        except READING_ERRORS as error:
            records[index] = {"error": one_line(error)}
    for index, result in zip(images, segmenter.segment(list(images.values())), strict=True):
        if isinstance(result, ITAError):
            records[index] = {"error": one_line(result)}
            continue
        record = {"width": result.width, "height": result.height}
        records[index] = {**record, "dominant_categories": result.dominant_categories}
        if "labels" in formats:
            records[index]["label_map"] = label_png(result.label_map)
        if "segments" in formats:
            records[index]["segments"] = result.segments
        if run_lengths is not None:
            records[index]["run_lengths"] = run_lengths(result)
    return [
        {"image_id": row.image_id, "part": part, "row": row.number, **records[index]}
        for index, row in enumerate(batch)
    ]


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
