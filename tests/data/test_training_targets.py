"""What training reads: Scenes and datasets on disk as images with one mask per segment, and their batches."""

import datasets
import numpy as np
import pytest
import torch

from ita_segmentation.data.scenes.dataset import SPLITS, scenes_dataset
from ita_segmentation.data.training import (
    LargeScaleJitter,
    ScenesEvaluation,
    ScenesTraining,
    TrainingCollator,
    load_disk,
    scenes_classes,
)
from ita_segmentation.data.training.classes import class_names
from ita_segmentation.data.training.targets import IGNORE_INDEX, segment_targets, semantic_targets
from ita_segmentation.errors import ITAError
from modeling_ita import ITAImageProcessor


def test_things_are_masks_one_by_one_and_stuff_is_one_mask_per_class():
    panoptic = np.array([[1, 1, 2, 3], [4, 4, 5, 0]])
    segments = [
        {"id": 1, "class_id": 0, "isthing": True},
        {"id": 2, "class_id": 0, "isthing": True},
        {"id": 3, "class_id": 2, "isthing": False},
        {"id": 4, "class_id": 2, "isthing": False},
        {"id": 5, "class_id": 1, "isthing": True},
        {"id": 9, "class_id": 0, "isthing": True},
    ]
    masks, labels = segment_targets(panoptic, segments, np.array([0, -1, 1])).masks()
    assert labels.tolist() == [0, 0, 1]
    assert [mask.nonzero().tolist() for mask in masks] == [
        [[0, 0], [0, 1]],
        [[0, 2]],
        [[0, 3], [1, 0], [1, 1]],
    ]


def test_a_label_map_gives_one_mask_per_seen_class():
    masks, labels = semantic_targets(np.array([[0, 2], [1, IGNORE_INDEX]]), np.array([0, -1, 1])).masks()
    assert labels.tolist() == [0, 1] and masks.sum((1, 2)).tolist() == [1, 1]
    masks, labels = semantic_targets(np.full((2, 3), IGNORE_INDEX), np.array([0])).masks()
    assert masks.shape == (0, 2, 3) and labels.shape == (0,)


def test_training_scenes_hold_seen_classes_only_and_are_the_same_every_time():
    dataset, classes = ScenesTraining(seed=3, size=64), scenes_classes()
    first, again = dataset[5], dataset[5]
    assert first["image_id"] == again["image_id"] == "scenes3[5]"
    assert all(torch.equal(first[key], again[key]) for key in ("image", "mask_labels", "class_labels"))
    assert not torch.equal(first["image"], dataset[6]["image"])
    assert first["mask_labels"].sum(0).max() == 1
    assert first["class_labels"].max() < len(classes.seen_classes)
    labels = np.unique(
        np.concatenate([np.unique(example["label"]) for example in ScenesEvaluation(4, 64, 8)])
    )
    assert {bool(classes.seen[label]) for label in labels if label != IGNORE_INDEX} == {True, False}


def test_jitter_keeps_labels_on_their_pixels_and_never_exceeds_the_crop():
    image = torch.zeros(3, 50, 80, dtype=torch.uint8)
    image[:, :, 40:] = 200
    labels = (image[0] > 100).long()
    torch.manual_seed(0)
    for _ in range(20):
        pil_image, label_map = LargeScaleJitter(64, 0.2, 2.0)(image, labels)
        assert pil_image.shape[1:] == label_map.shape and max(label_map.shape) <= 64
        assert ((pil_image[0] > 100).long() == label_map).float().mean() > 0.9


def test_scenes_saved_to_disk_keep_their_synonyms_and_their_split(tmp_path):
    saved = scenes_dataset("train", num_images=2, size=64)
    saved.save_to_disk(tmp_path / "scenes")
    jitter = LargeScaleJitter(64, 1.0, 1.0, flip=False)
    classes, training, evaluation = load_disk(
        str(tmp_path / "scenes"),
        train_split="train",
        eval_split="validation",
        unseen=[],
        augmentation=jitter,
        eval_images=1,
    )
    assert classes == scenes_classes() and evaluation is None
    drawn = ScenesTraining(SPLITS["train"].seed, 64)[1]
    read = training[1]
    assert torch.equal(read["image"], drawn["image"]) and torch.equal(
        read["mask_labels"], drawn["mask_labels"]
    )
    assert torch.equal(read["class_labels"], drawn["class_labels"])


def test_a_data_set_without_class_names_or_columns_is_refused(tmp_path):
    table = datasets.Dataset.from_dict({"image": [1], "label": [2]})
    table.save_to_disk(tmp_path / "plain")
    options = {
        "train_split": "train",
        "eval_split": "validation",
        "augmentation": LargeScaleJitter(64),
        "eval_images": 1,
    }
    with pytest.raises(ITAError, match="no class names"):
        load_disk(str(tmp_path / "plain"), unseen=[], **options)
    table.remove_columns("label").save_to_disk(tmp_path / "bare")
    with pytest.raises(ITAError, match="needs columns"):
        load_disk(str(tmp_path / "bare"), unseen=[], **options)
    assert class_names({"a": datasets.List({"b": datasets.ClassLabel(names=["x"])})}) == ["x"]


def test_masks_are_padded_like_their_images():
    examples = [
        {
            "image": torch.zeros(3, height, 50, dtype=torch.uint8),
            "mask_labels": torch.ones(2, height, 50, dtype=torch.bool),
            "class_labels": torch.tensor([0, 1]),
        }
        for height in (40, 64)
    ]
    batch = TrainingCollator(ITAImageProcessor())(examples)
    assert batch["pixel_values"].shape == (2, 3, 64, 64)
    assert [masks.shape for masks in batch["mask_labels"]] == [(2, 64, 64)] * 2
    assert torch.equal(batch["mask_labels"][0][0], batch["pixel_mask"][0].bool())
    assert "pixel_mask" not in TrainingCollator(ITAImageProcessor())(
        [
            {
                "image": torch.zeros(3, 64, 32, dtype=torch.uint8),
                **{k: examples[1][k] for k in ("class_labels",)},
                "mask_labels": torch.zeros(0, 64, 32),
            }
        ]
    )
