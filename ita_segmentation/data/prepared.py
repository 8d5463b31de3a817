"""Reads the data sets that `run_prepare.py` writes: their vocabulary, their splits, their rows as arrays.

They are plain `datasets` folders: `load_dataset(folder)` reads them as well, by disk or as a stream, and so it does
after `push_to_hub`. Columns, in this order:
- `image`: the release's own file content;
- `label`: lossless PNG of class indices, 8 bits with 255 ignored, or 16 bits with 65535 ignored above 255 classes;
- `panoptic` (RGB PNG, segment id = R + 256 G + 65536 B, 0 where there is none) and `segments` (id, category_id,
  isthing, iscrowd of each), where the release has segments;
- `classes` and `things`: which classes, and thing classes, an image holds. Their features name all classes of the
  vocabulary; a name is "name, synonym, ...". There is no `things` where the release does not tell things from stuff;
- `ignore_index`, the same in every row, and `image_id`.

Maps have the size of the image as it is stored. `datasets` turns images whose EXIF says so upright; the maps of
such an image say the same in their own EXIF, so that `datasets` turns both, and so does `sample_of`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

UNFINISHED = ".incomplete"
"""Folder inside a data set's where `run_prepare.py` works until all is done."""
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.parquet")


@dataclass(frozen=True)
class DatasetVocabulary:
    """The classes that a data set's labels count.

    Attributes:
        classes: K classes, each a list of names.
        is_thing: (K,) whether instances are told apart; None where that is not known.
        ignore_index: the label of pixels that are left out.
    """

    classes: list[list[str]]
    is_thing: list[bool] | None
    ignore_index: int


def vocabulary_of(dataset: Dataset | IterableDataset) -> DatasetVocabulary:
    """The vocabulary of a prepared data set, from its features and its first row.

    Raises:
        ValueError: the data set has not the columns that tell it, or no rows.
    """
    features = dataset.features or {}
    names = _class_names(features.get("classes"))
    if names is None or "ignore_index" not in features:
        raise ValueError(
            "this is no prepared data set: it needs the columns classes (list of ClassLabel) and ignore_index, "
            f"and has {', '.join(features) or 'none that are known'}"
        )
    things = _class_names(features.get("things"))
    row = next(iter(dataset.select_columns(["ignore_index"])), None)
    if row is None:
        raise ValueError("the data set has no rows")
    return DatasetVocabulary(
        classes=[[word.strip() for word in name.split(",")] for name in names],
        is_thing=None if things is None else [name in set(things) for name in names],
        ignore_index=row["ignore_index"],
    )


def _class_names(feature: Any) -> list[str] | None:
    """Names of a list of ClassLabel; None if the feature is anything else."""
    names = getattr(getattr(feature, "feature", None), "names", None)
    return None if names is None else list(names)


def prepared_splits(folder: Path | str) -> dict[str, list[Path]]:
    """The splits of a prepared data set and their files, in order.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is no prepared data set, or not all of one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no data set folder {folder}")
    shards: dict[str, list[tuple[re.Match[str], Path]]] = {}
    for path in sorted((folder / "data").glob("*.parquet")):
        match = _SHARD.fullmatch(path.name)
        if match:
            shards.setdefault(match["split"], []).append((match, path))
    if not shards and (folder / UNFINISHED).is_dir():
        raise ValueError(
            f"the data set {folder} was not finished: give run_prepare.py the same arguments again"
        )
    if not shards:
        raise ValueError(f"{folder} is no data set that run_prepare.py made: it has no data/*.parquet")
    for split, files in shards.items():
        numbers, totals = [int(m["number"]) for m, _ in files], {int(m["total"]) for m, _ in files}
        if totals != {len(files)} or numbers != list(range(len(files))):
            raise ValueError(
                f"the data set {folder} lacks files of {split}: {len(files)} are there, {max(totals)} belong to it"
            )
    return {split: [path for _, path in files] for split, files in shards.items()}


def load_prepared(
    folder: Path | str, split: str | None = None, streaming: bool = False
) -> Dataset | IterableDataset:
    """One split of a prepared data set.

    Args:
        split: "validation" if not given, or the only one where there is one.
        streaming: an `IterableDataset` that reads while iterating.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is no prepared data set, or has no such split.
    """
    files = prepared_splits(folder)
    chosen = split or ("validation" if "validation" in files or len(files) > 1 else next(iter(files)))
    if chosen not in files:
        raise ValueError(f"the data set {folder} has no split {chosen!r}, only {', '.join(files)}")

    from datasets import load_dataset

    paths = [str(path) for path in files[chosen]]
    return load_dataset("parquet", data_files={chosen: paths}, split=chosen, streaming=streaming)


def count_rows(folder: Path | str, split: str) -> int:
    """How many images a split of a prepared data set has, without reading them; raises as `prepared_splits`."""
    import pyarrow.parquet

    files = prepared_splits(folder)
    if split not in files:
        raise ValueError(f"the data set {folder} has no split {split!r}, only {', '.join(files)}")
    return sum(pyarrow.parquet.read_metadata(path).num_rows for path in files[split])


def sample_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as arrays, image and maps upright and of one size.

    Args:
        row: with images decoded by `datasets` or not (`{"bytes": ...}`, as after `dataset.decode(False)`).

    Returns:
        `image` (RGB PIL image), `label` ((H, W) uint8 or uint16), `panoptic` ((H, W) int32, or None), `segments`
        (list of {"id", "category_id", "isthing", "iscrowd"}; empty without panoptic map) and `image_id` (str).

    Raises:
        ValueError: image and maps differ in size, or the image is of a mode that cannot be shown.
    """
    from modeling_ita.image_processing_ita import image_to_rgb

    image = image_to_rgb(_image(row["image"]))
    label = np.array(ImageOps.exif_transpose(_image(row["label"])))
    panoptic = None
    if row.get("panoptic") is not None:
        channels = np.array(ImageOps.exif_transpose(_image(row["panoptic"]))).astype(np.int32)
        panoptic = channels[..., 0] + 256 * channels[..., 1] + 65536 * channels[..., 2]
    for name, array in (("label", label), ("panoptic", panoptic)):
        if array is not None and array.shape != image.size[::-1]:
            raise ValueError(
                f"{row['image_id']}: its {name} map is {array.shape}, its image {image.size[::-1]}"
            )
    segments = [{"iscrowd": False, **segment} for segment in row.get("segments") or []]
    return {
        "image": image,
        "label": label,
        "panoptic": panoptic,
        "segments": segments,
        "image_id": str(row["image_id"]),
    }


def _image(value: Any) -> Image.Image:
    """A PIL image, decoded if it is not yet."""
    return Image.open(io.BytesIO(value["bytes"])) if isinstance(value, Mapping) else value
