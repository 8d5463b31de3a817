"""Files that are missing, damaged, not regular or of another size are named, whatever the release."""

import os
import pickle

import numpy as np
import pytest

from helpers.miniature_releases import (
    save_full_seg,
    save_label_map,
    save_png,
    save_segment_ids,
    truncate,
)
from helpers.miniature_streets import BUILDERS, STREET, save_palette_png
from helpers.release_checks import check_refused, check_split
from ita_segmentation.data.benchmarks import SOURCE_DATASETS, open_source_dataset
from ita_segmentation.data.benchmarks.readers import read_label_png
from ita_segmentation.errors import ITAError

FULL = "images/ADE/validation/urban/street/ADE_val_00000001"
FILES = [
    ("ade20k-150", "images/validation/ADE_val_00000001.jpg"),
    ("ade20k-150", "annotations/validation/ADE_val_00000001.png"),
    ("ade20k-150", "annotations_instance/validation/ADE_val_00000001.png"),
    ("ade20k-847", f"{FULL}.jpg"),
    ("ade20k-847", f"{FULL}_seg.png"),
    ("pascal-context-59", "JPEGImages/2008_000002.jpg"),
    ("pascal-context-459", "JPEGImages/2008_000002.jpg"),
    ("pascal-context-459", "trainval/2008_000002.mat"),
    ("pascal-voc-20", "JPEGImages/2007_000033.jpg"),
    ("pascal-voc-20", "SegmentationClass/2007_000033.png"),
    ("coco-panoptic", "val2017/000000000139.jpg"),
    ("coco-panoptic", "annotations/panoptic_val2017/000000000139.png"),
    ("cityscapes", f"leftImg8bit/val/frankfurt/{STREET}_leftImg8bit.png"),
    ("cityscapes", f"gtFine/val/frankfurt/{STREET}_gtFine_labelIds.png"),
    ("cityscapes", f"gtFine/val/frankfurt/{STREET}_gtFine_instanceIds.png"),
]


@pytest.mark.parametrize("benchmark", BUILDERS)
def test_a_release_reads_as_worked_out_by_hand_and_its_entries_can_be_sent_to_processes(tmp_path, benchmark):
    expected = BUILDERS[benchmark](tmp_path)
    dataset = open_source_dataset(benchmark, tmp_path)
    for split, images in expected.items():
        check_split(dataset, tmp_path, split, images)
        entries = dataset.index(tmp_path, split)
        assert pickle.loads(pickle.dumps(entries)) == entries


@pytest.mark.parametrize(("benchmark", "name"), FILES)
def test_a_file_that_is_damaged_or_missing_is_named(tmp_path, benchmark, name):
    BUILDERS[benchmark](tmp_path)
    dataset, path = SOURCE_DATASETS[benchmark], tmp_path / name
    for share in (0.98, 0.6):
        truncate(path, share)
        damaged = "cannot be read as a MATLAB file" if name.endswith(".mat") else "is truncated or damaged"
        check_refused(dataset, tmp_path, f"{name} {damaged}")
    path.write_bytes(b"")
    check_refused(dataset, tmp_path, f"{name} is empty")
    path.unlink()
    check_refused(dataset, tmp_path, os.path.basename(name), "missing")
    os.mkfifo(path)
    check_refused(dataset, tmp_path, f"{name} is not a regular file")


@pytest.mark.parametrize(
    ("benchmark", "name", "save"),
    [
        ("ade20k-150", FILES[1][1], lambda path: save_png(path, np.zeros((4, 7)))),
        ("ade20k-150", FILES[2][1], lambda path: save_png(path, np.zeros((4, 7, 3)))),
        ("ade20k-847", FILES[4][1], lambda path: save_full_seg(path, np.zeros((4, 7)))),
        ("pascal-context-459", FILES[7][1], lambda path: save_label_map(path, np.ones((4, 7)))),
        ("pascal-voc-20", "SegmentationClass/2008_000002.png", lambda p: save_palette_png(p, [[0] * 7] * 4)),
        ("coco-panoptic", FILES[11][1], lambda path: save_segment_ids(path, np.zeros((4, 7)))),
        ("cityscapes", FILES[13][1], lambda path: save_png(path, np.full((4, 7), 7))),
        ("cityscapes", FILES[14][1], lambda path: save_png(path, np.full((4, 7), 7), np.uint16)),
    ],
)
def test_a_map_of_another_size_is_named_with_both_sizes(tmp_path, benchmark, name, save):
    BUILDERS[benchmark](tmp_path)
    save(tmp_path / name)
    check_refused(SOURCE_DATASETS[benchmark], tmp_path, f"{name} is 7 x 4 pixels", "is 6 x 4")


def test_one_flipped_bit_in_a_label_does_not_pass(tmp_path):
    path = tmp_path / "label.png"
    save_palette_png(path, np.arange(24).reshape(4, 6))
    content = path.read_bytes()
    start = content.index(b"IDAT") + 4
    for place in range(start, len(content) - 16):  # the rest is the last checksum and the end mark
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(ITAError, match=path.name):
            read_label_png(path)
