"""Training and evaluation examples from a dataset on disk (decoded, augmented, turned into masks) or of Scenes.

An example depends on the seed, the epoch and its index alone: not on the number of processes and workers, nor on what
was drawn before. A run that is resumed in the middle of an epoch sees, bit for bit, what an unbroken one sees.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_from_disk
from PIL import Image
from torch.utils.data import Dataset

from ita_segmentation.data.prepared import INCOMPLETE, load_prepared, prepared_splits
from ita_segmentation.data.scenes import scene
from ita_segmentation.data.training.augmentation import Augmentation, seeded
from ita_segmentation.data.training.classes import (
    TrainingClasses,
    class_names,
    dataset_classes,
    scenes_classes,
)
from ita_segmentation.data.training.rows import (
    CorruptImageError,
    EpochSampler,
    MappedRows,
    ParquetRows,
    Rows,
    image_id_of,
    image_tensor,
    read_row,
)
from ita_segmentation.data.training.targets import TargetMap, segment_targets, semantic_targets
from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.files import write_files
from ita_segmentation.visualization import paint_segments

INFINITE_LENGTH = 10_000_000  # the length of a dataset without end, which samplers need to know
MAX_CORRUPT = 100  # this many corrupt images in a row end a run even if they may be skipped


PREVIEW_MARGIN = 4


class DiskTraining(Dataset):
    """Training examples of rows with columns `image` and either `label` or `panoptic` and `segments`.

    Indices continue over epochs: `epoch * len(self) + index` is example `index` as augmented in that epoch.

    Args:
        rows: `image`; `label` (class ids and the ignore index), or `panoptic` (segment ids) with `segments` (list of
            {"id", "category_id", "isthing"}, and perhaps "iscrowd"), which is preferred.
        classes: the dataset's classes.
        augmentation: of image and target map.
        seed: of order and augmentation.
        skip_corrupt: use the next image in place of a corrupt one, and list that in `skipped`; otherwise raise.
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
        self.training_label = classes.training_label
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that `epoch_sampler` yields."""
        self.epoch = epoch

    def epoch_sampler(self) -> EpochSampler:
        """The sampler to train with."""
        return EpochSampler(self)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Read an example; raises CorruptImageError if it, or a hundred one after another, cannot be read.

        It has `image` (3, h, w) uint8, `mask_labels` (n, h, w) bool, `class_labels` (n,) int64, `image_id`, and
        `skipped`, the ids of corrupt images whose place it takes.
        """
        epoch, index = divmod(position, len(self))
        skipped: list[str] = []
        while True:
            try:
                return self._example(epoch, index) | {"skipped": skipped}
            except CorruptImageError:
                skipped.append(image_id_of(self.rows, index, self.rows[index]))
                if not self.skip_corrupt or len(skipped) >= min(MAX_CORRUPT, len(self)):
                    raise
                index = (index + 1) % len(self)

    def _example(self, epoch: int, index: int) -> dict[str, Any]:
        image, labels, row = read_row(self.rows, index, "panoptic" if self.panoptic else "label")
        name = image_id_of(self.rows, index, row)
        try:
            if self.panoptic:
                targets = segment_targets(labels, _as_list(row["segments"]), self.training_label)
            else:
                targets = semantic_targets(labels, self.training_label, self.classes.ignore_index)
        except ValueError as error:
            raise CorruptImageError(f"{name} ({self.rows.split}[{index}]): {error}") from error
        with seeded(self.seed, epoch, index):
            image, numbers = self.augmentation(image, targets.numbers)
        masks, class_labels = TargetMap(numbers, targets.classes).masks()
        return {"image": image, "mask_labels": masks, "class_labels": class_labels, "image_id": name}


class DiskEvaluation(Dataset):
    """Evaluation examples of rows with columns `image` and `label`, each at its own size.

    With `skip_corrupt`, a small black image without labels stands for a corrupt one; otherwise that raises.
    """

    def __init__(self, rows: Rows, ignore_index: int, skip_corrupt: bool = False) -> None:
        self.rows, self.ignore_index, self.skip_corrupt = rows, ignore_index, skip_corrupt

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read an example: `image` (3, H, W) uint8, `label` (H, W), `image_id`, `skipped` as of `DiskTraining`."""
        try:
            image, label, row = read_row(self.rows, index, "label")
        except CorruptImageError:
            if not self.skip_corrupt:
                raise
            name = image_id_of(self.rows, index, self.rows[index])
            image = torch.zeros(3, 32, 32, dtype=torch.uint8)
            label = torch.full((32, 32), self.ignore_index).numpy()
            return {"image": image, "label": label, "image_id": name, "skipped": [name]}
        name = image_id_of(self.rows, index, row)
        return {"image": image.contiguous(), "label": label, "image_id": name, "skipped": []}


def _as_list(segments: Any) -> list[dict[str, Any]]:
    """A list of dictionaries, also from the dictionary of lists that files of older `datasets` versions give."""
    if isinstance(segments, dict):
        return [dict(zip(segments, values, strict=True)) for values in zip(*segments.values(), strict=True)]
    return list(segments)


def load_disk(
    folder: str,
    *,
    train_split: str,
    eval_split: str,
    unseen: Sequence[str],
    augmentation: Augmentation,
    eval_images: int,
    seed: int = 0,
    skip_corrupt: bool = False,
    shuffle_window: int | None = None,
) -> tuple[TrainingClasses, DiskTraining, DiskEvaluation | None]:
    """Load a dataset that `ita prepare` made or `datasets` saved.

    Args:
        folder: the folder of a prepared dataset, of a `DatasetDict`, or of a `Dataset`, which is all for training.
        train_split: the split to train on.
        eval_split: the split to evaluate on, if it exists.
        unseen: names of classes whose masks are withheld.
        augmentation: the augmentation of training examples.
        eval_images: evaluate on at most this many images.
        seed: as of `DiskTraining`.
        skip_corrupt: as of `DiskTraining`.
        shuffle_window: read the parquet files of a prepared dataset in place, and shuffle within this many rows;
            None: memory-mapped, through the copy that `datasets` keeps in its cache.

    Returns:
        Classes, training examples, and evaluation examples (None if there are none).

    Raises:
        ITAError: if there is no dataset, something of it is missing, or the arguments do not fit it.
    """
    if not Path(folder).is_dir():
        raise ITAError(f"there is no dataset folder {folder}")
    splits = _load_splits(folder, train_split, eval_split, streaming=shuffle_window is not None)
    if train_split not in splits:
        raise ITAError(f"{folder} has no split {train_split!r}, only {', '.join(splits)}")
    columns = set(splits[train_split].column_names)
    if "image" not in columns or not ({"label"} <= columns or {"panoptic", "segments"} <= columns):
        raise ITAError(
            f"{folder} needs columns image and label, or image, panoptic and segments; it has {sorted(columns)}"
        )
    classes = dataset_classes(splits[train_split], unseen)

    def rows_of(split: str, limit: int | None = None) -> Rows:
        if shuffle_window is None:
            return MappedRows(splits[split], split, limit)
        return ParquetRows(prepared_splits(folder)[split], split, shuffle_window, limit)

    training = DiskTraining(rows_of(train_split), classes, augmentation, seed, skip_corrupt)
    if not len(training):
        raise ITAError(f"the split {train_split!r} of {folder} has no images")
    evaluation = None
    if eval_split in splits and eval_split != train_split and "label" in splits[eval_split].column_names:
        if class_names(splits[eval_split].features) and not dataset_classes(splits[eval_split]).same_labels(
            classes
        ):
            raise ITAError(f"the splits {train_split} and {eval_split} of {folder} have different classes")
        evaluation = DiskEvaluation(rows_of(eval_split, eval_images), classes.ignore_index, skip_corrupt)
    return classes, training, evaluation


def _load_splits(folder: str, train_split: str, eval_split: str, streaming: bool) -> Mapping[str, Any]:
    """Load the splits in a folder with `datasets`; of a prepared dataset, only the two asked for."""
    saved = any((Path(folder) / name).is_file() for name in ("dataset_dict.json", "state.json"))
    if not saved and any((Path(folder) / name).is_dir() for name in ("data", INCOMPLETE)):
        names = list(prepared_splits(folder))
        chosen = [name for name in names if name in (train_split, eval_split)] or names
        return {name: load_prepared(folder, name, streaming) for name in chosen}
    if streaming:
        raise ITAError(f"streaming needs a dataset that ita prepare made; {folder} is not one")
    try:
        loaded = load_from_disk(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ITAError(f"{folder} is not a dataset: {one_line(error, 160)}") from error
    return loaded if isinstance(loaded, dict) else {train_split: loaded}


class ScenesTraining(Dataset):
    """Training examples without end: square scenes of seen classes only; an index always gives the same image."""

    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size
        self.training_label = scenes_classes().training_label

    def __len__(self) -> int:
        return INFINITE_LENGTH

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Draw an example: `image`, `mask_labels`, `class_labels` and `image_id`."""
        drawn = scene(self.seed, index, self.size, classes="seen")
        masks, labels = segment_targets(drawn.panoptic, drawn.segments, self.training_label).masks()
        return {
            "image": image_tensor(drawn.image).contiguous(),
            "mask_labels": masks,
            "class_labels": labels,
            "image_id": f"scenes{self.seed}[{index}]",
        }


class ScenesEvaluation(Dataset):
    """Evaluation examples: square scenes of all classes, seen and unseen."""

    def __init__(self, seed: int, size: int, num_images: int) -> None:
        self.seed, self.size, self.num_images = seed, size, num_images

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Draw an example: `image`, `label` and `image_id`."""
        if not 0 <= index < self.num_images:
            raise IndexError(index)
        drawn = scene(self.seed, index, self.size, classes="all")
        image = image_tensor(drawn.image).contiguous()
        return {"image": image, "label": drawn.semantic, "image_id": f"scenes{self.seed}[{index}]"}


def show_augmented(dataset: Any, path: Path | str, rows: int = 3, columns: int = 4, tile: int = 224) -> None:
    """Draw the first images of a training dataset to a JPEG, one a row, each as its first epochs show it.

    Each mask has a color; what no mask covers (void, crowds, unseen classes) is not painted. An image smaller than the
    crop is at the top left on black. One example is `tile` pixels wide and high.
    """
    step = tile + PREVIEW_MARGIN
    sheet = Image.new("RGB", (columns * step - PREVIEW_MARGIN, rows * step - PREVIEW_MARGIN), "white")
    for row in range(rows):
        for column in range(columns):
            example = dataset[column * len(dataset) + row]
            drawn = _draw(example, tile / dataset.augmentation.size)
            corner = (column * step, row * step)
            sheet.paste((0, 0, 0), (*corner, corner[0] + tile, corner[1] + tile))
            sheet.paste(drawn, corner)
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=85)
    write_files({Path(path): buffer.getvalue()})


def _draw(example: dict[str, Any], scale: float) -> Image.Image:
    """Paint the masks of an example over its image, scaled."""
    image = Image.fromarray(np.ascontiguousarray(example["image"].permute(1, 2, 0).numpy()))
    ids = np.zeros(image.size[::-1], np.int64)
    for number, mask in enumerate(example["mask_labels"].numpy(), start=1):
        ids[mask] = number
    legend = [(number, "", None) for number in range(1, len(example["mask_labels"]) + 1)]
    painted = paint_segments(image, ids, legend)[0]
    size = (max(1, round(painted.width * scale)), max(1, round(painted.height * scale)))
    return painted.resize(size, Image.Resampling.BILINEAR)
