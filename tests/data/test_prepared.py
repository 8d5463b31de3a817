"""Prepared datasets are plain `datasets` folders: from disk, as a stream, and for training."""

import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from helpers.miniature_releases import save_jpeg, save_png
from helpers.miniature_streets import (
    STREET,
    STREET_LABEL,
    STREET_PANOPTIC,
    STREET_SEGMENTS,
    build_cityscapes,
    build_folder,
)
from helpers.prepare_checks import run
from ita_segmentation.data import (
    DatasetVocabulary,
    count_rows,
    decode_row,
    load_prepared,
    prepared_splits,
    vocabulary_of,
)
from ita_segmentation.data.scenes import scenes_dataset
from ita_segmentation.data.training import LargeScaleJitter, load_disk
from ita_segmentation.errors import ITAError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def streets(tmp_path_factory) -> Path:
    """Cityscapes in miniature, prepared; its release is gone."""
    folder = tmp_path_factory.mktemp("streets")
    build_cityscapes(folder / "release")
    run("cityscapes", folder / "release", folder / "out")
    shutil.rmtree(folder / "release")
    return folder / "out"


def check_street(dataset) -> None:
    """The rows of the validation split are those worked out by hand, and its features tell everything else."""
    rows = list(dataset)
    assert [row["image_id"] for row in rows] == [STREET, "munster_000001_000019"]
    assert rows[0]["image"].size == (6, 4) and np.array(rows[0]["label"]).tolist() == STREET_LABEL
    assert rows[0]["segments"] == STREET_SEGMENTS
    sample = decode_row(rows[0])
    assert sample["label"].dtype == np.uint8 and sample["label"].tolist() == STREET_LABEL
    assert sample["panoptic"].dtype == np.int32 and sample["panoptic"].tolist() == STREET_PANOPTIC
    assert sample["image"].mode == "RGB" and sample["image_id"] == STREET
    vocabulary = vocabulary_of(dataset)
    assert vocabulary.ignore_index == 255 and len(vocabulary.classes) == 19
    assert vocabulary.classes[6] == ["traffic light"] and vocabulary.is_thing == [False] * 11 + [True] * 8


# ------------------------------------------------------------------------------------------------------------
# As any dataset


@pytest.mark.parametrize("streaming", [False, True])
def test_load_dataset_reads_the_folder(streets, streaming):
    loaded = datasets.load_dataset(str(streets), streaming=streaming)
    assert list(loaded) == ["train", "validation"]
    check_street(loaded["validation"])


@pytest.mark.parametrize("streaming", [False, True])
def test_load_prepared_reads_the_folder(streets, streaming):
    dataset = load_prepared(streets, streaming=streaming)
    assert str(dataset.split) == "validation"
    check_street(dataset)


def test_rows_need_not_be_decoded(streets):
    rows = list(load_prepared(streets, streaming=True).decode(False))
    assert set(rows[0]["label"]) == {"bytes", "path"}
    assert decode_row(rows[0])["panoptic"].tolist() == STREET_PANOPTIC


def test_images_are_in_the_files_and_nowhere_else(streets):
    dataset = load_prepared(streets)
    for column in ("image", "label", "panoptic"):
        for value in dataset.cast_column(column, datasets.Image(decode=False))[column]:
            assert value["path"] is None and len(value["bytes"]) > 50


def test_columns_and_classes_survive_parquet(streets, tmp_path):
    dataset = load_prepared(streets)
    dataset.to_parquet(tmp_path / "again.parquet")
    again = datasets.Dataset.from_parquet(str(tmp_path / "again.parquet"))
    assert again.features == dataset.features
    check_street(again)


def test_the_card_says_what_is_in_it(streets):
    card = (streets / "README.md").read_text()
    for text in ("# cityscapes", "19 classes, 8 of them things", "| `train` | 1 |", "| `validation` | 2 |"):
        assert text in card
    info = datasets.load_dataset_builder(str(streets)).info
    assert info.features == load_prepared(streets).features
    assert {name: split.num_examples for name, split in info.splits.items()} == {"train": 1, "validation": 2}


# ------------------------------------------------------------------------------------------------------------
# The reader


def test_synonyms_and_unknown_things_of_a_vocabulary(tmp_path):
    build_folder(tmp_path / "mine")
    run("folder", tmp_path / "mine", tmp_path / "out")
    vocabulary = vocabulary_of(load_prepared(tmp_path / "out", streaming=True))
    assert vocabulary == DatasetVocabulary([["cat"], ["dog", "puppy"], ["grass"]], None, 255)


def test_a_dataset_of_another_make_has_no_vocabulary(streets):
    with pytest.raises(ITAError, match="not a prepared dataset: it needs the columns classes .* has text"):
        vocabulary_of(datasets.Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(ITAError, match="no rows"):
        vocabulary_of(load_prepared(streets).select([]))


def test_scenes_rows_are_samples_too():
    row = scenes_dataset(num_images=1, size=64)[0]
    sample = decode_row(row)
    assert sample["image_id"] == "0" and sample["panoptic"].shape == sample["label"].shape == (64, 64)
    assert {segment["iscrowd"] for segment in sample["segments"]} == {False}
    assert set(np.unique(sample["panoptic"])) - {0} == {segment["id"] for segment in sample["segments"]}


def test_maps_of_another_size_than_their_image_are_refused(streets):
    row = load_prepared(streets)[0]
    with pytest.raises(ValueError, match=rf"{STREET}: its label map is \(2, 3\), its image \(4, 6\)"):
        decode_row({**row, "label": row["label"].resize((3, 2))})


def test_splits_are_found_and_counted(streets, tmp_path):
    assert list(prepared_splits(streets)) == ["train", "validation"]
    assert count_rows(streets, "validation") == 2
    with pytest.raises(ITAError, match="no split 'test', only train, validation"):
        load_prepared(streets, "test")
    with pytest.raises(ITAError, match="no split 'test', only train, validation"):
        count_rows(streets, "test")
    build_folder(tmp_path / "mine")
    run("folder", tmp_path / "mine", tmp_path / "out")
    assert str(load_prepared(tmp_path / "out").split) == "train"  # the only one


def test_folders_that_are_no_or_half_a_dataset_are_refused(streets, tmp_path):
    with pytest.raises(ITAError, match="nowhere"):
        load_prepared(tmp_path / "nowhere")
    with pytest.raises(ITAError, match="not a dataset that ita prepare made"):
        load_prepared(tmp_path)
    (tmp_path / ".incomplete").mkdir()
    with pytest.raises(ITAError, match="is incomplete"):
        load_prepared(tmp_path)
    shutil.copytree(streets, tmp_path / "half")
    data = tmp_path / "half/data"
    (data / "train-00000-of-00001.parquet").rename(data / "train-00001-of-00003.parquet")
    with pytest.raises(ITAError, match="lacks files of train: 1 are there, 3 belong to it"):
        load_prepared(tmp_path / "half")


# ------------------------------------------------------------------------------------------------------------
# Training


def load(folder: Path, **options):
    settings = {"train_split": "train", "eval_split": "validation", "unseen": [], "eval_images": 9}
    jitter = LargeScaleJitter(8, 1.0, 1.0, flip=False)
    return load_disk(str(folder), augmentation=jitter, **{**settings, **options})


def test_a_prepared_dataset_trains_with_its_classes_and_without_its_crowds(streets):
    classes, training, evaluation = load(
        streets, train_split="validation", eval_split="train", unseen=["car"]
    )
    assert (
        classes.classes[0] == ["road"] and classes.stuff_names[-1] == "sky" and len(classes.stuff_names) == 11
    )
    assert classes.seen.count(False) == 1 and not classes.seen[13]
    assert len(evaluation) == 1 and set(np.unique(evaluation[0]["label"])) == {2}
    targets = training[0]
    # Of the segments, in order: road, sidewalk, sky, no crowd of people, two riders, no car, a bicycle. Classes after
    # car (13) count one less.
    assert targets["class_labels"].tolist() == [0, 1, 10, 12, 12, 17]
    assert targets["mask_labels"].shape[0] == 6 and not torch.any(targets["mask_labels"].sum(0) > 1)


def test_a_prepared_dataset_of_16_bits_trains_without_its_ignored_pixels(tmp_path):
    build_folder(tmp_path / "mine", [f"class {number}" for number in range(300)])
    for name in ("a", "b"):
        save_jpeg(tmp_path / f"mine/images/{name}.jpg")
        save_png(
            tmp_path / f"mine/labels/{name}.png", [[65535] * 6, [299] * 6, [255] * 6, [0] * 6], np.uint16
        )
    run("folder", tmp_path / "mine", tmp_path / "out")
    classes, training, evaluation = load(tmp_path / "out")
    assert classes.ignore_index == 65535 and evaluation is None
    assert training[0]["class_labels"].tolist() == [0, 255, 299]
