"""What a model can be scored on: the Scenes dataset, and every dataset that `ita prepare` wrote."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ita_segmentation.errors import ITAError
from ita_segmentation.evaluation.predictors import EVALUATION_TASKS

SCENES = "scenes"
SCENES_VALIDATION_IMAGES = 500


@dataclass(frozen=True)
class Benchmark:
    """Images with labels.

    Attributes:
        classes: K classes, each a list of names; labels are their indices.
        rows: zero-argument callable that yields all rows in order, not yet decoded.
        decode: row -> what `ita_segmentation.data.decode_row` returns.
        num_images: number of rows.
        seen: (K,) whether masks of the class were in training; None if the model decides that.
        is_thing: (K,) which classes have instances; None if the dataset does not tell.
        tasks: those that the labels can score.
        ignore_index: label of ignored pixels.
        identity: distinguishes these images from others, for interrupted runs.
        split: which split of the dataset this is.
    """

    classes: list[list[str]]
    rows: Callable[[], Iterable[Any]]
    decode: Callable[[Any], dict[str, Any]]
    num_images: int
    seen: list[bool] | None = None
    is_thing: list[bool] | None = None
    tasks: frozenset[str] = frozenset({"semantic"})
    ignore_index: int = 255
    identity: Any = ""
    split: str = "validation"

    def rows_at(self, indices: Sequence[int]) -> Iterator[Any]:
        """Yield the rows with these indices (ascending), not yet decoded."""
        wanted = set(indices)
        rows = islice(self.rows(), max(wanted, default=-1) + 1)
        return (row for index, row in enumerate(rows) if index in wanted)


def load_benchmark(
    name: str, data_dir: Path | None = None, split: str | None = None, limit: int | None = None
) -> Benchmark:
    """Load a benchmark by its name.

    Args:
        name: "scenes"; the name of a folder in `data_dir` that `ita prepare` wrote; or the path of one.
        data_dir: where prepared datasets are.
        split: None for the validation split.
        limit: number of images that will be asked for; None for all.

    Raises:
        ITAError: there is no such dataset or split, or `ita prepare` did not write it.
    """
    if name == SCENES:
        if split not in (None, "validation"):
            raise ITAError(f"scenes has no split {split!r} to score, only validation")
        return _load_scenes(limit)
    folders = [Path(name)] if data_dir is None else [data_dir / name, Path(name)]
    folder = next((path for path in folders if path.is_dir()), None)
    if folder is None:
        if data_dir is None:
            raise ITAError(f"{name}: --data_dir must name the folder of the prepared datasets")
        raise ITAError(f"{name}: there is no prepared dataset {data_dir / name} (`ita prepare` writes it)")
    return _load_folder(folder, split)


def _load_folder(folder: Path, split: str | None) -> Benchmark:
    """Read a prepared dataset as a stream, which is never held in memory."""
    from ita_segmentation.data import count_rows, decode_row, load_prepared, vocabulary_of

    stream = load_prepared(folder, split, streaming=True)
    vocabulary = vocabulary_of(stream)
    num_images = count_rows(folder, str(stream.split))
    files = sorted((folder / "data").glob("*.parquet"))
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    has_segments = "panoptic" in stream.features and vocabulary.is_thing is not None
    return Benchmark(
        classes=vocabulary.classes,
        rows=lambda: stream.decode(False),
        decode=decode_row,
        num_images=num_images,
        is_thing=vocabulary.is_thing,
        tasks=frozenset(EVALUATION_TASKS if has_segments else ("semantic",)),
        ignore_index=vocabulary.ignore_index,
        identity=[str(folder.resolve()), stamps],
        split=str(stream.split),
    )


def _load_scenes(limit: int | None) -> Benchmark:
    """Draw Scenes' validation images, with all classes and a seed that no training uses."""
    from ita_segmentation.data import decode_row
    from ita_segmentation.data.scenes import scenes_dataset, scenes_vocabulary

    vocabulary = scenes_vocabulary()
    images = scenes_dataset(split="validation", num_images=limit or SCENES_VALIDATION_IMAGES)
    return Benchmark(
        classes=vocabulary.classes,
        rows=lambda: images,
        decode=decode_row,
        num_images=len(images),
        seen=vocabulary.seen,
        is_thing=vocabulary.is_thing,
        tasks=frozenset(EVALUATION_TASKS),
        identity=f"scenes {len(images)} {images._fingerprint}",
    )
