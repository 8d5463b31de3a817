"""Random access to the rows of a dataset on disk, and the order in which an epoch reads them.

`MappedRows` reads a memory-mapped `datasets.Dataset`; `ParquetRows` reads the parquet files of a prepared dataset in
place, without the copy that `datasets` makes in its cache. Both are indexed, not iterated: a sampler alone decides
what is read where, so processes and workers share batches by index, and resuming in the middle of an epoch skips
indices without decoding anything. (The state of a `datasets.IterableDataset` loses its shuffle buffer, and the state
of a stateful loader belongs to one number of workers.)
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from datasets import Dataset as ArrowDataset
from datasets import Image as ImageFeature
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Sampler

from ita_segmentation.data.segment_maps import rgb_to_ids
from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.images import DECODING_ERRORS, open_image
from modeling_ita.image_io import image_to_rgb


class CorruptImageError(ITAError):
    """An image or label map that cannot be used; the message is one line and names it.

    A `DataLoader` raises it again with the traceback of a worker as the message, of which only the last line is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().splitlines()[-1].rpartition("CorruptImageError: ")[2])


class MappedRows:
    """The first rows (None: all) of a `datasets.Dataset` with images in `Image` columns."""

    def __init__(self, dataset: ArrowDataset, split: str, limit: int | None = None) -> None:
        for name, feature in dataset.features.items():
            if isinstance(feature, ImageFeature):
                dataset = dataset.cast_column(name, ImageFeature(decode=False))
        self.dataset = dataset if limit is None else dataset.select(range(min(limit, len(dataset))))
        self.split = split
        self.columns = list(dataset.column_names)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index]

    def order(self, generator: torch.Generator) -> Tensor:
        """Shuffle all indices, (N,) int64."""
        return torch.randperm(len(self), generator=generator)


class ParquetRows:
    """The first rows (None: all) of parquet files, read in place, each with its row group.

    An epoch visits the row groups in random order and shuffles within a window of so many rows, which each worker keeps
    in memory.
    """

    COLUMNS = ("image", "label", "panoptic", "segments", "image_id")

    def __init__(self, files: list[Path], split: str, window: int, limit: int | None = None) -> None:
        self.split = split
        self.groups: list[tuple[Path, int]] = []  # file, row group
        self.starts = [0]  # first row of each group, and the number of rows
        for path in files:
            metadata = pyarrow.parquet.read_metadata(path)
            for group in range(metadata.num_row_groups):
                self.groups.append((path, group))
                self.starts.append(self.starts[-1] + metadata.row_group(group).num_rows)
        self.num_rows = self.starts[-1] if limit is None else min(limit, self.starts[-1])
        self.columns = [name for name in self.COLUMNS if name in pyarrow.parquet.read_schema(files[0]).names]
        self.num_cached = max(1, round(window * len(self.groups) / max(self.starts[-1], 1)))
        self._cache: OrderedDict[int, pyarrow.Table] = OrderedDict()

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.num_rows:
            raise IndexError(index)
        group = bisect_right(self.starts, index) - 1
        return self._read_group(group).slice(index - self.starts[group], 1).to_pylist()[0]

    def order(self, generator: torch.Generator) -> Tensor:
        """Shuffle all indices within windows of shuffled row groups, (N,) int64."""
        starts = torch.tensor(self.starts).clamp(max=self.num_rows).tolist()
        parts = []
        for window in torch.randperm(len(self.groups), generator=generator).split(self.num_cached):
            rows = torch.cat([torch.arange(starts[g], starts[g + 1]) for g in window.tolist()])
            parts.append(rows[torch.randperm(len(rows), generator=generator)])
        return torch.cat(parts)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": OrderedDict()}

    def _read_group(self, group: int) -> pyarrow.Table:
        """Read a row group; those used last are cached."""
        if group not in self._cache:
            path, number = self.groups[group]
            with pyarrow.parquet.ParquetFile(path) as file:
                self._cache[group] = file.read_row_group(number, columns=self.columns, use_threads=False)
            if len(self._cache) > self.num_cached:
                self._cache.popitem(last=False)
        self._cache.move_to_end(group)
        return self._cache[group]


Rows = MappedRows | ParquetRows


class EpochSampler(Sampler[int]):
    """All examples of a dataset once, in an order that depends on the epoch; indices include the epoch.

    Yields `epoch * len(dataset) + index`, all that a worker's copy of the dataset, which no `set_epoch` reaches, needs
    to draw the augmentation of that epoch. accelerate announces an epoch to the sampler or, where the batch samplers of
    a resumed run hide it, to the dataset; both set the same attribute.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        epoch = self.dataset.epoch
        order = self.dataset.rows.order(torch.Generator().manual_seed(seed_of(self.dataset.seed, epoch)))
        yield from (epoch * len(self.dataset) + order).tolist()


def seed_of(*key: int) -> int:
    """Derive a 63-bit seed from non-negative integers; neighboring keys have unrelated seeds."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def image_id_of(rows: Rows, index: int, row: Mapping[str, Any]) -> str:
    """The row's `image_id`, or SPLIT[INDEX] if it has none."""
    value = row.get("image_id")
    return f"{rows.split}[{index}]" if value is None else str(value)


def read_row(rows: Rows, index: int, map_column: str) -> tuple[Tensor, np.ndarray, dict[str, Any]]:
    """Decode the image and a map ("label" or "panoptic") of a row, upright and of the same size.

    Returns the image (3, H, W) uint8, channels last in memory (torchvision resizes it faster), the map (H, W) of
    integers, and the row; raises CorruptImageError.
    """
    row = rows[index]
    where = f"{image_id_of(rows, index, row)} ({rows.split}[{index}])"
    part = "image"
    try:
        image = image_to_rgb(_open(row["image"]))
        part = f"{map_column} map"
        labels = row[map_column]
        if isinstance(labels, Mapping | Image.Image):
            labels = ImageOps.exif_transpose(_open(labels))
        labels = np.asarray(labels)
        labels = labels if labels.ndim == 2 else rgb_to_ids(labels)
    except (*DECODING_ERRORS, Image.DecompressionBombError) as error:
        raise CorruptImageError(f"{where}: its {part} cannot be read: {one_line(error, 120)}") from error
    if labels.shape != image.size[::-1]:
        sizes = f"{labels.shape[1]} x {labels.shape[0]} pixels, its image {image.width} x {image.height}"
        raise CorruptImageError(f"{where}: its {map_column} map has {sizes}")
    return image_tensor(image), labels, row


def image_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB PIL image to (3, H, W) uint8, channels last in memory."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _open(value: Any) -> Image.Image:
    """Open `{"bytes", "path"}`, unless it is a PIL image already."""
    if not isinstance(value, Mapping):
        return value
    return open_image(value["path"] if value.get("bytes") is None else value["bytes"])
