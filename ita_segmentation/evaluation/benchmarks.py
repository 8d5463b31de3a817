"""What a model can be scored on: the Scenes world, and every data set that `run_prepare.py` made."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.evaluation.predictors import TASKS

SCENES = "scenes"
SCENES_VALIDATION_IMAGES = 500


@dataclass(frozen=True)
class Benchmark:
    """Images with labels.

    Attributes:
        classes: K classes, each a list of names; the labels are their indices.
        rows: called with nothing, gives all rows in order, not yet decoded.
        decode: row -> {"image": RGB PIL image, "label": (H, W) array, "panoptic": (H, W) array or None,
            "segments": list of {"id", "category_id", "isthing", "iscrowd"}, "image_id": str}.
        num_images: number of rows.
        seen: (K,) whether masks of the class were in training; None where that is the model's to say.
        is_thing: (K,) which classes have instances; None where the data set does not tell.
        tasks: those that the labels can score.
        ignore_index: the label of pixels that are left out.
        identity: what tells these images from others, for interrupted runs.
    """

    classes: list[list[str]]
    rows: Callable[[], Iterable[Any]]
    decode: Callable[[Any], dict[str, Any]]
    num_images: int
    seen: list[bool] | None = None
    is_thing: list[bool] | None = None
    tasks: frozenset[str] = frozenset({"semantic"})
    ignore_index: int = 255
    identity: str = ""
    split: str = "validation"

    def samples(self, numbers: Sequence[int]) -> Iterator[Any]:
        """The rows with these numbers (ascending), not yet decoded."""
        wanted = iter(numbers)
        following = next(wanted, None)
        for number, row in enumerate(self.rows()):
            if following is None:
                return
            if number == following:
                yield row
                following = next(wanted, None)


def load_benchmark(name: str, data_dir: Path | None, split: str | None, limit: int | None) -> Benchmark:
    """A benchmark by its name.

    Args:
        name: "scenes"; or the name of a folder in `data_dir` that `run_prepare.py` made; or the path of one.
        data_dir: where prepared data sets are.
        split: None for the one that is for validation.
        limit: number of images that will be asked for; None for all.

    Raises:
        ITAError: there is no such data set, or it is not one that `run_prepare.py` made.
    """
    if name == SCENES:
        if split not in (None, "validation"):
            raise ITAError(f"scenes has no split {split!r} to score, only validation")
        return load_scenes(limit)
    folders = [Path(name)] if data_dir is None else [data_dir / name, Path(name)]
    folder = next((path for path in folders if path.is_dir()), None)
    if folder is None:
        if data_dir is None:
            raise ITAError(f"{name}: say with --data_dir where its prepared data set is")
        raise ITAError(f"{name}: there is no prepared data set {data_dir / name} (run_prepare.py makes it)")
    return load_folder(folder, split)


def load_folder(folder: Path, split: str | None) -> Benchmark:
    """A data set that `run_prepare.py` made, read as a stream: it never sits in memory.

    Raises:
        ITAError: it is not one, or has no such split.
    """
    from ita_segmentation.data import count_rows, decode_row, load_prepared, vocabulary_of

    stream = load_prepared(folder, split, streaming=True)
    vocabulary = vocabulary_of(stream)
    num_images = count_rows(folder, str(stream.split))
    files = sorted(path for path in (folder / "data").glob("*.parquet"))
    stamp = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    has_segments = "panoptic" in stream.features and vocabulary.is_thing is not None
    return Benchmark(
        classes=vocabulary.classes,
        rows=lambda: stream.decode(False),
        decode=decode_row,
        num_images=num_images,
        is_thing=vocabulary.is_thing,
        tasks=frozenset(TASKS) if has_segments else frozenset({"semantic"}),
        ignore_index=vocabulary.ignore_index,
        identity=json.dumps([str(folder.resolve()), stamp]),
        split=str(stream.split),
    )


def load_scenes(limit: int | None) -> Benchmark:
    """Scenes' validation images, all classes, from a seed that no training uses.

    Args:
        limit: number of images; None for all of them.
    """
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
        tasks=frozenset(TASKS),
        identity=f"scenes {len(images)} {images._fingerprint}",
    )
