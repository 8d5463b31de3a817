"""From class and mask logits to semantic maps, panoptic segments and instances."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import interpolate
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_ita import mask_tiles
from modeling_ita.image_processing_ita import ITAImageProcessor
from modeling_ita.mask_tiles import MaskTiles
from modeling_ita.postprocessing import semantic_map, semantic_scores

FIXTURE = Path(__file__).parents[1] / "fixtures" / "readout.safetensors"
THINGS = {0, 1, 5, 8}


@pytest.fixture(scope="module")
def published():
    return load_file(FIXTURE)


@pytest.fixture(scope="module")
def processor():
    return ITAImageProcessor()


@pytest.fixture
def published_outputs(published):
    return model_outputs(
        published["class_logits"], published["mask_logits"], stuff_ids=[sorted(set(range(18)) - THINGS)]
    )


def model_outputs(class_logits, mask_logits, **fields):
    batch = (class_logits, mask_logits) if class_logits.ndim == 3 else (class_logits[None], mask_logits[None])
    return SimpleNamespace(class_queries_logits=batch[0], masks_queries_logits=batch[1], **fields)


def made_up(queries=12, classes=5, height=6, width=9, seed=0, void=0.0):
    """Logits whose masks are smooth blobs that overlap in part, as a model's are."""
    random = torch.Generator().manual_seed(seed)
    class_logits = torch.randn(queries, classes + 1, generator=random) * 3
    class_logits[:, -1] += void
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    centres = torch.rand(queries, 2, 1, 1, generator=random) * torch.tensor([height, width])[:, None, None]
    radii = 1 + torch.rand(queries, 1, 1, generator=random) * 3
    distances = ((rows - centres[:, 0]) ** 2 + (columns - centres[:, 1]) ** 2).sqrt()
    return class_logits, (radii - distances) * 2


# --- agreement with the published code ------------------------------------------------------------------------


def test_semantic_scores_are_the_published_ones(processor, published, published_outputs):
    [result] = processor.post_process_semantic_segmentation(
        published_outputs, target_sizes=[(60, 80)], return_segmentation_scores=True
    )
    expected = published["semantic_scores_every_fourth_row"]
    found = result.segmentation_scores
    assert found.shape == (18, 60, 80)
    assert (found[:, ::4] - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert torch.equal(result.segmentation[::4], expected.argmax(0))


@pytest.mark.parametrize("threshold", [0.0, 0.9])
def test_panoptic_segments_are_the_published_ones(processor, published, published_outputs, threshold):
    [result] = processor.post_process_panoptic_segmentation(
        published_outputs, threshold=threshold, target_sizes=[(60, 80)]
    )
    assert torch.equal(result["segmentation"], published[f"panoptic_map_{threshold}"])
    categories = [segment["label_id"] for segment in result["segments_info"]]
    assert categories == published[f"panoptic_categories_{threshold}"].tolist()
    assert [segment["id"] for segment in result["segments_info"]] == list(range(1, len(categories) + 1))


def test_instances_are_the_published_ones(processor, published, published_outputs):
    [result] = processor.post_process_instance_segmentation(
        published_outputs, threshold=0.0, target_sizes=[(60, 80)], return_binary_maps=True
    )
    scores, order = published["instance_scores"].sort(descending=True)
    assert [segment["score"] for segment in result["segments_info"]] == pytest.approx(
        scores.tolist(), abs=1e-4
    )
    assert [segment["label_id"] for segment in result["segments_info"]] == published["instance_labels"][
        order
    ].tolist()
    assert torch.equal(result["segmentation"].flatten(1).sum(1).float(), published["instance_areas"][order])


# --- masks at the output's size -------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [(32, 64), (32, 41), (23, 64), (1, 1)])
@pytest.mark.parametrize("target_size", [(32, 64), (23, 41), (100, 90), (7, 200), (1, 1)])
@pytest.mark.parametrize("tile_bytes", [1, 20_000, 2**25])
def test_masks_in_tiles_equal_two_whole_bilinear_resizes(monkeypatch, image_size, target_size, tile_bytes):
    monkeypatch.setattr(mask_tiles, "TILE_BYTES", tile_bytes)
    masks = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(1))
    network = interpolate(masks[None], size=(32, 64), mode="bilinear", align_corners=False)
    cropped = network[..., : image_size[0], : image_size[1]]
    expected = interpolate(cropped, size=target_size, mode="bilinear", align_corners=False)[0]
    tiles = list(MaskTiles(masks, image_size, target_size).tiles(3))
    assert [rows.start for rows, _ in tiles] == [0, *(rows.stop for rows, _ in tiles[:-1])]
    torch.testing.assert_close(
        torch.cat([tile for _, tile in tiles]).permute(2, 0, 1), expected, atol=1e-5, rtol=1e-5
    )


def test_without_target_size_a_result_has_the_network_inputs_size(processor):
    outputs = model_outputs(*made_up(height=8, width=16), image_sizes=torch.tensor([[20, 50]]))
    expected = interpolate(outputs.masks_queries_logits, scale_factor=4, mode="bilinear")[0].sigmoid()
    weights = outputs.class_queries_logits[0].softmax(-1)[:, :-1]
    scores = torch.einsum("qc,qhw->chw", weights, expected)
    assert torch.equal(processor.post_process_semantic_segmentation(outputs)[0], scores.argmax(0))
    assert processor.post_process_panoptic_segmentation(outputs)[0]["segmentation"].shape == (32, 64)
    assert processor.post_process_instance_segmentation(outputs)[0]["segmentation"].shape == (32, 64)


def test_padding_to_a_larger_batch_does_not_bleed_into_an_image():
    masks = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(1))
    padded = torch.full((3, 24, 32), -100.0)
    padded[:, :8, :16] = masks
    [(_, alone)] = MaskTiles(masks, (32, 64), (40, 80)).tiles(3)
    [(_, together)] = MaskTiles(padded, (32, 64), (40, 80)).tiles(3)
    assert torch.equal(alone, together)


def test_masks_are_resized_before_they_are_scored():
    class_logits, mask_logits = made_up()
    image_size, target_size = (20, 30), (35, 50)
    tiles = MaskTiles(mask_logits, image_size, target_size).tiles(1)
    masks = torch.cat([tile for _, tile in tiles]).permute(2, 0, 1)
    weights = class_logits.softmax(-1)[:, :-1]
    expected = torch.einsum("qc,qhw->chw", weights, masks.sigmoid())
    torch.testing.assert_close(semantic_scores(class_logits, mask_logits, image_size, target_size), expected)


def test_semantic_map_is_the_argmax_of_the_scores_whatever_the_tiles(monkeypatch):
    class_logits, mask_logits = made_up()
    expected = semantic_scores(class_logits, mask_logits, (20, 30), (35, 50)).argmax(0)
    for tile_bytes in (1, 30_000, 2**25):
        monkeypatch.setattr(mask_tiles, "TILE_BYTES", tile_bytes)
        found = semantic_map(class_logits, mask_logits, (20, 30), (35, 50))
        assert found.dtype == torch.int64
        assert torch.equal(found, expected)


@pytest.mark.parametrize("method", ["semantic", "panoptic", "instance"])
def test_no_tensor_grows_with_classes_times_pixels(monkeypatch, processor, method):
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(
                one.nbytes
                for one in (result if isinstance(result, tuple) else [result])
                if torch.is_tensor(one)
            )
            return result

    monkeypatch.setattr(mask_tiles, "TILE_BYTES", 2**20)
    outputs = model_outputs(*made_up(queries=30, classes=400, height=16, width=16), image_sizes=[(64, 64)])
    with Sizes():
        getattr(processor, f"post_process_{method}_segmentation")(outputs, target_sizes=[(500, 400)])
    assert (
        max(sizes) <= 500 * 400 * 8
    )  # the (H, W) map itself; all masks would take 30 times that, all scores 400


# --- against plain loops --------------------------------------------------------------------------------------


def panoptic_by_loops(class_logits, masks, threshold, overlap, stuff):
    """Section 6 of the method, word by word, in numpy."""
    exponentials = np.exp(class_logits - class_logits.max(1, keepdims=True))
    probabilities = exponentials / exponentials.sum(1, keepdims=True)
    mask_probabilities = 1 / (1 + np.exp(-masks))
    void = probabilities.shape[1] - 1
    kept = [q for q, row in enumerate(probabilities) if row.argmax() != void and row.max() > threshold]
    segmentation, categories, of_stuff = np.zeros(masks.shape[1:], int), [], {}
    if not kept:
        return segmentation, categories
    winner = np.stack([probabilities[q].max() * mask_probabilities[q] for q in kept]).argmax(0)
    for number, q in enumerate(kept):
        category = int(probabilities[q].argmax())
        own, won = mask_probabilities[q] >= 0.5, winner == number
        segment = own & won
        if not own.any() or not won.any() or not segment.any() or won.sum() / own.sum() < overlap:
            continue
        if category in of_stuff:
            segmentation[segment] = of_stuff[category]
            continue
        categories.append(category)
        segmentation[segment] = len(categories)
        if category in stuff:
            of_stuff[category] = len(categories)
    return segmentation, categories


@pytest.mark.parametrize(
    ("seed", "threshold", "overlap"), itertools.product(range(4), [0.0, 0.6], [0.05, 0.5, 0.8])
)
def test_panoptic_segments_equal_plain_loops(processor, seed, threshold, overlap):
    class_logits, mask_logits = made_up(queries=15, height=30, width=40, seed=seed, void=1)
    [found] = processor.post_process_panoptic_segmentation(
        model_outputs(class_logits, mask_logits),
        threshold=threshold,
        overlap_mask_area_threshold=overlap,
        label_ids_to_fuse={1, 2},
        target_sizes=[(30, 40)],
    )
    segmentation, categories = panoptic_by_loops(
        class_logits.double().numpy(), mask_logits.double().numpy(), threshold, overlap, {1, 2}
    )
    assert np.array_equal(found["segmentation"].numpy(), segmentation)
    assert [segment["label_id"] for segment in found["segments_info"]] == categories
    assert all(segment["was_fused"] == (segment["label_id"] in {1, 2}) for segment in found["segments_info"])


def test_instances_equal_plain_loops(processor):
    class_logits, mask_logits = made_up(queries=30, classes=5, height=30, width=40)
    [found] = processor.post_process_instance_segmentation(
        model_outputs(class_logits, mask_logits, stuff_ids=[[0, 3]]),
        threshold=0.0,
        target_sizes=[(30, 40)],
        return_binary_maps=True,
    )
    probabilities = class_logits.double().softmax(-1)[:, :-1].numpy()
    pairs = sorted(itertools.product(range(30), range(5)), key=lambda pair: -probabilities[pair])[:100]
    masks, mask_probabilities = (mask_logits > 0).numpy(), mask_logits.double().sigmoid().numpy()
    expected = sorted(
        (-probabilities[q, c] * mask_probabilities[q][masks[q]].mean(), c, int(masks[q].sum()))
        for q, c in pairs
        if c not in (0, 3) and masks[q].any()
    )
    areas = found["segmentation"].flatten(1).sum(1).tolist()
    assert len(areas) == len(expected) < 100
    for (score, label, area), segment, found_area in zip(
        expected, found["segments_info"], areas, strict=True
    ):
        assert (segment["label_id"], found_area) == (label, area)
        assert segment["score"] == pytest.approx(-score, abs=1e-5)


# --- what a caller relies on ----------------------------------------------------------------------------------


def test_log_probabilities_pass_the_softmax_unchanged(processor):
    class_logits, mask_logits = made_up()
    both = [model_outputs(logits, mask_logits) for logits in (class_logits, class_logits.log_softmax(-1))]
    scores = [
        processor.post_process_semantic_segmentation(one, return_segmentation_scores=True)[
            0
        ].segmentation_scores
        for one in both
    ]
    torch.testing.assert_close(scores[0], scores[1])


@pytest.mark.parametrize("method", ["semantic", "panoptic", "instance"])
def test_an_image_reads_the_same_in_a_batch_of_other_sizes_and_vocabularies(processor, method):
    read = getattr(processor, f"post_process_{method}_segmentation")
    class_logits, mask_logits = made_up(queries=8, classes=3, height=8, width=8)
    wide = torch.full((11, 8), -torch.inf)
    wide[:8, :3], wide[:8, -1], wide[8:, -1] = class_logits[:, :3], class_logits[:, -1], 0
    wide_masks = torch.full((11, 8, 8), torch.finfo(torch.float32).min)
    wide_masks[:8] = mask_logits
    other = made_up(queries=11, classes=7, height=8, width=8, seed=5)
    arguments = {} if method == "semantic" else {"threshold": 0.0}
    alone = read(
        model_outputs(class_logits, mask_logits, image_sizes=[(20, 30)], stuff_ids=[[1]]),
        target_sizes=[(50, 40)],
        **arguments,
    )[0]
    together = read(
        model_outputs(
            torch.stack([other[0], wide]),
            torch.stack([other[1], wide_masks]),
            image_sizes=torch.tensor([[32, 32], [20, 30]]),
            stuff_ids=[[], [1]],
        ),
        target_sizes=torch.tensor([[9, 9], [50, 40]]),
        **arguments,
    )[1]
    if method == "semantic":
        assert torch.equal(alone, together)
    else:
        assert torch.equal(alone["segmentation"], together["segmentation"])
        assert alone["segments_info"] == together["segments_info"]
        assert alone["segments_info"]


def test_stuff_of_the_outputs_is_fused_and_has_no_instances(processor):
    class_logits = torch.tensor([[9.0, 0, 0], [9, 0, 0], [0, 9, 0], [0, 9, 0]])
    mask_logits = torch.full((4, 2, 4), -9.0)
    for query in range(4):
        mask_logits[query, :, query] = 9
    outputs = model_outputs(class_logits, mask_logits, stuff_ids=[[0]])
    [panoptic] = processor.post_process_panoptic_segmentation(outputs, target_sizes=[(2, 4)])
    assert panoptic["segmentation"].tolist() == [[1, 1, 2, 3]] * 2
    assert [(one["label_id"], one["was_fused"]) for one in panoptic["segments_info"]] == [
        (0, True),
        (1, False),
        (1, False),
    ]
    [instances] = processor.post_process_instance_segmentation(outputs, threshold=0.5, target_sizes=[(2, 4)])
    assert [one["label_id"] for one in instances["segments_info"]] == [1, 1]
    [unfused] = processor.post_process_panoptic_segmentation(
        outputs, label_ids_to_fuse=set(), target_sizes=[(2, 4)]
    )
    assert len(unfused["segments_info"]) == 4


def test_each_segment_has_the_label_of_its_images_vocabulary(processor):
    class_logits, mask_logits = torch.tensor([[9.0, 0, 0], [0, 8, 0]]), torch.full((2, 2, 2), 9.0)
    mask_logits[0, 0], mask_logits[1, 1] = -9, -9
    vocabularies = [[["cat"], ["sofa", "couch"]], [["sky"], ["wall"]]]
    outputs = model_outputs(
        class_logits.expand(2, -1, -1), mask_logits.expand(2, -1, -1, -1), vocabulary=vocabularies
    )
    for method in ("panoptic", "instance"):
        read = getattr(processor, f"post_process_{method}_segmentation")
        found = read(outputs, target_sizes=[(2, 2)] * 2)
        assert [[one["label"] for one in image["segments_info"]] for image in found] == [
            ["cat", "sofa"],
            ["sky", "wall"],
        ]


# --- none of the classes --------------------------------------------------------------------------------------


def test_a_threshold_leaves_out_pixels_that_no_class_is_probable_at(processor):
    class_logits, mask_logits = made_up()
    outputs = model_outputs(class_logits, mask_logits, image_sizes=[(20, 30)])
    [plain] = processor.post_process_semantic_segmentation(outputs, target_sizes=[(35, 50)])
    tiles = MaskTiles(mask_logits, (20, 30), (35, 50)).tiles(1)
    masks = torch.cat([tile for _, tile in tiles]).sigmoid()  # (H, W, Q)
    shown = class_logits.softmax(-1)[:, :-1].T[plain] * masks  # of the best class, by each query
    probability = 1 - (1 - shown).prod(-1)
    assert 0 <= probability.min() < 0.25 < 0.75 < probability.max() <= 1
    for threshold in (0.0, 0.3, 0.7, 1.0):
        [found] = processor.post_process_semantic_segmentation(
            outputs, target_sizes=[(35, 50)], threshold=threshold
        )
        certain = (probability - threshold).abs() > 1e-5
        expected = torch.where(probability < threshold, 255, plain)
        assert torch.equal(found[certain], expected[certain])


@pytest.mark.parametrize("threshold", [None, 0.4])
def test_distractors_compete_for_pixels_and_are_not_reported(processor, threshold):
    class_logits, mask_logits = made_up(queries=20, classes=12)
    outputs = model_outputs(class_logits, mask_logits)
    where = {"target_sizes": [(30, 40)]}
    semantic = processor.post_process_semantic_segmentation
    [everything] = semantic(outputs, **where, threshold=threshold, ignore_index=-1)
    [found] = semantic(outputs, **where, threshold=threshold, num_classes=7)
    assert torch.equal(found, torch.where((everything < 0) | (everything >= 7), 255, everything))
    assert {255} < set(found.unique().tolist()) <= {*range(7), 255}
    options = {"threshold": 0.0, "overlap_mask_area_threshold": 0.1, **where}
    for method in ("panoptic", "instance"):
        read = getattr(processor, f"post_process_{method}_segmentation")
        [everything] = read(outputs, **options)
        [found] = read(outputs, num_classes=7, **options)
        kept = [one for one in everything["segments_info"] if one["label_id"] < 7]
        assert [(one["label_id"], one["score"]) for one in found["segments_info"]] == [
            (one["label_id"], one["score"]) for one in kept
        ]
        assert 0 < len(kept) < len(everything["segments_info"])
        if method == "panoptic":
            numbers = torch.zeros(len(everything["segments_info"]) + 1, dtype=torch.int32)
            numbers[[one["id"] for one in kept]] = torch.arange(1, len(kept) + 1, dtype=torch.int32)
            assert torch.equal(found["segmentation"], numbers[everything["segmentation"]])


def test_the_label_of_no_class_is_not_the_label_of_a_class(processor):
    outputs = model_outputs(*made_up(classes=300))
    with pytest.raises(ValueError, match="ignore_index 255 is one of 300 classes"):
        processor.post_process_semantic_segmentation(outputs, threshold=0.5)
    [found] = processor.post_process_semantic_segmentation(outputs, threshold=1.0, ignore_index=65535)
    assert (found == 65535).any()


def test_without_any_probable_class_no_pixel_has_one(processor):
    outputs = model_outputs(torch.tensor([[-999.0, 999.0]]), torch.full((1, 2, 3), 9.0))
    [found] = processor.post_process_semantic_segmentation(outputs, threshold=0.0)
    assert (found == 255).all()


@pytest.mark.parametrize("broken", [0, 1])
def test_outputs_that_are_not_numbers_are_refused(processor, broken):
    logits = made_up()
    logits[broken][0, 0] = float("nan")
    for method in ("semantic", "panoptic", "instance"):
        with pytest.raises(ValueError, match="outputs for image 0 are NaN"):
            getattr(processor, f"post_process_{method}_segmentation")(model_outputs(*logits))


def test_the_better_of_two_instances_hides_the_other_in_the_map(processor):
    class_logits = torch.tensor([[1.0, 0.0], [5.0, 0.0]])
    mask_logits = torch.tensor([[[9.0, 9, 9, -9]], [[-9, 9, -9, -9]]])
    outputs = model_outputs(class_logits, mask_logits)
    [found] = processor.post_process_instance_segmentation(outputs, target_sizes=[(1, 4)])
    assert found["segmentation"].tolist() == [[2, 1, 2, 0]]
    [runs] = processor.post_process_instance_segmentation(
        outputs, target_sizes=[(1, 4)], return_coco_annotation=True
    )
    assert runs["segmentation"] == [[2, 1], [1, 3]]


def test_nothing_found_is_a_map_of_zeros_without_segments(processor):
    outputs = model_outputs(torch.tensor([[-99.0, 99.0]]), torch.full((1, 2, 3), -9.0), image_sizes=[(8, 12)])
    for read in (processor.post_process_panoptic_segmentation, processor.post_process_instance_segmentation):
        [found] = read(outputs, target_sizes=[(5, 6)])
        assert torch.equal(found["segmentation"], torch.zeros(5, 6, dtype=torch.int32))
        assert found["segments_info"] == []
    assert processor.post_process_semantic_segmentation(outputs, target_sizes=[(5, 6)])[0].shape == (5, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_scored_in_float32(processor, dtype):
    class_logits, mask_logits = (one.to(dtype) for one in made_up())
    low, high = (
        model_outputs(*one)
        for one in ((class_logits, mask_logits), (class_logits.float(), mask_logits.float()))
    )
    for method in ("semantic", "panoptic", "instance"):
        read = getattr(processor, f"post_process_{method}_segmentation")
        found, expected = read(low, target_sizes=[(30, 40)])[0], read(high, target_sizes=[(30, 40)])[0]
        if method != "semantic":
            assert found["segments_info"] == expected["segments_info"]
            found, expected = found["segmentation"], expected["segmentation"]
        assert torch.equal(found, expected)


def test_reading_does_not_change_the_outputs(processor):
    outputs = model_outputs(*made_up())
    before = outputs.masks_queries_logits.clone()
    for method in ("semantic", "panoptic", "instance"):
        getattr(processor, f"post_process_{method}_segmentation")(outputs, target_sizes=[(6, 9)])
    assert torch.equal(outputs.masks_queries_logits, before)


@pytest.mark.parametrize("sizes", [[(5, 5)] * 2, [], [(0, 5)], [(5,)]])
def test_target_sizes_that_do_not_fit_are_refused(processor, sizes):
    with pytest.raises(ValueError, match="target size"):
        processor.post_process_semantic_segmentation(model_outputs(*made_up()), target_sizes=sizes)


def test_two_forms_of_instances_at_once_are_refused(processor):
    with pytest.raises(ValueError, match="both"):
        processor.post_process_instance_segmentation(
            model_outputs(*made_up()), return_coco_annotation=True, return_binary_maps=True
        )
