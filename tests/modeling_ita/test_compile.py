"""Model and network compile and export as one graph each; the network's serves all sizes, batches and vocabularies."""

import copy
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.tiny_checkpoint import tiny_clip, tiny_config
from modeling_ita import ITAForOpenVocabSegmentation

CLASSES = ["cat", ["sofa", "couch"], "wall", "grass", "tree"]


def build(**changes) -> ITAForOpenVocabSegmentation:
    torch.manual_seed(0)
    clip = tiny_clip("modified_resnet")
    config = tiny_config(clip_model_config=clip, encoder_layers=1, decoder_layers=1, **changes)
    return ITAForOpenVocabSegmentation(config).eval()


def images(*size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(1))


class Waits(TorchDispatchMode):
    """Notes operators whose result the host has to wait for."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "masked_select")):
            self.found.append(str(func))
        return func(*args, **kwargs or {})


@torch.no_grad()
def test_sizes_batches_and_vocabularies_share_one_graph_and_its_results_are_the_same():
    model, plain = build(), build()
    counter = CompileCounter()
    model.compile(backend=counter, dynamic=True)
    for size, vocabulary in (
        ((2, 3, 64, 96), CLASSES),
        ((3, 3, 128, 64), CLASSES),
        ((2, 3, 70, 90), [*CLASSES, "zebra"]),
    ):
        found = model(images(*size), vocabulary=vocabulary)
        expected = plain(images(*size), vocabulary=vocabulary)
        torch.testing.assert_close(found.class_queries_logits, expected.class_queries_logits)
        torch.testing.assert_close(found.masks_queries_logits, expected.masks_queries_logits)
        assert found.dominant_categories == expected.dominant_categories
    assert counter.frame_count == 1


def assert_same(found, expected):
    torch.testing.assert_close(found.class_queries_logits, expected.class_queries_logits)
    torch.testing.assert_close(found.masks_queries_logits, expected.masks_queries_logits)
    assert torch.equal(found.image_sizes, expected.image_sizes)
    assert (found.vocabulary, found.stuff_ids) == (expected.vocabulary, expected.stuff_ids)


@torch.no_grad()
def test_the_model_itself_compiles_as_one_graph_and_another_vocabulary_makes_another():
    model, counter, mask = build(), CompileCounter(), torch.ones(2, 64, 96, dtype=torch.int64)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    pixel_values = images(2, 3, 64, 96)
    mask[1, 50:] = 0
    calls: list[dict] = [
        {"vocabulary": ["sky", ["dog", "puppy"]]},
        {"vocabularies": [["cat", "sky"], ["lamp"]], "pixel_mask": mask},
        {},
        {"dominant_categories": ["cat"]},
    ]
    for graphs, arguments in enumerate(calls, start=1):
        if not arguments:
            model.set_vocabulary(["lamp", "grass", "sofa"])
        for _ in range(2):
            assert_same(compiled(pixel_values, **arguments), model(pixel_values, **arguments))
        assert counter.frame_count == graphs


@torch.no_grad()
def test_the_model_itself_exports_with_the_vocabulary_as_a_constant():
    model = build()
    sides = {2: 32 * torch.export.Dim("rows", max=64), 3: 32 * torch.export.Dim("columns", max=64)}
    arguments = ((), {"pixel_values": images(2, 3, 96, 64)})
    with pytest.raises(ValueError, match="call encode_vocabulary"):
        torch.export.export(model, *arguments)
    model.encode_vocabulary()
    program = torch.export.export(model, *arguments, dynamic_shapes={"pixel_values": sides})
    for size in ((96, 64), (64, 160)):
        found = program.module()(pixel_values=images(2, 3, *size))
        assert_same(found, model(images(2, 3, *size)))
        assert found.dominant_categories is None


@torch.no_grad()
def test_a_model_that_looks_at_thumbnails_cannot_be_traced():
    model = build(dominant_category_source="thumbnail")
    model.encode_vocabulary()
    with pytest.raises(ValueError, match="thumbnail"):
        torch.export.export(model, (), {"pixel_values": images(1, 3, 64, 64)})


@torch.no_grad()
def test_the_network_waits_for_no_tensor():
    model = build()
    text = model.encode_vocabulary(CLASSES)
    with Waits() as waits:
        model.segment(images(2, 3, 64, 96), text)
    assert waits.found == []


def test_a_copy_of_a_compiled_model_is_not_compiled():
    model = build()
    model.compile(backend="eager")
    assert copy.deepcopy(model)._compiled_segment is None
    assert pickle.loads(pickle.dumps(model))._compiled_segment is None
    assert model._compiled_segment is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_stays_near_float32(dtype):
    model, half = build(), build().to(dtype)
    expected = model(images(1, 3, 64, 96), vocabulary=CLASSES).masks_queries_logits
    found = half(images(1, 3, 64, 96).to(dtype), vocabulary=CLASSES).masks_queries_logits
    assert found.dtype == dtype
    assert (found.float() - expected).square().mean() < 0.02 * expected.square().mean()
