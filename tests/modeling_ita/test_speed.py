"""Pruning leaves out most classes and changes no pixel; fast paths are faster, and the network is near its backbone."""

import timeit

import pytest
import torch
from torch.nn.functional import interpolate

from helpers.tiny_checkpoint import tiny_clip, tiny_config
from modeling_ita import ITAConfig, ITAForOpenVocabSegmentation, mask_tiles, pixel_classifier
from modeling_ita.batching import batch_vocabularies, class_ids_of
from modeling_ita.deformable_attention import SamplingGrid, sample_by_embedding_bag, sample_by_grid_sample
from modeling_ita.postprocessing import instance_segments, panoptic_segments, semantic_map


def logits_of_blobs(queries, classes, sharpness, height=24, width=32, seed=0):
    """Class logits and mask logits of smooth blobs, as a network gives them."""
    random = torch.Generator().manual_seed(seed)
    class_logits = torch.randn(queries, classes + 1, generator=random) * sharpness
    coarse = torch.randn(1, queries, height // 4, width // 4, generator=random) * 6 - 2
    return class_logits, interpolate(coarse, size=(height, width), mode="bilinear")[0]


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 4.0])
@pytest.mark.parametrize(("queries", "classes"), [(1, 40), (21, 33), (64, 300)])
@pytest.mark.parametrize("tile_bytes", [20_000, 2**23])
@pytest.mark.parametrize("target_size", [(100, 120), (200, 250), (330, 401)])
def test_leaving_out_classes_that_cannot_win_changes_no_pixel(
    monkeypatch, sharpness, queries, classes, tile_bytes, target_size
):
    monkeypatch.setattr(mask_tiles, "TILE_BYTES", tile_bytes)
    class_logits, mask_logits = logits_of_blobs(queries, classes, sharpness)
    masks = interpolate(mask_logits[None].double(), scale_factor=4, mode="bilinear")
    masks = interpolate(masks, size=target_size, mode="bilinear")[0].sigmoid()
    scores = torch.einsum("qk,qhw->khw", class_logits.double().softmax(-1)[:, :-1], masks)
    found = semantic_map(class_logits, mask_logits, target_size=target_size)
    # Of two classes equally good but for rounding, either may win.
    assert (scores.gather(0, found[None])[0] >= scores.amax(0) * (1 - 1e-5)).all()


@pytest.fixture(params=[((96, 128), (403, 530)), ((70, 101), (301, 407)), ((96, 128), (1200, 1600))])
def photograph(request):
    """Outputs of a network, the image's size in its input, and a larger one that blocks do not divide."""
    return (*logits_of_blobs(queries=21, classes=33, sharpness=3.0), *request.param)


def pixel_by_pixel(monkeypatch, function):
    with monkeypatch.context() as patch:
        patch.setattr(mask_tiles.MaskTiles, "block_side", 0)
        return function()


@pytest.mark.parametrize("threshold", [None, 0.3, 0.8])
def test_blocks_decide_about_classes_as_pixels_do(monkeypatch, photograph, threshold):
    def run():
        return semantic_map(*photograph, threshold=threshold, num_classes=20)

    expected, found = pixel_by_pixel(monkeypatch, run), run()
    assert len(found.unique()) > 2
    assert (found != expected).float().mean() < 1e-5  # of two equally good but for rounding either may win


@pytest.mark.parametrize("mask_threshold", [0.5, 0.2, 0.0, 1.0])
def test_blocks_decide_about_segments_as_pixels_do(monkeypatch, photograph, mask_threshold):
    def run():
        options = {"threshold": 0.3, "mask_threshold": mask_threshold, "stuff_ids": range(10)}
        return panoptic_segments(*photograph, **options, overlap_mask_area_threshold=0.1)

    (expected, expected_segments), (found, segments) = pixel_by_pixel(monkeypatch, run), run()
    assert segments == expected_segments
    assert bool(segments) == (mask_threshold < 1)
    assert (found != expected).float().mean() < 1e-5


@pytest.mark.parametrize("mask_threshold", [0.5, 0.2, 0.0, 1.0])
def test_instances_are_those_of_whole_masks(photograph, mask_threshold):
    class_logits, mask_logits, image_size, target_size = photograph
    options = {"threshold": 0.05, "mask_threshold": mask_threshold, "stuff_ids": range(10)}
    masks, segments = instance_segments(*photograph, **options, binary_maps=True)
    ids, again = instance_segments(*photograph, **options)
    assert segments == again

    network = interpolate(mask_logits[None].double(), scale_factor=4, mode="bilinear")
    network = network[..., : image_size[0], : image_size[1]]
    whole = interpolate(network, size=target_size, mode="bilinear")[0].sigmoid()
    class_scores, pairs = class_logits.double().softmax(-1)[:, :-1].flatten().topk(100)
    inside = whole[pairs // 33] > mask_threshold
    scores = (
        class_scores * (whole[pairs // 33] * inside).flatten(1).sum(1) / inside.flatten(1).sum(1).clamp(min=1)
    )
    expected = [index for index in scores.argsort(descending=True).tolist() if scores[index] >= 0.05]
    expected = [index for index in expected if pairs[index] % 33 >= 10]
    assert [segment["score"] for segment in segments] == pytest.approx(scores[expected].tolist(), abs=2e-6)
    assert (masks != inside[expected]).float().sum() < 1e-5 * max(1, masks.numel())
    best = masks.int().argmax(0) + 1 if segments else 0
    assert torch.equal(ids, (best * masks.any(0)).int())


def test_few_pixels_of_a_photograph_are_computed(monkeypatch):
    scored = []
    best = pixel_classifier.PixelClassifier.best

    def count(classifier, mask_probabilities, candidates=None):
        scored.append(len(mask_probabilities))
        return best(classifier, mask_probabilities, candidates)

    monkeypatch.setattr(pixel_classifier.PixelClassifier, "best", count)
    class_logits, mask_logits = logits_of_blobs(queries=21, classes=33, sharpness=4.0)
    large = interpolate(8 * mask_logits[None], size=(96, 128), mode="bilinear")[0]
    semantic_map(class_logits, large, (384, 512), (1536, 2048))
    assert 0 < sum(scored) < 0.4 * 1536 * 2048


def test_most_of_many_classes_are_left_out(monkeypatch):
    scored = []
    candidates = pixel_classifier._PrunedArgmax._candidates

    def count(argmax, mask_probabilities):
        classes = candidates(argmax, mask_probabilities)
        scored.append(len(classes))
        return classes

    monkeypatch.setattr(mask_tiles, "TILE_BYTES", 2**18)
    monkeypatch.setattr(pixel_classifier._PrunedArgmax, "_candidates", count)
    semantic_map(*logits_of_blobs(queries=64, classes=800, sharpness=4.0), target_size=(90, 120))
    assert scored[0] == 800  # nothing is known before the first tile
    assert max(scored[1:]) < 200


# --- times: `make test-perf` ---


def fastest(function, repeats=5):
    """Seconds of the fastest of a few calls: another process can slow down some, not all."""
    return min(timeit.repeat(function, number=1, repeat=repeats))


@pytest.mark.perf
def test_embedding_bag_takes_less_than_two_thirds_of_grid_samples_time():
    shapes = [(12, 12), (24, 24), (48, 48)]
    cells = sum(height * width for height, width in shapes)
    inputs = (
        torch.randn(1, cells, 256),
        torch.randn(1, cells, 8, 3, 4, 2) * 4,
        torch.randn(1, cells, 8, 12).softmax(-1),
        SamplingGrid.of(shapes, torch.device("cpu")),
    )
    with torch.inference_mode():
        fast, plain = (
            fastest(lambda s=sample: s(*inputs))
            for sample in (sample_by_embedding_bag, sample_by_grid_sample)
        )
    assert fast < plain / 1.5


@pytest.mark.perf
def test_network_and_post_processing_stay_within_three_times_the_backbone():
    """On ConvNeXt-B at 256 pixels it is about twice its time; far more means that a fast path is not taken."""
    config = ITAConfig(clip_model_config=tiny_clip("convnext_base"), templates=["a photo of a {}."])
    model = ITAForOpenVocabSegmentation(config).eval()
    size = (256, 256)
    pixels = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    vocabulary = [f"class {index}" for index in range(150)]

    def segment():
        outputs = model(pixels, vocabulary=vocabulary)
        semantic_map(outputs.class_queries_logits[0], outputs.masks_queries_logits[0], size, size)

    with torch.inference_mode():
        segment()
        backbone = fastest(lambda: model.clip_backbone(pixels), repeats=3)
        assert fastest(segment, repeats=3) < 3 * backbone


@pytest.mark.perf
def test_names_of_a_large_vocabulary_take_less_than_three_milliseconds_a_call():
    """What a call does with 847 classes of 2,000 names that are encoded already."""
    model = ITAForOpenVocabSegmentation(tiny_config()).eval()
    names = iter(f"thing number {index}" for index in range(2_000))
    vocabulary = [[next(names) for _ in range(2 + (index < 306))] for index in range(847)]
    model.set_vocabulary(vocabulary)
    text = model.encode_vocabulary()

    def look_up():
        assert model.encode_vocabulary() is text
        class_ids_of(key, model.config.stuff_names)

    [key] = batch_vocabularies(None, None, model.config.own_classes, 1)
    assert fastest(look_up, repeats=50) < 0.003
