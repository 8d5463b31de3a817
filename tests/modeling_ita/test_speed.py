"""The fast paths compute what the plain ones do, and are faster; the network stays near its backbone's time."""

import time

import pytest
import torch
from torch.nn.functional import interpolate

from modeling_ita import ITAConfig, ITAForOpenVocabSegmentation, mask_tiles, postprocessing
from modeling_ita.deformable_attention import SamplingGrid, sample_by_embedding_bag, sample_by_grid_sample
from modeling_ita.postprocessing import semantic_map

SHAPES = [(3, 5), (6, 9), (12, 18)]


def sampling_inputs(shapes=SHAPES, batch=2, heads=2, points=3, channels=16, spread=4.0):
    random = torch.Generator().manual_seed(0)
    plan = SamplingGrid.of(shapes, torch.device("cpu"))
    cells = sum(height * width for height, width in shapes)
    value = torch.randn(batch, cells, channels, generator=random)
    offsets = torch.randn(batch, cells, heads, len(shapes), points, 2, generator=random) * spread
    weights = torch.randn(batch, cells, heads, len(shapes) * points, generator=random).softmax(-1)
    return value, offsets, weights, plan


def fastest(function, repeats=5):
    """Seconds of the fastest of a few calls: another process can slow down some, not all."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0, 1e9])
def test_bags_sample_what_grid_sample_samples(spread):
    inputs = sampling_inputs(spread=spread)
    torch.testing.assert_close(
        sample_by_embedding_bag(*inputs), sample_by_grid_sample(*inputs), rtol=1e-4, atol=1e-5
    )


def test_bags_have_the_gradients_of_grid_sample():
    gradients = []
    for sample in (sample_by_embedding_bag, sample_by_grid_sample):
        *tensors, plan = sampling_inputs(spread=2.0)
        tensors = [tensor.requires_grad_() for tensor in tensors]
        sample(*tensors, plan).square().sum().backward()
        gradients.append([tensor.grad for tensor in tensors])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_place_that_is_no_number_gives_no_number_and_reads_nothing_else():
    value, offsets, weights, plan = sampling_inputs(batch=1)
    expected = sample_by_embedding_bag(value, offsets, weights, plan)
    offsets[0, 4, 0, 0, 0, 0] = float("nan")
    found = sample_by_embedding_bag(value, offsets, weights, plan)
    assert found[0, 4, :8].isnan().all()
    found[0, 4, :8] = expected[0, 4, :8]
    assert torch.equal(found, expected)


def logits_of_blobs(queries, classes, sharpness, height=24, width=32, seed=0):
    """Class logits and mask logits of smooth blobs, as a network gives them."""
    random = torch.Generator().manual_seed(seed)
    class_logits = torch.randn(queries, classes + 1, generator=random) * sharpness
    coarse = torch.randn(1, queries, height // 4, width // 4, generator=random) * 6 - 2
    return class_logits, interpolate(coarse, size=(height, width), mode="bilinear")[0]


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 4.0])
@pytest.mark.parametrize(("queries", "classes"), [(1, 40), (21, 33), (64, 300)])
@pytest.mark.parametrize("band_bytes", [20_000, 2**23])
def test_leaving_out_classes_that_cannot_win_changes_no_pixel(
    monkeypatch, sharpness, queries, classes, band_bytes
):
    monkeypatch.setattr(mask_tiles, "TILE_BYTES", band_bytes)
    class_logits, mask_logits = logits_of_blobs(queries, classes, sharpness)
    masks = interpolate(mask_logits[None].double(), scale_factor=4, mode="bilinear")[0].sigmoid()
    scores = torch.einsum("qk,qhw->khw", class_logits.double().softmax(-1)[:, :-1], masks)
    found = semantic_map(class_logits, mask_logits)
    # Of two classes equally good but for rounding, either may win.
    assert (scores.gather(0, found[None])[0] >= scores.amax(0) * (1 - 1e-5)).all()


def test_most_of_many_classes_are_left_out(monkeypatch):
    scored = []
    candidates = postprocessing._PrunedArgmax._candidates

    def count(argmax, mask_probabilities):
        classes = candidates(argmax, mask_probabilities)
        scored.append(len(classes))
        return classes

    monkeypatch.setattr(mask_tiles, "TILE_BYTES", 2**18)
    monkeypatch.setattr(postprocessing._PrunedArgmax, "_candidates", count)
    semantic_map(*logits_of_blobs(queries=64, classes=800, sharpness=4.0))
    assert scored[0] == 800  # nothing is known before the first band
    assert max(scored[1:]) < 200


def test_bags_take_less_than_two_thirds_of_grid_samples_time():
    shapes = [(12, 12), (24, 24), (48, 48)]
    inputs = sampling_inputs(shapes, batch=1, heads=8, points=4, channels=256)
    with torch.inference_mode():
        times = {
            sample: fastest(lambda s=sample: s(*inputs))
            for sample in (sample_by_embedding_bag, sample_by_grid_sample)
        }
    assert times[sample_by_embedding_bag] < times[sample_by_grid_sample] / 1.5


def test_network_and_read_out_stay_within_three_times_the_backbone():
    """On ConvNeXt-B at 256 pixels it is about twice its time; far more means that a fast path is not taken."""
    clip = {
        "embed_dim": 64,
        "vision_cfg": {
            "timm_model_name": "convnext_base",
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 256,
        },
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        "custom_text": True,
    }
    config = ITAConfig(clip_model_name="base", clip_model_config=clip, templates=["a photo of a {}."])
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
