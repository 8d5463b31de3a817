"""Large images in tiles: what a border cuts comes back whole, and scores are added up where tiles overlap."""

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.peak_memory import needs_peak_memory, peak_bytes
from ita_segmentation.checkpoints import load_checkpoint
from ita_segmentation.data.scenes import scene, scenes_vocabulary
from ita_segmentation.prediction import Segmenter
from modeling_ita import tiling as tiling_module
from modeling_ita.mask_tiles import MaskTiles
from modeling_ita.pipeline_ita import ITAImageSegmentationPipeline
from modeling_ita.postprocessing import semantic_scores
from modeling_ita.tiled_segmentation import SegmentMerger, segment_tiles
from modeling_ita.tiling import SemanticMerger, Tiling, tiling_of

SIZE = (64, 160)
TILING = Tiling(64, 32)


@pytest.fixture(scope="module")
def loaded():
    return load_checkpoint("models/ita-tiny", "cpu")


@pytest.fixture(scope="module")
def collage():
    """Two Scenes side by side, 192 x 384, and the second one's things by class with their masks."""
    image, truth = Image.new("RGB", (384, 192)), np.zeros((192, 384), dtype=np.int32)
    drawn = [scene(1_000_003, index, 192, classes="all") for index in (15, 16)]
    segments = []
    for place, one in enumerate(drawn):
        image.paste(one.image, (192 * place, 0))
        truth[:, 192 * place :][:, :192] = np.where(one.panoptic > 0, one.panoptic + 100 * place, 0)
        segments += [{**segment, "id": segment["id"] + 100 * place} for segment in one.segments]
    return image, truth, segments


@pytest.mark.parametrize("arguments", [(31,), (64, 64), (64, -1), (64.5,), (True,)])
def test_tiles_and_overlaps_that_make_no_sense_are_refused_in_a_line(arguments):
    with pytest.raises(ValueError, match="tiles"):
        Tiling(*arguments)
    with pytest.raises(ValueError, match="tile_overlap is for tiles"):
        tiling_of(None, 8)


@pytest.mark.parametrize("size", [(20, 30), (64, 64), (65, 64), (200, 333)])
def test_tiles_cover_the_image_and_overlap_enough(size):
    covered = np.zeros(size, dtype=int)
    tops = set()
    for crop in TILING.crops(size):
        top, left, bottom, right = crop.region
        assert max(bottom - top, right - left) <= TILING.size
        covered[top:bottom, left:right] += 1
        tops.add(top)
    assert covered.min() == 1 if max(size) <= 64 else covered.min() >= 1
    assert all(
        second - first <= TILING.stride for first, second in zip(sorted(tops), sorted(tops)[1:], strict=False)
    )


def test_a_block_of_masks_is_what_whole_rows_have_there_also_when_the_rest_is_forgotten():
    logits = torch.randn(5, 16, 24, generator=torch.Generator().manual_seed(0))
    masks = MaskTiles(logits, (50, 90), (75, 130))
    expected = masks.rows(slice(20, 41))[:, 33:77]
    torch.testing.assert_close(masks.block(slice(20, 41), slice(33, 77)), expected)
    masks.keep(slice(20, 41), slice(33, 100))
    torch.testing.assert_close(masks.block(slice(20, 41), slice(33, 77)), expected)
    assert masks._cells.shape[0] < 16


def test_scores_are_added_up_where_tiles_overlap():
    generator = torch.Generator().manual_seed(1)
    crops = TILING.crops(SIZE)
    merger = SemanticMerger(crops, SIZE)
    scores = torch.zeros(6, *SIZE)
    for crop in crops:
        classes = 3 * torch.randn(9, 7, generator=generator)
        masks = 3 * torch.randn(9, 16, 16, generator=generator)
        merger.add(classes, masks, (64, 64))
        top, left, bottom, right = crop.region
        scores[:, top:bottom, left:right] += semantic_scores(classes, masks, (64, 64), (64, 64))
    best, order = scores.topk(2, dim=0)
    is_clear = best[0] - best[1] > 1e-4
    assert is_clear.float().mean() > 0.99
    assert torch.equal(merger.labels.long()[is_clear], order[0][is_clear])
    assert not merger._held, "no tile is kept when all is done"


def test_a_tile_costs_the_same_however_many_there_are(monkeypatch):
    """What is held is looked at only where the new tile completes a part of the image."""
    kept = []
    keep = tiling_module._HeldCrop.keep
    monkeypatch.setattr(tiling_module._HeldCrop, "keep", lambda *arguments: kept.append(keep(*arguments)))
    counts = []
    for size in ((100, 200), (100, 2000)):
        crops = Tiling(32, 8).crops(size)
        merger = SemanticMerger(crops, size)
        for _ in crops:
            merger.add(torch.zeros(2, 4), torch.zeros(2, 8, 8))
        counts.append(len(kept) / len(crops))
        kept.clear()
    assert counts[1] < 1.2 * counts[0]


def tile_result(crop, mask, label=0, score=0.9, stuff=False):
    """What post-processing finds of one mask of the image in a tile."""
    top, left, bottom, right = crop.region
    part = torch.from_numpy(mask[top:bottom, left:right].astype(np.int32))
    segments = [{"id": 1, "label_id": label, "was_fused": stuff, "score": score}] if part.any() else []
    return {"segmentation": part, "segments_info": segments}


@pytest.mark.parametrize("columns", [(60, 75), (10, 150), (33, 63), (90, 128)], ids=str)
@pytest.mark.parametrize("is_panoptic", [True, False])
def test_what_a_border_cuts_is_one_segment_again(columns, is_panoptic):
    mask = np.zeros(SIZE, dtype=bool)
    mask[20:40, slice(*columns)] = True
    crops = TILING.crops(SIZE)
    merger = SegmentMerger(crops, SIZE, is_panoptic)
    for crop in crops:
        found = tile_result(crop, mask)
        if not is_panoptic:
            found["segmentation"] = found["segmentation"][None].bool()[: len(found["segments_info"])]
        merger.add(found)
    result = merger.result()
    assert [segment["id"] for segment in result["segments_info"]] == [1]
    assert np.array_equal(result["segmentation"] == 1, mask)


def test_stray_pixels_in_what_tiles_share_do_not_join_two_things():
    crops = TILING.crops(SIZE)
    (_, first, _, _), (_, second, _, _) = crops[0].region, crops[1].region
    maps = [np.zeros((64, 64), np.int32) for _ in crops]
    maps[0][10:30, 4 - first : 28 - first] = 1  # ends before the second tile begins
    maps[1][40:60, 70 - second : 94 - second] = 1  # begins after the first tile ends
    for crop_map, left in ((maps[0], first), (maps[1], second)):
        crop_map[5:8, 60 - left : 64 - left] = 1
    merger = SegmentMerger(crops, SIZE, is_panoptic=False)
    for found in maps:
        infos = [{"id": 1, "label_id": 0, "was_fused": False, "score": 0.9}] if found.any() else []
        merger.add(
            {"segmentation": torch.from_numpy(found)[None].bool()[: len(infos)], "segments_info": infos}
        )
    assert len(merger.result()["segments_info"]) == 2


def test_stuff_is_one_segment_with_its_highest_score_and_other_things_stay_apart():
    crops = TILING.crops(SIZE)
    merger = SegmentMerger(crops, SIZE, is_panoptic=True)
    ground = np.ones(SIZE, dtype=bool)
    for number, crop in enumerate(crops):
        found = tile_result(crop, ground, label=4, score=0.8 + number / 100, stuff=True)
        found["segmentation"][30:40, 22:26] = (
            2  # a thing in the middle of each tile: none in an overlap of two
        )
        found["segments_info"].append({"id": 2, "label_id": 1, "was_fused": False, "score": 0.9})
        merger.add(found)
    segments = merger.result()["segments_info"]
    stuff = [segment for segment in segments if segment["was_fused"]]
    assert [(one["label_id"], one["score"]) for one in stuff] == [
        (4, pytest.approx(0.8 + (len(crops) - 1) / 100))
    ]
    assert sum(segment["label_id"] == 1 for segment in segments) == len(crops)


def test_a_thing_of_scenes_that_a_border_cuts_comes_back_as_one_instance(loaded, collage):
    image, truth, segments = collage
    tiling = Tiling(192, 128)
    borders = {64, 192, 256}
    vocabulary = scenes_vocabulary().classes
    [found] = Segmenter(*loaded, task="instance", tiling=tiling, keep_overlaps=True).segment_images([image])
    masks = list(found.masks())
    cut = 0
    for segment in segments:
        columns = np.flatnonzero((truth == segment["id"]).any(0))
        is_cut = any(columns[0] + 4 < border < columns[-1] - 4 for border in borders)
        if not segment["isthing"] or not is_cut:
            continue
        own = truth == segment["id"]
        name = vocabulary[segment["class_id"]][0]
        hits = [
            one
            for one in masks
            if vocabulary[one.label_id][0] == name and (one.mask & own).sum() > 0.2 * own.sum()
        ]
        # Whether the network finds it at all, or twice, is not the tiles' doing; that no part comes back alone is.
        cut += bool(hits)
        assert all((one.mask & own).sum() > 0.7 * own.sum() for one in hits)
    assert cut >= 2


def test_an_image_that_fits_a_tile_is_what_it_is_without_tiles(loaded, collage):
    image = collage[0].crop((0, 0, 192, 192))
    for task in ("semantic", "panoptic", "instance"):
        plain, tiled = (
            Segmenter(*loaded, task=task, tiling=tiling).segment_images([image])[0]
            for tiling in (None, Tiling(256))
        )
        assert [one["label"] for one in tiled.segments] == [one["label"] for one in plain.segments]
        areas = [[one["area"] for one in result.segments] for result in (tiled, plain)]
        assert areas[0] == pytest.approx(areas[1], rel=0.01)
        assert task != "semantic" or (tiled.label_map == plain.label_map).mean() > 0.999
        for one, other in zip(tiled.segments, plain.segments, strict=True):
            # Of semantic maps the mean is over pixels of the image, not of the network's masks.
            assert one["score"] == pytest.approx(other["score"], abs=0.1 if task == "semantic" else 1e-5)


@pytest.mark.parametrize("subtask", ["semantic", "panoptic", "instance"])
def test_the_pipeline_finds_what_the_segmenter_finds(loaded, collage, subtask):
    model, processor = loaded
    pipe = ITAImageSegmentationPipeline(model=model, image_processor=processor, task="image-segmentation")
    found = pipe(collage[0], subtask=subtask, threshold=0.5, tiles=192, tile_overlap=96, tiles_at_once=2)
    segmenter = Segmenter(
        model, processor, task=subtask, threshold=0.5, tiling=Tiling(192, 96), keep_overlaps=True
    )
    [expected] = segmenter.segment_images([collage[0]])
    assert {one["label"] for one in found} == {one["label"] for one in expected.segments}
    assert all(one["mask"].size == collage[0].size and np.asarray(one["mask"]).any() for one in found)
    with pytest.raises(ValueError, match="tiles"):
        pipe(collage[0], tiles=8)


@pytest.mark.parametrize("task", ["semantic", "instance"])
def test_memory_does_not_grow_with_the_number_of_tiles(task):
    needs_peak_memory()
    generator = torch.Generator().manual_seed(0)

    class Outputs:
        def __init__(self, count):
            self.class_queries_logits = 3 * torch.randn(count, 40, 9, generator=generator)
            self.class_queries_logits[:, 4:, 8] = 20  # void: what is found is part of the result
            self.masks_queries_logits = torch.full((count, 40, 64, 64), -9.0)
            self.masks_queries_logits[:, :, 20:24, 20:24] = 9
            self.image_sizes = torch.tensor([[256, 256]] * count)
            self.stuff_ids, self.vocabulary, self.dominant_categories = [[]] * count, None, None

    def peak(rows):
        image = Image.new("RGB", (1024, 256 * rows))
        call = lambda: segment_tiles(lambda tiles: Outputs(len(tiles)), image, Tiling(256), task, 0.3)  # noqa: E731
        call()
        result, most = peak_bytes(call)
        return most - result.segmentation.numel() * result.segmentation.element_size()

    few, many = peak(2), peak(16)
    probabilities = 9 * 4 * 1024 * 256 * 14  # of all classes, float32, of the pixels that are more
    assert many - few < probabilities / 3
