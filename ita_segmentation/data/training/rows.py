"""Rows of a data set on disk as arrays, and the order in which an epoch takes them.

Two ways to the same rows. `MappedRows`: a `datasets.Dataset`, memory-mapped; any row is as near as any other.
`ParquetRows`: the parquet files of a prepared data set as they lie, without the copy that `datasets` makes of them in
its cache; a row is read with its row group, so an epoch goes through the groups in random order and shuffles within
a window of them.

Both are addressed by index, not iterated. So a sampler decides alone what is read where: batches are shared among
processes and workers by index, and resuming in the middle of an epoch skips indices, and decodes nothing.
"""

import io
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet
import torch
from datasets import Dataset as ArrowDataset
from datasets import Image as ImageFeature
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Sampler

from ita_segmentation.errors import one_line
from ita_segmentation.images import DECODING_ERRORS
from modeling_ita.image_processing_ita import image_to_rgb


class CorruptImage(ValueError):
    """An image, or its label map, that cannot serve; the message is one line and names it.

    A `DataLoader` raises a worker's exception again with the whole traceback as message: only its last line is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().splitlines()[-1].rpartition("CorruptImage: ")[2])


class Rows(Protocol):
    """Rows of a split, images not decoded."""

    split: str
    columns: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def order(self, generator: torch.Generator) -> Tensor:
        """(N,) int64: all indices, shuffled."""
        ...


class MappedRows:
    """Rows of a `datasets.Dataset`.

    Args:
        dataset: with images in `Image` columns.
        split: how the split is called in messages.
        limit: take so many rows at most.
    """

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
        return torch.randperm(len(self), generator=generator)


class ParquetRows:
    """Rows of parquet files, read where they lie.

    Args:
        files: of one split, in order.
        split: how the split is called in messages.
        window: how many rows are shuffled among each other, and kept in memory by each worker that reads them.
        limit: take so many rows at most.
    """

    NEEDED = ("image", "label", "panoptic", "segments", "image_id")

    def __init__(self, files: list[Path], split: str, window: int, limit: int | None = None) -> None:
        self.files, self.split = files, split
        self.groups: list[tuple[int, int]] = []  # file, row group of it
        self.starts: list[int] = []
        total = 0
        for number, path in enumerate(files):
            metadata = pyarrow.parquet.read_metadata(path)
            for group in range(metadata.num_row_groups):
                self.groups.append((number, group))
                self.starts.append(total)
                total += metadata.row_group(group).num_rows
        self.total = total if limit is None else min(limit, total)
        names = pyarrow.parquet.read_schema(files[0]).names
        self.columns = [name for name in self.NEEDED if name in names]
        self.num_kept = max(1, round(window * len(self.groups) / max(total, 1)))
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.total:
            raise IndexError(index)
        group = bisect_right(self.starts, index) - 1
        return self._table(group).slice(index - self.starts[group], 1).to_pylist()[0]

    def order(self, generator: torch.Generator) -> Tensor:
        groups = torch.randperm(len(self.groups), generator=generator)
        starts = torch.tensor([*self.starts, self.total]).clamp(max=self.total).tolist()
        parts = []
        for window in groups.split(self.num_kept):
            rows = torch.cat([torch.arange(starts[g], starts[g + 1]) for g in window.tolist()])
            parts.append(rows[torch.randperm(len(rows), generator=generator)])
        return torch.cat(parts)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": OrderedDict()}

    def _table(self, group: int) -> Any:
        """A row group, the last used ones from memory."""
        if group not in self._kept:
            number, place = self.groups[group]
            with pyarrow.parquet.ParquetFile(self.files[number]) as file:
                self._kept[group] = file.read_row_group(place, columns=self.columns, use_threads=False)
            if len(self._kept) > self.num_kept:
                self._kept.popitem(last=False)
        self._kept.move_to_end(group)
        return self._kept[group]


class EpochSampler(Sampler[int]):
    """All examples of a data set once, in an order of the epoch's own; an index says the epoch, too.

    It yields `epoch * len(dataset) + index`. A worker process holds a copy of the data set that no `set_epoch` ever
    reaches; what it is handed, here, is all that it needs to draw the augmentation of that epoch. So the examples are
    the same for any number of workers and processes, and after resuming.

    accelerate announces an epoch to the sampler, or where a resumed run's batch samplers hide it, to the data set:
    both come to the same place.

    Args:
        dataset: has `rows`, `seed`, `epoch` and `set_epoch`.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        epoch = self.dataset.epoch
        order = self.dataset.rows.order(torch.Generator().manual_seed(seed_of(self.dataset.seed, epoch)))
        yield from (epoch * len(self.dataset) + order).tolist()


def seed_of(*key: int) -> int:
    """A seed of 63 bits for a tuple of non-negative integers, unlike that of any neighbouring tuple."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


# ------------------------------------------------------------------------------------------------------------
# One row


def image_id_of(rows: Rows, index: int, row: Mapping[str, Any]) -> str:
    """The row's `image_id`, or SPLIT[INDEX] where there is none."""
    value = row.get("image_id")
    return f"{rows.split}[{index}]" if value is None else str(value)


def read_row(rows: Rows, index: int, map_column: str) -> tuple[Tensor, np.ndarray, dict[str, Any]]:
    """Image and label map of a row, upright and of one size, and the row.

    Args:
        map_column: "label" or "panoptic".

    Returns:
        The image (3, H, W) uint8, its colours innermost in memory (torchvision resizes it faster so); the map
        (H, W) of integers; the row as it is stored.

    Raises:
        CorruptImage: an image is cut off or damaged, or the two differ in size.
    """
    row = rows[index]
    name = image_id_of(rows, index, row)
    where = f"{name} ({rows.split}[{index}])"
    part = "image"
    try:
        image = image_to_rgb(_opened(row["image"]))
        part = f"{map_column} map"
        labels = label_array(row[map_column])
    except (*DECODING_ERRORS, Image.DecompressionBombError) as error:
        raise CorruptImage(f"{where}: its {part} cannot be read: {one_line(error, 120)}") from error
    if labels.shape != image.size[::-1]:
        sizes = f"{labels.shape[1]} x {labels.shape[0]} pixels, its image {image.width} x {image.height}"
        raise CorruptImage(f"{where}: its {map_column} map has {sizes}")
    return image_tensor(image), labels, row


def image_tensor(image: Image.Image) -> Tensor:
    """An RGB PIL image as (3, H, W) uint8, colours innermost in memory."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def label_array(labels: Any) -> np.ndarray:
    """A label map as (H, W) integers: an array, or an encoded or decoded image (colours hold R + 256 G + 65536 B)."""
    if isinstance(labels, Mapping | Image.Image):
        labels = ImageOps.exif_transpose(_opened(labels))
    array = np.asarray(labels)
    if array.ndim == 2:
        return array
    channels = array.astype(np.int32)
    return channels[..., 0] | channels[..., 1] << 8 | channels[..., 2] << 16


def _opened(value: Any) -> Image.Image:
    """A PIL image, of `{"bytes", "path"}` if it is not one yet."""
    if not isinstance(value, Mapping):
        return value
    return Image.open(value["path"] if value.get("bytes") is None else io.BytesIO(value["bytes"]))
