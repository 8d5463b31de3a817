"""What a training run reads: pictures with one mask per segment, from the Scenes world or from a disk.

A training example is `{"image": (3, H, W) uint8, "mask_labels": (n, H, W) bool, "class_labels": (n,) int64}`
with classes counted in the *training* vocabulary; an evaluation example is `{"image", "label": (H, W) uint8}`
with classes counted in the whole vocabulary and 255 where there is none. Targets are Mask2Former's (arXiv
2112.01527): each thing instance is one mask, and so is each stuff class of a picture.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, load_from_disk
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from modeling_ita.vocabulary import normalize_vocabulary

from .augmentation import LargeScaleJitter
from .prepared import UNFINISHED, DatasetVocabulary, load_prepared, prepared_splits, vocabulary_of
from .scenes import IGNORE_INDEX, scene, scenes_vocabulary

ENDLESS = 10_000_000  # examples of a world without end: what a sampler counts to


@dataclass(frozen=True)
class TrainingClasses:
    """The classes of a data set, and which of them a training run may see masks of.

    Attributes:
        classes: K classes, each a list of names.
        seen: (K,) whether masks of the class are given in training.
        stuff_names: primary names of amorphous classes.
        ignore_index: label of pixels that are left out.
    """

    classes: list[list[str]]
    seen: list[bool]
    stuff_names: list[str]
    ignore_index: int = IGNORE_INDEX

    @property
    def seen_classes(self) -> list[list[str]]:
        """The training vocabulary."""
        return [names for names, seen in zip(self.classes, self.seen, strict=True) if seen]

    @property
    def training_label(self) -> np.ndarray:
        """(K,) int64: index of each class in the training vocabulary, -1 where it has none."""
        seen = np.asarray(self.seen)
        return np.where(seen, np.cumsum(seen) - 1, -1)


def segment_targets(
    segment_map: np.ndarray, segments: Iterable[dict[str, Any]], training_label: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Masks and classes of a panoptic map, things one by one and stuff merged by class.

    Args:
        segment_map: (H, W) integer ids.
        segments: {"id", "class_id", "isthing"} of each; ids that the map does not hold are passed over.
        training_label: (K,) as in `TrainingClasses.training_label`; classes at -1 are left out.

    Returns:
        `mask_labels` (n, H, W) bool and `class_labels` (n,) int64.
    """
    present = set(np.unique(segment_map).tolist())
    groups: dict[tuple[str, int], list[int]] = {}
    for segment in segments:
        if segment["id"] in present and training_label[segment["class_id"]] >= 0:
            key = ("thing", segment["id"]) if segment["isthing"] else ("stuff", segment["class_id"])
            groups.setdefault(key, []).append(segment["id"])
    class_of = {segment["id"]: segment["class_id"] for segment in segments}
    masks = [np.isin(segment_map, ids) if len(ids) > 1 else segment_map == ids[0] for ids in groups.values()]
    labels = [int(training_label[class_of[ids[0]]]) for ids in groups.values()]
    return _stack(masks, segment_map.shape), torch.tensor(labels, dtype=torch.int64)


def semantic_targets(
    label_map: np.ndarray, training_label: np.ndarray, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor]:
    """One mask per class of a semantic map (H, W) of class ids and `ignore_index`; returns as `segment_targets`."""
    classes = [c for c in np.unique(label_map).tolist() if c != ignore_index and training_label[c] >= 0]
    labels = torch.tensor([int(training_label[c]) for c in classes], dtype=torch.int64)
    return _stack([label_map == c for c in classes], label_map.shape), labels


def _stack(masks: Sequence[np.ndarray], shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.stack(masks)) if masks else torch.zeros((0, *shape), dtype=torch.bool)


# ------------------------------------------------------------------------------------------------------------
# The Scenes world


def scenes_classes() -> TrainingClasses:
    """The classes of the Scenes world with its split into seen and unseen."""
    vocabulary = scenes_vocabulary()
    stuff = [vocabulary.names[index] for index in vocabulary.stuff_ids]
    return TrainingClasses(vocabulary.classes, vocabulary.seen, stuff)


class ScenesTraining(Dataset):
    """Training examples without end: scenes of seen classes only, drawn when asked for.

    Args:
        seed: which world; an index always gives the same picture of it.
        size: side of the square pictures, in pixels.
    """

    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size
        self.training_label = scenes_classes().training_label

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        drawn = scene(self.seed, index, self.size, classes="seen")
        masks, labels = segment_targets(drawn.panoptic, drawn.segments, self.training_label)
        return {
            "image": picture_tensor(drawn.image),
            "mask_labels": masks,
            "class_labels": labels,
            "image_id": f"scenes{self.seed}[{index}]",
        }


class ScenesEvaluation(Dataset):
    """Evaluation examples: `num_images` scenes of all classes, seen and unseen."""

    def __init__(self, seed: int, size: int, num_images: int) -> None:
        self.seed, self.size, self.num_images = seed, size, num_images

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.num_images:
            raise IndexError(index)
        drawn = scene(self.seed, index, self.size, classes="all")
        return {"image": picture_tensor(drawn.image), "label": drawn.semantic}


# ------------------------------------------------------------------------------------------------------------
# A `datasets` data set on disk


class DiskTraining(Dataset):
    """Training examples from a `datasets.Dataset` with columns `image` and either `label` or `panoptic`.

    Args:
        dataset: `image` (Image); `label` (Image of class ids and the classes' ignore index), or `panoptic` (Image or
            array, segment ids) with `segments` (list of {"id", "category_id", "isthing"}, and perhaps "iscrowd":
            those are left out), taken if there is one.
        classes: the data set's classes.
        jitter: augmentation.
    """

    def __init__(self, dataset: Any, classes: TrainingClasses, jitter: LargeScaleJitter) -> None:
        self.dataset, self.jitter = dataset, jitter
        self.training_label, self.ignore_index = classes.training_label, classes.ignore_index
        self.panoptic = {"panoptic", "segments"} <= set(dataset.column_names)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        example = self.dataset[index]
        source = label_array(example["panoptic" if self.panoptic else "label"])
        image, labels = self.jitter(picture_tensor(example["image"]), torch.from_numpy(source))
        label_map = labels.numpy()
        if self.panoptic:
            segments = [
                {**row, "class_id": row["category_id"]}
                for row in rows(example["segments"])
                if not row.get("iscrowd")
            ]
            masks, class_labels = segment_targets(label_map, segments, self.training_label)
        else:
            masks, class_labels = semantic_targets(label_map, self.training_label, self.ignore_index)
        return {
            "image": image,
            "mask_labels": masks,
            "class_labels": class_labels,
            "image_id": str(example.get("image_id", f"{self.dataset.split or 'train'}[{index}]")),
        }


class DiskEvaluation(Dataset):
    """Evaluation examples of a `datasets.Dataset` with columns `image` and `label`, each at its own size."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.dataset[index]
        return {"image": picture_tensor(example["image"]), "label": label_array(example["label"])}


def load_disk(
    folder: str,
    *,
    train_split: str,
    eval_split: str,
    unseen: Sequence[str],
    jitter: LargeScaleJitter,
    eval_images: int,
) -> tuple[TrainingClasses, DiskTraining, DiskEvaluation | None]:
    """Classes, training and evaluation examples of a data set that `run_prepare.py` made or `datasets` saved.

    Args:
        folder: of a prepared data set, of a `DatasetDict`, or of a `Dataset`, which is then all for training.
        unseen: names of classes whose masks are withheld.
        eval_images: evaluate on this many pictures at most.

    Raises:
        FileNotFoundError: no such folder, or no data set in it.
        ValueError: a split, a column or the class names are missing, or an unseen class is none of the classes.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no data set folder {folder}")
    splits = disk_splits(folder, train_split, eval_split)
    if train_split not in splits:
        raise ValueError(f"{folder} has no split {train_split!r}, only {', '.join(splits)}")
    train = splits[train_split]
    columns = set(train.column_names)
    if "image" not in columns or not ({"label"} <= columns or {"panoptic", "segments"} <= columns):
        raise ValueError(
            f"{folder} needs columns image and label, or image, panoptic and segments; it has {sorted(columns)}"
        )
    chosen = disk_classes(train, unseen)
    evaluation = None
    if eval_split in splits and eval_split != train_split and "label" in splits[eval_split].column_names:
        held_out = splits[eval_split]
        evaluation = DiskEvaluation(held_out.select(range(min(eval_images, len(held_out)))))
    return chosen, DiskTraining(train, chosen, jitter), evaluation


def disk_splits(folder: str, train_split: str, eval_split: str) -> dict[str, Any]:
    """The splits in a folder as `datasets.Dataset`, of a prepared data set only the two asked for; raises as
    `load_disk`."""
    saved = any((Path(folder) / name).is_file() for name in ("dataset_dict.json", "state.json"))
    if not saved and any((Path(folder) / name).is_dir() for name in ("data", UNFINISHED)):
        names = list(prepared_splits(folder))
        wanted = [name for name in names if name in (train_split, eval_split)] or names
        return {name: load_prepared(folder, name) for name in wanted}
    loaded = load_from_disk(folder)
    return loaded if isinstance(loaded, dict) else {train_split: loaded}


def disk_classes(dataset: Any, unseen: Sequence[str] = ()) -> TrainingClasses:
    """The classes of a data set.

    They are the table `classes` of `name`, `synonyms`, `isthing` and `seen` (all but the name optional) in the
    JSON of `dataset.info.description`, as `scenes_dataset` writes it; or the vocabulary of a prepared data set; or
    else the names of the first ClassLabel among the features, where commas separate synonyms. Ids count in that order.

    Args:
        dataset: a `datasets.Dataset`.
        unseen: names of classes whose masks are withheld, beside those that the table says.

    Raises:
        ValueError: there are no class names, or `unseen` has one that is none of them.
    """
    table, ignore_index = class_table(dataset.info.description), IGNORE_INDEX
    if not table and {"classes", "ignore_index"} <= set(dataset.features):
        vocabulary = vocabulary_of(dataset)
        table, ignore_index = vocabulary_table(vocabulary), vocabulary.ignore_index
    table = table or [{"name": name} for name in class_names(dataset.features)]
    if not table:
        raise ValueError("the data set has no class names: none of its features is or holds a ClassLabel")
    classes = [
        list(names) for names in normalize_vocabulary([[r["name"], *r.get("synonyms", [])] for r in table])
    ]
    unknown = sorted(set(unseen) - {name for names in classes for name in names})
    if unknown:
        raise ValueError(f"the data set has no class {', '.join(map(repr, unknown))}")
    seen = [
        row.get("seen", True) and not set(unseen) & set(names)
        for row, names in zip(table, classes, strict=True)
    ]
    stuff = [names[0] for row, names in zip(table, classes, strict=True) if not row.get("isthing", True)]
    return TrainingClasses(classes, seen, stuff, ignore_index)


def class_table(description: str) -> list[dict[str, Any]]:
    """The table of classes in a data set's description; empty if it holds none."""
    try:
        values = json.loads(description)
    except ValueError:
        return []
    return values.get("classes", []) if isinstance(values, dict) else []


def vocabulary_table(vocabulary: DatasetVocabulary) -> list[dict[str, Any]]:
    """The table of classes of a prepared data set; classes count as things where that is not known."""
    is_thing = vocabulary.is_thing or [True] * len(vocabulary.classes)
    return [
        {"name": names[0], "synonyms": names[1:], "isthing": thing}
        for names, thing in zip(vocabulary.classes, is_thing, strict=True)
    ]


def class_names(features: Any) -> list[str]:
    """Names of the first ClassLabel in the features of a data set, however deep; empty if there is none."""
    if isinstance(features, ClassLabel):
        return list(features.names)
    if isinstance(features, dict):
        parts = list(features.values())
    elif isinstance(features, list):
        parts = features
    else:
        parts = [features.feature] if hasattr(features, "feature") else []
    return next((names for names in map(class_names, parts) if names), [])


def picture_tensor(picture: Any) -> Tensor:
    """A PIL picture as (3, H, W) uint8."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


def label_array(labels: Any) -> np.ndarray:
    """A label map as (H, W) int64: an array, or a PIL picture (a colour PNG holds R + 256 G + 65536 B)."""
    array = np.asarray(labels).astype(np.int64)
    return array if array.ndim == 2 else array[..., 0] + 256 * array[..., 1] + 65536 * array[..., 2]


def rows(segments: Any) -> list[dict[str, Any]]:
    """A list of dictionaries, also from the dictionary of lists that older `datasets` files give."""
    if isinstance(segments, dict):
        return [dict(zip(segments, values, strict=True)) for values in zip(*segments.values(), strict=True)]
    return list(segments)


# ------------------------------------------------------------------------------------------------------------
# Batches


class TrainingCollator:
    """Training examples -> the model's arguments: `pixel_values`, `pixel_mask`, `mask_labels`, `class_labels`.

    The image processor normalises and pads; masks are padded alike. `pixel_mask` is left out where nothing was
    padded. Beside them `image_names` and `skipped_images` (lists of str), which are for the trainer.

    Args:
        processor: an `ITAImageProcessor`.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, examples: list[dict[str, Tensor]]) -> dict[str, Any]:
        images = [example["image"] for example in examples]
        batch = dict(self.processor(images=images, do_resize=False, return_tensors="pt"))
        height, width = batch["pixel_values"].shape[-2:]
        if bool(batch["pixel_mask"].all()):
            del batch["pixel_mask"]
        batch["mask_labels"] = [
            pad(masks, (0, width - masks.shape[-1], 0, height - masks.shape[-2]))
            for masks in (example["mask_labels"] for example in examples)
        ]
        batch["class_labels"] = [example["class_labels"] for example in examples]
        batch["image_names"] = [example.get("image_id", "?") for example in examples]
        batch["skipped_images"] = [name for example in examples for name in example.get("skipped", [])]
        return batch


class EvaluationCollator:
    """Evaluation examples -> `{"inputs": what the model takes, "labels": list of (H, W) arrays}`.

    Args:
        processor: an `ITAImageProcessor`.
        do_resize: feed pictures at the processor's size; otherwise at their own.
    """

    def __init__(self, processor: Any, do_resize: bool) -> None:
        self.processor, self.do_resize = processor, do_resize

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        images = [example["image"] for example in examples]
        inputs = dict(self.processor(images=images, do_resize=self.do_resize, return_tensors="pt"))
        return {"inputs": inputs, "labels": [example["label"] for example in examples]}
