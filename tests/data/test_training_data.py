"""What training reads from a disk: targets, augmentation, order, resuming, streaming, corrupt images."""

import io
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from accelerate.state import PartialState
from PIL import Image
from torch.utils.data import DataLoader

from helpers import prepared_squares
from helpers.tiny_checkpoint import CLASSES, tiny_config
from ita_segmentation.data.training import (
    CorruptImageError,
    EvaluationCollator,
    LargeScaleJitter,
    ShortestEdgeCrop,
    TrainingCollator,
    load_disk,
    show_augmented,
)
from ita_segmentation.data.training.augmentation import GRAY, seeded
from ita_segmentation.data.training.rows import MappedRows, ParquetRows
from ita_segmentation.data.training.targets import TargetMap, segment_targets, semantic_targets
from ita_segmentation.errors import ITAError
from modeling_ita import ITAForOpenVocabSegmentation, ITAImageProcessor

ROWS, GROUP = 11, 3


def make_rows(count: int) -> list[dict]:
    """Noise images of a sky above a dog, each with a size of its own."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(count):
        segments = np.ones((40 + index, 60), np.int32)
        segments[20:] = 700
        image = rng.integers(0, 255, (*segments.shape, 3), np.uint8)
        rows.append(prepared_squares.row(f"image_{index}", image, segments, {1: 0, 700: 1}))
    return rows


def save(folder, rows, split="train"):
    (folder / "data").mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows, features=prepared_squares.features())
    table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", batch_size=GROUP)
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return save(tmp_path_factory.mktemp("prepared"), make_rows(ROWS))


def load(folder, window=None, **options):
    settings = {"train_split": "train", "eval_split": "validation", "unseen": [], "eval_images": 9}
    jitter = LargeScaleJitter(64, 0.5, 2.0, color_jitter=True)
    return load_disk(str(folder), augmentation=jitter, shuffle_window=window, **settings | options)


def same(first, second):
    tensors = ("image", "mask_labels", "class_labels")
    return first["image_id"] == second["image_id"] and all(torch.equal(first[k], second[k]) for k in tensors)


# ------------------------------------------------------------------------------------------------------------
# Targets


def test_crowds_void_and_unseen_classes_are_no_targets():
    panoptic = np.array([[7, 7, 0, 9], [300, 300, 8, 9]])
    segments = [
        {"id": 7, "class_id": 0, "isthing": True, "iscrowd": False},
        {"id": 300, "class_id": 0, "isthing": True, "iscrowd": True},
        {"id": 8, "class_id": 1, "isthing": True, "iscrowd": False},
        {"id": 9, "class_id": 2, "isthing": False, "iscrowd": False},
    ]
    masks, classes = segment_targets(panoptic, segments, np.array([0, -1, 1])).masks()
    assert classes.tolist() == [0, 1]
    assert masks.int().tolist() == [[[1, 1, 0, 0], [0, 0, 0, 0]], [[0, 0, 0, 1], [0, 0, 0, 1]]]


def test_an_image_may_have_more_targets_than_a_byte_counts():
    ids = np.arange(1, 301).reshape(10, 30) * 50_000
    segments = [{"id": int(i), "class_id": 0, "isthing": True} for i in ids.ravel()]
    masks, classes = segment_targets(ids, segments, np.array([0])).masks()
    assert len(classes) == 300 and torch.equal(masks.flatten(1).int(), torch.eye(300, dtype=torch.int32))


def test_masks_are_of_targets_that_have_a_pixel_and_are_bool():
    targets = TargetMap(torch.tensor([[0, 3], [3, 1]], dtype=torch.uint8), torch.tensor([5, 6, 7]))
    masks, classes = targets.masks()
    assert masks.dtype == torch.bool and classes.tolist() == [5, 7]
    assert masks.int().tolist() == [[[0, 0], [0, 1]], [[0, 1], [1, 0]]]


@pytest.mark.parametrize("value", [2, 200, 256])
def test_a_label_that_is_no_class_is_refused(value):
    with pytest.raises(ValueError, match=f"contains {value}, which is not a class"):
        semantic_targets(np.array([[0, 1, 255, value]], np.uint16), np.array([0, 1]))


# ------------------------------------------------------------------------------------------------------------
# Augmentation


def test_an_image_that_is_all_length_keeps_a_row():
    image, labels = torch.zeros(3, 2, 900, dtype=torch.uint8), torch.ones(2, 900, dtype=torch.uint8)
    for augmentation in (LargeScaleJitter(64, 0.1, 0.1), ShortestEdgeCrop(64, 0.1, 0.1)):
        pil_image, maps = augmentation(image, labels)
        assert pil_image.shape[1:] == maps.shape and min(maps.shape) > 0 and max(maps.shape) <= 64


def test_what_is_filled_up_is_gray_and_void():
    image = torch.full((3, 30, 60), 9, dtype=torch.uint8)
    pil_image, maps = LargeScaleJitter(64, 0.5, 0.5, fill=True)(image, torch.ones(30, 60, dtype=torch.uint8))
    assert pil_image.shape == (3, 64, 64) and maps.shape == (64, 64)
    assert maps.sum() == 16 * 32 and maps[:16, :32].all()
    assert (pil_image[:, :16, :32] == 9).all() and (pil_image[:, maps == 0] == GRAY).all()


def test_a_crop_that_one_class_fills_is_drawn_again():
    labels = torch.ones(64, 640, dtype=torch.uint8)
    labels[:, 320:] = 2  # few of the crops hold both
    image = torch.zeros(3, 64, 640, dtype=torch.uint8)
    torch.manual_seed(0)
    mixed = {}
    for share in (0.75, 1.0):
        crop = ShortestEdgeCrop(64, 1.0, 1.0, max_class_share=share)
        mixed[share] = sum(len(crop(image, labels)[1].unique()) == 2 for _ in range(60))
    assert mixed[0.75] > 2 * mixed[1.0]


def test_the_shortest_edge_takes_tenths_of_the_size():
    labels = torch.ones(50, 100, dtype=torch.uint8)
    image = torch.zeros(3, 50, 100, dtype=torch.uint8)
    sizes = {min(ShortestEdgeCrop(100, 0.5, 0.7)(image, labels)[1].shape) for _ in range(40)}
    assert sizes == {50, 60, 70}


def test_colors_change_but_never_places():
    image = torch.full((3, 40, 40), 60, dtype=torch.uint8)
    image[0] = 200
    labels = torch.ones(40, 40, dtype=torch.uint8)
    torch.manual_seed(0)
    seen = [LargeScaleJitter(40, 1.0, 1.0, color_jitter=True)(image, labels)[0][:, 0, 0] for _ in range(40)]
    assert len({tuple(color.tolist()) for color in seen}) > 10
    assert all(color.argmax() == 0 for color in seen)


def test_lent_randomness_is_the_keys_alone_and_leaves_no_trace():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(1, 2, 3):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeded(1, 2, 3):
        assert torch.equal(torch.rand(3), inside)
    for other in ((1, 2, 4), (1, 3, 3), (2, 2, 3)):
        with seeded(*other):
            assert not torch.equal(torch.rand(3), inside)


# ------------------------------------------------------------------------------------------------------------
# Order, epochs, resuming


@pytest.fixture(params=[None, 6], ids=["mapped", "streaming"])
def window(request):
    return request.param


def loader_of(folder, window, workers=0, processes=1, process=0):
    PartialState(cpu=True)
    dataset = load(folder, window)[1]
    loader = DataLoader(
        dataset,
        batch_size=2,
        sampler=dataset.epoch_sampler(),
        collate_fn=list,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return prepare_data_loader(
        loader,
        num_processes=processes,
        process_index=process,
        device=torch.device("cpu"),
        put_on_device=False,
    )


def examples_of(loader, epoch):
    loader.set_epoch(epoch)
    return [example for batch in loader for example in batch]


def test_an_epoch_has_each_image_once_in_its_own_order_and_augmentation(prepared, window):
    loader = loader_of(prepared, window)
    epochs = [{e["image_id"]: e for e in examples_of(loader, epoch)} for epoch in (0, 1)]
    assert [len(epoch) for epoch in epochs] == [ROWS, ROWS] and epochs[0].keys() == epochs[1].keys()
    assert list(epochs[0]) != list(epochs[1])
    assert not any(same(epochs[0][name], epochs[1][name]) for name in epochs[0])


def test_workers_see_the_same_examples_in_each_epoch_though_they_live_on(prepared, window):
    alone, helped = loader_of(prepared, window), loader_of(prepared, window, workers=2)
    for epoch in range(2):
        torch.rand(epoch + 1)
        first, second = examples_of(alone, epoch), examples_of(helped, epoch)
        assert len(first) == ROWS and all(map(same, first, second))


def test_two_processes_share_an_epoch(prepared, window):
    shares = [examples_of(loader_of(prepared, window, processes=2, process=p), 1) for p in (0, 1)]
    alone = {e["image_id"]: e for e in examples_of(loader_of(prepared, window), 1)}
    assert len(shares[0]) == len(shares[1]) and {e["image_id"] for s in shares for e in s} == alone.keys()
    assert all(same(example, alone[example["image_id"]]) for share in shares for example in share)


@pytest.mark.parametrize("processes", [1, 2])
def test_resuming_in_the_middle_of_an_epoch_goes_on_bitwise_and_reads_nothing_before(
    prepared, window, processes, monkeypatch
):
    unbroken = examples_of(loader_of(prepared, window, processes=processes), 3)
    resumed = skip_first_batches(loader_of(prepared, window, processes=processes), 2)
    read = []
    kind = MappedRows if window is None else ParquetRows
    original = kind.__getitem__
    monkeypatch.setattr(kind, "__getitem__", lambda self, index: read.append(index) or original(self, index))
    rest = examples_of(resumed, 3)
    assert len(rest) == len(unbroken) - 4 == len(read) and all(map(same, rest, unbroken[4:]))


# ------------------------------------------------------------------------------------------------------------
# Streaming


def test_parquet_files_hold_the_rows_that_datasets_reads(prepared):
    mapped, streamed = load(prepared)[1], load(prepared, window=1)[1]
    assert load(prepared)[0] == load(prepared, window=1)[0]
    assert all(same(mapped[position], streamed[position]) for position in (0, 5, ROWS - 1, 3 * ROWS + 4))


def test_rows_are_shuffled_in_a_window_of_row_groups_and_no_more_are_cache(prepared):
    rows = ParquetRows([prepared / "data/train-00000-of-00001.parquet"], "train", window=2 * GROUP)
    order = rows.order(torch.Generator().manual_seed(0)).tolist()
    assert sorted(order) == list(range(ROWS)) != order
    groups = [index // GROUP for index in order]
    assert len(set(groups[:5])) == 2 and not set(groups[:5]) & set(groups[6:])
    reads = []
    original = pyarrow.parquet.ParquetFile.read_row_group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pyarrow.parquet.ParquetFile,
            "read_row_group",
            lambda self, group, **options: reads.append(group) or original(self, group, **options),
        )
        names = [rows[index]["image_id"] for index in order]
    assert names == [f"image_{index}" for index in order]
    assert sorted(reads) == [0, 1, 2, 3] and len(rows._cache) == 2


def test_streaming_needs_a_prepared_dataset(tmp_path):
    datasets.Dataset.from_list(make_rows(1), features=prepared_squares.features()).save_to_disk(
        tmp_path / "a"
    )
    with pytest.raises(ITAError, match="ita prepare"):
        load(tmp_path / "a", window=4)


# ------------------------------------------------------------------------------------------------------------
# Corrupt images


def cut(value):
    return value | {"bytes": value["bytes"][: len(value["bytes"]) // 2]}


def other_size(value):
    buffer = io.BytesIO()
    Image.new("RGB", (5, 7)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


DAMAGE = {
    "cut off": ("image", cut, "its image cannot be read"),
    "not an image": ("image", lambda value: {"bytes": b"hello", "path": None}, "its image cannot be read"),
    "empty": ("image", lambda value: {"bytes": b"", "path": None}, "its image cannot be read"),
    "map cut off": ("panoptic", cut, "its panoptic map cannot be read"),
    "other size": ("image", other_size, "its panoptic map has 60 x 42 pixels, its image 5 x 7"),
}


@pytest.fixture(scope="module", params=DAMAGE)
def damaged(request, tmp_path_factory):
    """A dataset whose third image is damaged, and what the message must say."""
    tmp_path = tmp_path_factory.mktemp("damaged")
    column, damage, said = DAMAGE[request.param]
    rows = make_rows(4)
    rows[2][column] = damage(rows[2][column])
    if column == "panoptic":
        rows[2]["label"] = damage(rows[2]["label"])
    save(tmp_path, rows)
    return save(tmp_path, rows, "validation"), said


def test_a_corrupt_image_ends_the_run_by_its_name_in_one_line(damaged, window):
    folder, said = damaged
    with pytest.raises(CorruptImageError) as caught:
        load(folder, window)[1][2]
    message = str(caught.value)
    assert "\n" not in message and message.startswith("image_2 (train[2]): ") and said in message


def test_a_worker_s_complaint_is_the_same_line(tmp_path):
    rows = make_rows(3)
    rows[2]["image"] = cut(rows[2]["image"])
    training = load(save(tmp_path, rows), window=1)[1]
    with pytest.raises(CorruptImageError, match=r"^image_2 \(train\[2\]\): .*") as caught:
        list(DataLoader(training, batch_size=1, collate_fn=list, num_workers=1))
    assert "\n" not in str(caught.value)


def test_a_corrupt_image_is_passed_over_if_asked(damaged, window):
    training = load(damaged[0], window, skip_corrupt=True)[1]
    position = 5 * 4 + 2
    example = training[position]
    assert example["skipped"] == ["image_2"] and same(example, training[position + 1])
    batch = TrainingCollator(ITAImageProcessor())([example, training[0]])
    assert batch["image_names"] == ["image_3", "image_0"] and batch["skipped_images"] == ["image_2"]


def test_evaluation_names_a_corrupt_image_or_counts_none_of_its_pixels(damaged, window):
    with pytest.raises(CorruptImageError, match="image_2"):
        load(damaged[0], window)[2][2]
    evaluation = load(damaged[0], window, skip_corrupt=True)[2]
    batch = EvaluationCollator(ITAImageProcessor(), do_resize=False)([evaluation[1], evaluation[2]])
    assert batch["skipped_images"] == ["image_2"] and (batch["labels"][1] == 255).all()


def test_a_dataset_of_corrupt_images_ends_the_run(tmp_path):
    rows = [row | {"image": cut(row["image"])} for row in make_rows(3)]
    with pytest.raises(CorruptImageError):
        load(save(tmp_path, rows), skip_corrupt=True)[1][0]


# ------------------------------------------------------------------------------------------------------------
# Images without any label


@pytest.mark.parametrize("all_empty", [False, True])
def test_images_without_label_train_with_finite_losses_and_every_weight_in_use(tmp_path, all_empty):
    rows = make_rows(2)
    for row in rows if all_empty else rows[:1]:
        row["panoptic"] = prepared_squares.png(
            np.zeros((*np.array(Image.open(io.BytesIO(row["label"]["bytes"]))).shape, 3), np.uint8)
        )
        row["segments"] = []
    training = load(save(tmp_path, rows))[1]
    torch.manual_seed(0)
    model = ITAForOpenVocabSegmentation(tiny_config(train_num_points=32)).train()
    batch = TrainingCollator(ITAImageProcessor())([training[0], training[1]])
    del batch["image_names"], batch["skipped_images"]
    assert [len(masks) for masks in batch["mask_labels"]] == ([0, 0] if all_empty else [0, 2])
    loss = model(**batch, vocabulary=CLASSES).loss
    loss.backward()
    assert loss.isfinite()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == [], "DDP without find_unused_parameters would wait for them"


# ------------------------------------------------------------------------------------------------------------
# Classes


def test_unseen_classes_are_named_in_any_capitals_and_not_all_can_be_unseen(prepared):
    names = [names[0] for names in load(prepared)[0].classes]
    classes = load(prepared, unseen=[names[1].upper() + " "])[0]
    assert classes.seen == [True, False, True, True]
    with pytest.raises(ITAError, match="the dataset has no class 'zebra'"):
        load(prepared, unseen=["zebra"])
    with pytest.raises(ITAError, match="none is left to train on"):
        load(prepared, unseen=names)


def test_splits_of_different_classes_are_refused(tmp_path):
    def split(names):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
        image, label = (prepared_squares.png(np.zeros((8, 8, *more), np.uint8)) for more in ((3,), ()))
        features["classes"] = datasets.List(datasets.ClassLabel(names=names))
        rows = [{"image": image, "label": label, "classes": [0]}]
        return datasets.Dataset.from_list(rows, features=features)

    folders = {"same": ["cat", "dog"], "other": ["dog", "cat"]}
    for folder, names in folders.items():
        both = datasets.DatasetDict({"train": split(["cat", "dog"]), "validation": split(names)})
        both.save_to_disk(tmp_path / folder)
    assert load(tmp_path / "same")[2] is not None
    with pytest.raises(ITAError, match="train and validation .* have different classes"):
        load(tmp_path / "other")


def test_files_of_different_classes_are_refused(tmp_path, prepared):
    save(tmp_path, make_rows(1))
    rows, features = make_rows(1), prepared_squares.features()
    names = [*reversed(features["classes"].feature.names)]
    features["classes"] = datasets.List(datasets.ClassLabel(names=names))
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet")
    with pytest.raises(ITAError, match="differ in columns or classes"):
        load(tmp_path)


class GrayExample:
    """One gray image of 32 x 64 pixels for a crop of 64, with one mask on its left half."""

    augmentation = SimpleNamespace(size=64)

    def __len__(self):
        return 1

    def __getitem__(self, position):
        image, masks = (
            torch.full((3, 32, 64), 128, dtype=torch.uint8),
            torch.zeros(1, 32, 64, dtype=torch.bool),
        )
        masks[..., :32] = True
        return {"image": image, "mask_labels": masks}


def test_a_preview_paints_masks_and_leaves_the_rest_of_the_crop_black(tmp_path):
    show_augmented(GrayExample(), tmp_path / "preview.jpg", rows=1, columns=2, tile=32)
    with Image.open(tmp_path / "preview.jpg") as sheet:
        assert sheet.size == (32 + 4 + 32, 32)
        pixels = np.asarray(sheet).astype(int)
    for left in (0, 36):
        tile = pixels[:, left : left + 32]
        assert np.ptp(tile[4:12, 4:12].mean((0, 1))) > 30
        assert np.abs(tile[4:12, 20:28] - 128).max() < 20
        assert tile[20:].max() < 20
