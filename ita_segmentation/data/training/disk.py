"""Training and evaluation examples from a data set on disk: decoded, augmented, and turned into masks.

What an example looks like is a function of the seed, the epoch and its index, and of nothing else: not of the number
of processes and workers, nor of what was drawn before. A run that is resumed in the middle of an epoch sees, bit for
bit, what an unbroken one sees.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from torch.utils.data import Dataset

from ita_segmentation.data.prepared import UNFINISHED, load_prepared, prepared_splits
from ita_segmentation.data.training.augmentation import Augmentation, own_randomness
from ita_segmentation.data.training.classes import TrainingClasses, disk_classes
from ita_segmentation.data.training.rows import (
    CorruptImage,
    EpochSampler,
    MappedRows,
    ParquetRows,
    Rows,
    image_id_of,
    read_row,
)
from ita_segmentation.data.training.targets import TargetMap, label_map_targets, segment_map_targets

MOST_CORRUPT = 100
"""So many corrupt images in a row end a run even if they may be skipped: then it is not the images."""


class DiskTraining(Dataset):
    """Training examples of rows with columns `image` and either `label` or `panoptic` and `segments`.

    Indices count on over epochs: `epoch * len(self) + index` is example `index` as augmented in that epoch.

    Args:
        rows: `image`; `label` (class ids and the classes' ignore index), or `panoptic` (segment ids) with `segments`
            (list of {"id", "category_id", "isthing"}, and perhaps "iscrowd"), which is taken if there is one.
        classes: the data set's classes.
        augmentation: of image and target map.
        seed: of order and augmentation.
        skip_corrupt: take the next image in the place of one that is corrupt, and list it in `skipped`; otherwise
            it ends the run.
    """

    def __init__(
        self,
        rows: Rows,
        classes: TrainingClasses,
        augmentation: Augmentation,
        seed: int = 0,
        skip_corrupt: bool = False,
    ) -> None:
        self.rows, self.classes, self.augmentation = rows, classes, augmentation
        self.seed, self.skip_corrupt = seed, skip_corrupt
        self.panoptic = {"panoptic", "segments"} <= set(rows.columns)
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def epoch_sampler(self) -> EpochSampler:
        """The sampler to train with."""
        return EpochSampler(self)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """An example: `image` (3, h, w) uint8, `mask_labels` (n, h, w) bool, `class_labels` (n,) int64, `image_id`,
        and `skipped`, the ids of corrupt images in whose place it stands.

        Raises:
            CorruptImage: it, or a hundred one after another, cannot be read.
        """
        epoch, index = divmod(position, len(self))
        skipped: list[str] = []
        while True:
            try:
                return self._example(epoch, index) | {"skipped": skipped}
            except CorruptImage:
                skipped.append(image_id_of(self.rows, index, self.rows[index]))
                if not self.skip_corrupt or len(skipped) >= min(MOST_CORRUPT, len(self)):
                    raise
                index = (index + 1) % len(self)

    def _example(self, epoch: int, index: int) -> dict[str, Any]:
        image, labels, row = read_row(self.rows, index, "panoptic" if self.panoptic else "label")
        name = image_id_of(self.rows, index, row)
        try:
            targets = self._targets(labels, row)
        except ValueError as error:
            raise CorruptImage(f"{name} ({self.rows.split}[{index}]): {error}") from error
        with own_randomness(self.seed, epoch, index):
            image, numbers = self.augmentation(image, targets.numbers)
        masks, class_labels = TargetMap(numbers, targets.classes).masks()
        return {"image": image, "mask_labels": masks, "class_labels": class_labels, "image_id": name}

    def _targets(self, labels: Any, row: dict[str, Any]) -> TargetMap:
        if not self.panoptic:
            return label_map_targets(labels, self.classes.training_label, self.classes.ignore_index)
        segments = [{**segment, "class_id": segment["category_id"]} for segment in as_list(row["segments"])]
        return segment_map_targets(labels, segments, self.classes.training_label)


class DiskEvaluation(Dataset):
    """Evaluation examples of rows with columns `image` and `label`, each at its own size.

    Args:
        rows: `image` and `label`.
        ignore_index: the label of pixels that are left out.
        skip_corrupt: a small black image without a label stands for one that is corrupt; otherwise it ends the run.
    """

    def __init__(self, rows: Rows, ignore_index: int, skip_corrupt: bool = False) -> None:
        self.rows, self.ignore_index, self.skip_corrupt = rows, ignore_index, skip_corrupt

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`image` (3, H, W) uint8, `label` (H, W) of class ids, `image_id`, `skipped` as of `DiskTraining`."""
        try:
            image, label, row = read_row(self.rows, index, "label")
        except CorruptImage:
            if not self.skip_corrupt:
                raise
            name = image_id_of(self.rows, index, self.rows[index])
            image = torch.zeros(3, 32, 32, dtype=torch.uint8)
            label = torch.full((32, 32), self.ignore_index).numpy()
            return {"image": image, "label": label, "image_id": name, "skipped": [name]}
        name = image_id_of(self.rows, index, row)
        return {"image": image.contiguous(), "label": label, "image_id": name, "skipped": []}


def as_list(segments: Any) -> list[dict[str, Any]]:
    """A list of dictionaries, also from the dictionary of lists that older `datasets` files give."""
    if isinstance(segments, dict):
        return [dict(zip(segments, values, strict=True)) for values in zip(*segments.values(), strict=True)]
    return list(segments)


# ------------------------------------------------------------------------------------------------------------
# A folder


def load_disk(
    folder: str,
    *,
    train_split: str,
    eval_split: str,
    unseen: Sequence[str],
    jitter: Augmentation,
    eval_images: int,
    seed: int = 0,
    skip_corrupt: bool = False,
    shuffle_window: int | None = None,
) -> tuple[TrainingClasses, DiskTraining, DiskEvaluation | None]:
    """Classes, training and evaluation examples of a data set that `run_prepare.py` made or `datasets` saved.

    Args:
        folder: of a prepared data set, of a `DatasetDict`, or of a `Dataset`, which is then all for training.
        unseen: names of classes whose masks are withheld.
        jitter: augmentation of training.
        eval_images: evaluate on this many images at most.
        seed, skip_corrupt: as of `DiskTraining`.
        shuffle_window: read the parquet files of a prepared data set where they lie, and shuffle within so many
            rows; None: memory-mapped, through the copy that `datasets` keeps in its cache.

    Raises:
        FileNotFoundError: no such folder, or no data set in it.
        ValueError: a split, a column or the class names are missing, an unseen class is none of the classes, or
            `shuffle_window` with a data set that is not prepared.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no data set folder {folder}")
    splits = disk_splits(folder, train_split, eval_split, streaming=shuffle_window is not None)
    if train_split not in splits:
        raise ValueError(f"{folder} has no split {train_split!r}, only {', '.join(splits)}")
    columns = set(splits[train_split].column_names)
    if "image" not in columns or not ({"label"} <= columns or {"panoptic", "segments"} <= columns):
        raise ValueError(
            f"{folder} needs columns image and label, or image, panoptic and segments; it has {sorted(columns)}"
        )
    classes = disk_classes(splits[train_split], unseen)

    def rows_of(split: str, limit: int | None = None) -> Rows:
        if shuffle_window is None:
            return MappedRows(splits[split], split, limit)
        return ParquetRows(prepared_splits(folder)[split], split, shuffle_window, limit)

    training = DiskTraining(rows_of(train_split), classes, jitter, seed, skip_corrupt)
    if not len(training):
        raise ValueError(f"the split {train_split!r} of {folder} has no images")
    evaluation = None
    if eval_split in splits and eval_split != train_split and "label" in splits[eval_split].column_names:
        evaluation = DiskEvaluation(rows_of(eval_split, eval_images), classes.ignore_index, skip_corrupt)
    return classes, training, evaluation


def disk_splits(folder: str, train_split: str, eval_split: str, streaming: bool = False) -> dict[str, Any]:
    """The splits in a folder through `datasets`, of a prepared data set only the two asked for; raises as
    `load_disk`.
    """
    saved = any((Path(folder) / name).is_file() for name in ("dataset_dict.json", "state.json"))
    if not saved and any((Path(folder) / name).is_dir() for name in ("data", UNFINISHED)):
        names = list(prepared_splits(folder))
        wanted = [name for name in names if name in (train_split, eval_split)] or names
        return {name: load_prepared(folder, name, streaming) for name in wanted}
    if streaming:
        raise ValueError(f"streaming needs a data set that run_prepare.py made; {folder} is none")
    loaded = load_from_disk(folder)
    return loaded if isinstance(loaded, dict) else {train_split: loaded}
