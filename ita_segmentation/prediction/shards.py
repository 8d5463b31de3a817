"""A data set's images -> parquet files, on any number of processes, which can be ended at any time.

The output folder gets
- plan.json: what is segmented and how; another run in the same folder must say the same;
- PART-UNIT.parquet: a row for each image of a unit of work (see `ita_segmentation.prediction.rows`), as a whole or not at all;
- parts/PART: the number of rows of each part of a stream that was read to its end.
Processes do not talk to each other: each does the units whose number falls to it and that are not there yet.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ita_segmentation.checkpoints import WEIGHT_FILES
from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.files import read_text, write_files
from ita_segmentation.prediction.images import json_bytes, label_png
from ita_segmentation.prediction.rows import Row, Unit, batches
from ita_segmentation.prediction.segmenter import Prediction, Segmenter

DATASET_FORMATS = ("labels", "segments", "coco")
DEFAULT_DATASET_FORMATS = ("labels", "segments")


@dataclass
class Counts:
    """Images done by this process, and how many of them have an error."""

    images: int = 0
    errors: int = 0


class ShardFolder:
    """The output folder of a data set's run."""

    def __init__(self, folder: Path):
        self.folder = folder

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Writes the plan, or compares it with the one that is there.

        Raises:
            ITAError: if the folder holds the results of another plan.
        """
        path = self.folder / "plan.json"
        if not path.exists():
            write_files({path: json_bytes(plan)})
            return
        try:
            there = json.loads(read_text(path))
        except ValueError as error:
            raise ITAError(f"{path} is no plan of a run: choose another --output") from error
        asked = json.loads(json_bytes(plan))
        other = sorted(key for key in {*there, *asked} if there.get(key) != asked.get(key))
        if other:
            raise ITAError(
                f"{self.folder} holds results of another run (its {', '.join(other)} differ): choose another --output"
            )

    def path(self, part: int, number: int) -> Path:
        return self.folder / f"{part:05d}-{number:06d}.parquet"

    def is_done(self, part: int, number: int) -> bool:
        return self.path(part, number).is_file()

    def part_length(self, part: int) -> int | None:
        """Rows of a part, None where it was never read to its end."""
        path = self.folder / "parts" / f"{part:05d}"
        return int(read_text(path)) if path.is_file() else None

    def note_length(self, part: int, length: int) -> None:
        write_files({self.folder / "parts" / f"{part:05d}": f"{length}\n".encode()})

    def write(self, unit: Unit, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes a unit's file as a whole.

        Raises:
            ITAError: if it cannot be written.
        """
        import pyarrow
        from pyarrow import parquet

        path = self.path(unit.part, unit.number)
        # Always the same temporary name: what a killed process leaves is replaced when its unit is done again.
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            table = pyarrow.Table.from_pylist(list(rows), schema=_schema())
            parquet.write_table(table, temporary, compression="zstd")
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise ITAError(f"cannot write {path}: {error.strerror or error}") from error


def process_of() -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine), as `accelerate launch` and torchrun say by the environment."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in _LAUNCHED.items())
    return rank, world, local


_LAUNCHED = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def plan_of(
    dataset: str,
    split: str | None,
    columns: Sequence[str | None],
    description: Mapping[str, Any],
    checkpoint: Path,
    segmenter: Segmenter,
    formats: Sequence[str],
    processor_size: Mapping[str, Any],
) -> dict[str, Any]:
    """What decides the results of a run."""
    weights = [path for name in WEIGHT_FILES if (path := checkpoint / name).is_file()]
    digest = hashlib.sha256((checkpoint / "config.json").read_bytes()).hexdigest()[:16]
    return {
        "dataset": dataset,
        "split": split,
        "image_column": columns[0],
        "id_column": columns[1],
        **description,
        "model": str(checkpoint),
        "model_config": digest,
        "model_bytes": sum(path.stat().st_size for path in weights),
        "task": segmenter.task,
        "threshold": segmenter.threshold,
        "size": {key: value for key, value in dict(processor_size).items() if value is not None},
        "formats": sorted(formats),
        "vocabulary": segmenter.classes,
    }


def segment_unit(
    segmenter: Segmenter,
    unit: Unit,
    formats: Sequence[str],
    batch_size: int,
    progress: Callable[[int], None],
) -> list[dict[str, Any]]:
    """The rows of a unit's file; an image that cannot be read or segmented has its `error` and nothing else.

    Raises:
        ITAError: if the data set itself cannot be read on.
    """
    done: list[dict[str, Any]] = []
    try:
        for batch in batches(unit.rows, batch_size):
            done += _segment_batch(segmenter, unit.part, batch, formats)
            progress(len(batch))
    except (OSError, ValueError) as error:  # a file of the data set, not an image of it
        raise ITAError(f"the data set cannot be read in unit {unit.name}: {one_line(error, 200)}") from error
    return done


def _segment_batch(
    segmenter: Segmenter, part: int, batch: Sequence[Row], formats: Sequence[str]
) -> list[dict[str, Any]]:
    from modeling_ita.image_processing_ita import read_image

    images: dict[int, Any] = {}
    results: dict[int, Prediction | str] = {}
    for index, row in enumerate(batch):
        try:
            if row.image is None:
                raise ValueError("there is no image in this row")
            images[index] = read_image(row.image)
        except (ValueError, TypeError) as error:
            results[index] = one_line(error)
    predictions = segmenter.segment(list(images.values()))
    for index, prediction in zip(images, predictions, strict=True):
        results[index] = one_line(prediction) if isinstance(prediction, ITAError) else prediction
    return [_record(part, row, results[index], formats) for index, row in enumerate(batch)]


def _record(part: int, row: Row, result: Prediction | str, formats: Sequence[str]) -> dict[str, Any]:
    record: dict[str, Any] = {"image_id": row.image_id, "part": part, "row": row.number}
    if isinstance(result, str):
        return {**record, "error": result}
    document = result.document
    record |= {key: document[key] for key in ("width", "height", "dominant_categories")}
    if "labels" in formats:
        record["label_map"] = label_png(result.label_map)
    if "segments" in formats:
        record["segments"] = document["segments"]
    if "coco" in formats:
        record["run_lengths"] = [
            {**entry, "counts": entry["segmentation"]["counts"]} for entry in result.run_lengths
        ]
    return record


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
