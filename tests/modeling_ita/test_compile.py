"""The network compiles as one graph, which other sizes, batches and vocabularies share, and waits for no tensor."""

import copy
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.tiny_checkpoint import tiny_config
from modeling_ita import ITAForOpenVocabSegmentation

CLASSES = ["cat", ["sofa", "couch"], "wall", "grass", "tree"]


def build(**changes) -> ITAForOpenVocabSegmentation:
    torch.manual_seed(0)
    return ITAForOpenVocabSegmentation(tiny_config(encoder_layers=1, decoder_layers=2, **changes)).eval()


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
