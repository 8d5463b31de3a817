"""Load the datasets that `ita prepare` writes: their splits, their vocabulary, their rows as arrays.

They are plain `datasets` folders: `load_dataset(folder)` reads them too, from disk or as a stream, also after
`push_to_hub`. Columns, in this order:

- `image`: the file content of the official release.
- `label`: lossless PNG of class indices, 8 bits with 255 ignored, or 16 bits with 65535 ignored above 255 classes.
- `panoptic` (RGB PNG, segment id = R + 256 G + 65536 B, 0 for none) and `segments` (id, category_id, isthing,
  iscrowd of each), where the release has segments.
- `classes` and `things`: the classes, and thing classes, in the image. Their features name all classes of the
  vocabulary; the name of a class is "name, synonym, ...". There is no `things` where the release does not distinguish
  things from stuff.
- `ignore_index`, the same in every row, and `image_id`.

Maps have the size of the image as stored. `datasets` rotates images as their EXIF data says; the maps of such an
image have the same EXIF tag, so that `datasets` and `decode_row` rotate both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from ita_segmentation.data.segment_maps import rgb_to_ids
from ita_segmentation.errors import ITAError
from ita_segmentation.images import open_image

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset, IterableDataset

INCOMPLETE = ".incomplete"  # folder inside a dataset's where `ita prepare` works until everything is finished
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.parquet")


@dataclass(frozen=True)
class DatasetVocabulary:
    """The classes of a dataset.

    Attributes:
        classes: K classes, each a list of names.
        is_thing: (K,) whether instances are labeled separately; None where that is not known.
        ignore_index: the label of ignored pixels.
    """

    classes: list[list[str]]
    is_thing: list[bool] | None
    ignore_index: int


def vocabulary_of(dataset: Dataset | IterableDataset) -> DatasetVocabulary:
    """Read the vocabulary of a prepared dataset from its features and its first row; ITAError if it has none."""
    features = dataset.features or {}
    names = _class_names(features.get("classes"))
    if names is None or "ignore_index" not in features:
        raise ITAError(
            "this is not a prepared dataset: it needs the columns classes (list of ClassLabel) and ignore_index, "
            f"and has {', '.join(features) or 'none that are known'}"
        )
    things = _class_names(features.get("things"))
    row = next(iter(dataset.select_columns(["ignore_index"])), None)
    if row is None:
        raise ITAError("the dataset has no rows")
    return DatasetVocabulary(
        classes=[[part.strip() for part in name.split(",")] for name in names],
        is_thing=None if things is None else [name in set(things) for name in names],
        ignore_index=row["ignore_index"],
    )


def _class_names(feature: Any) -> list[str] | None:
    """Names of a list of ClassLabel; None if the feature is anything else."""
    names = getattr(getattr(feature, "feature", None), "names", None)
    return None if names is None else list(names)


def prepared_splits(folder: Path | str) -> dict[str, list[Path]]:
    """List the splits of a prepared dataset and their files, in order; ITAError unless they are complete and alike."""
    import pyarrow.parquet

    folder = Path(folder)
    if not folder.is_dir():
        raise ITAError(f"there is no dataset folder {folder}")
    shards: dict[str, list[tuple[re.Match[str], Path]]] = {}
    for path in sorted((folder / "data").glob("*.parquet")):
        match = _SHARD.fullmatch(path.name)
        if match:
            shards.setdefault(match["split"], []).append((match, path))
    if not shards and (folder / INCOMPLETE).is_dir():
        raise ITAError(f"the dataset {folder} is incomplete: run ita prepare with the same arguments again")
    if not shards:
        raise ITAError(f"{folder} is not a dataset that ita prepare made: it has no data/*.parquet")
    columns = set()
    for split, files in shards.items():
        numbers, totals = [int(match["number"]) for match, _ in files], {int(m["total"]) for m, _ in files}
        if totals != {len(files)} or numbers != list(range(len(files))):
            raise ITAError(
                f"the dataset {folder} lacks files of {split}: {len(files)} are there, {max(totals)} belong to it"
            )
        for _, path in files:
            try:
                columns.add(columns_of(pyarrow.parquet.read_schema(path)))
            except (OSError, pyarrow.ArrowException) as error:
                raise ITAError(f"{path} is damaged: run ita prepare with the same arguments again") from error
            if len(columns) > 1:
                raise ITAError(f"the files of {folder} differ in columns or classes, such as {path.name}")
    return {split: [path for _, path in files] for split, files in shards.items()}


def columns_of(schema: pyarrow.Schema) -> tuple[object, ...]:
    """Describe the columns and classes of a parquet file in a form that can be compared."""
    return (*schema.names, (schema.metadata or {}).get(b"huggingface"))


def load_prepared(
    folder: Path | str, split: str | None = None, streaming: bool = False
) -> Dataset | IterableDataset:
    """Load one split of a prepared dataset.

    Args:
        folder: the folder of the dataset.
        split: the split; by default "validation", or the only one.
        streaming: return an `IterableDataset`, which reads while iterating.

    Raises:
        ITAError: as `prepared_splits`, or if there is no such split.
    """
    splits = prepared_splits(folder)
    chosen = split or ("validation" if "validation" in splits or len(splits) > 1 else next(iter(splits)))
    paths = [str(path) for path in _files_of(folder, splits, chosen)]

    from datasets import load_dataset

    return load_dataset("parquet", data_files={chosen: paths}, split=chosen, streaming=streaming)


def count_rows(folder: Path | str, split: str) -> int:
    """Count the images of a split of a prepared dataset without reading them; raises as `load_prepared`."""
    import pyarrow.parquet

    files = _files_of(folder, prepared_splits(folder), split)
    return sum(pyarrow.parquet.read_metadata(path).num_rows for path in files)


def _files_of(folder: Path | str, splits: Mapping[str, list[Path]], split: str) -> list[Path]:
    if split not in splits:
        raise ITAError(f"the dataset {folder} has no split {split!r}, only {', '.join(splits)}")
    return splits[split]


def decode_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Decode a row into arrays, image and maps upright and of the same size.

    Args:
        row: with images decoded by `datasets` or not (`{"bytes": ...}`, as after `dataset.decode(False)`).

    Returns:
        `image` (RGB PIL image), `label` ((H, W) uint8 or uint16), `panoptic` ((H, W) int32, or None), `segments`
        (list of {"id", "category_id", "isthing", "iscrowd"}; empty without a panoptic map) and `image_id` (str).

    Raises:
        ValueError: if image and maps differ in size, or the image has a mode that cannot be converted to RGB.
    """
    from modeling_ita.image_io import image_to_rgb

    image = image_to_rgb(_image(row["image"]))
    label = np.array(ImageOps.exif_transpose(_image(row["label"])))
    panoptic = None
    if row.get("panoptic") is not None:
        panoptic = rgb_to_ids(np.array(ImageOps.exif_transpose(_image(row["panoptic"]))))
    for name, array in (("label", label), ("panoptic", panoptic)):
        if array is not None and array.shape != image.size[::-1]:
            size = image.size[::-1]
            raise ValueError(f"{row['image_id']}: its {name} map is {array.shape}, its image {size}")
    return {
        "image": image,
        "label": label,
        "panoptic": panoptic,
        "segments": [{"iscrowd": False, **segment} for segment in row.get("segments") or []],
        "image_id": str(row["image_id"]),
    }


def _image(value: Any) -> Image.Image:
    """A PIL image, decoded if it is not yet."""
    return open_image(value["bytes"]) if isinstance(value, Mapping) else value
