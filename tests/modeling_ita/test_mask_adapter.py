"""The learned mask pooling, by itself; `test_parity.py` compares it with the published network."""

import copy

import pytest
import torch
from torch import nn

from modeling_ita import ITAConfig, ITAForOpenVocabSegmentation, classification
from modeling_ita.classification import (
    AdapterMaskPooling,
    HardMaskPooling,
    MaskAdapter,
    binary_masks,
    weighted_means,
)
from modeling_ita.ops import mask_mean


class Head(nn.Module):
    """Stands for CLIP, of which only the head is used."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(6, 8)

    def pool_masks(self, dense, masks):
        return self.project(mask_mean(dense, masks))


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(2)
    return Head()


@pytest.fixture(scope="module")
def pooling():
    torch.manual_seed(0)
    adapter = MaskAdapter(embed_dim=8, mask_channels=8, channels=12, num_maps=3)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.5)
    return AdapterMaskPooling(adapter)


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    return torch.randn(2, 6, 2, 3), torch.randn(2, 8, 2, 3), torch.randn(2, 5, 16, 24), torch.randn(2, 5, 4)


def pool(pooling, clip, images, valid=None):
    dense, cell_embeds, mask_logits, in_vocab_logits = images
    return pooling(dense, cell_embeds, mask_logits, valid, in_vocab_logits, clip)[0]


@torch.no_grad()
def test_a_mask_is_pooled_alike_in_any_company(clip, pooling, images, monkeypatch):
    together = pool(pooling, clip, images)
    assert together.shape == (2, 5, 8)
    monkeypatch.setattr(classification, "MAX_CHUNK_ACTIVATIONS", 3 * 4 * 12 * 2 * 3)  # three masks
    torch.testing.assert_close(pool(pooling, clip, images), together)
    order = [3, 1]
    fewer = [part[1:] if part.shape[1] > 5 else part[1:, order] for part in images]
    torch.testing.assert_close(pool(pooling, clip, fewer)[0], together[1, order])


@torch.no_grad()
def test_the_form_for_graphs_gives_the_same(clip, pooling, images, monkeypatch):
    eager = pool(pooling, clip, images)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(classification, "TRACED_CHUNK", 2)
    torch.testing.assert_close(pool(pooling, clip, images), eager)


@torch.no_grad()
def test_padding_of_a_batch_is_left_out(clip, pooling, images):
    valid = torch.zeros(2, 64, 96, dtype=torch.bool)
    valid[:, :, :64] = True
    dense, cell_embeds, mask_logits, in_vocab_logits = images
    before = pool(pooling, clip, images, valid)
    dense, mask_logits = dense.clone(), mask_logits.clone()
    dense[..., 2], mask_logits[..., 16:] = 50, 50
    after = pool(pooling, clip, (dense, cell_embeds, mask_logits, in_vocab_logits), valid)
    torch.testing.assert_close(after, before)


@torch.no_grad()
def test_queries_that_add_little_are_pooled_hard(clip, pooling, images):
    dense, _, mask_logits, in_vocab_logits = images
    mask_logits = mask_logits.clone()
    mask_logits[0, 2] = -3.0  # an empty mask
    mask_logits[1, 4] = 9.0
    in_vocab_logits = in_vocab_logits.clone()
    in_vocab_logits[1, 4, -1] = 20.0  # a query that is void
    images = [dense, images[1], mask_logits, in_vocab_logits]
    chosen = AdapterMaskPooling(pooling.adapter, min_score=0.1)
    result, every, hard = (pool(p, clip, images) for p in (chosen, pooling, HardMaskPooling()))
    left_out = torch.zeros(2, 5, dtype=torch.bool)
    left_out[0, 2] = left_out[1, 4] = True
    torch.testing.assert_close(result, torch.where(left_out[..., None], hard, every))
    assert (hard - every)[left_out].abs().amax(-1).min() > 1e-3
    none = AdapterMaskPooling(pooling.adapter, min_score=1.0)
    torch.testing.assert_close(pool(none, clip, images), hard)


@pytest.mark.parametrize("fields", [{"mask_pooling": "adapter"}, {"text_transfer": "post_norm"}])
def test_a_resnet_is_refused(fields):
    with pytest.raises(ValueError, match="a ResNet pools by attention"), torch.device("meta"):
        ITAForOpenVocabSegmentation(ITAConfig(clip_model_name="RN50", **fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"mask_pooling": "soft"},
        {"text_transfer": "panoptic"},
        {"mask_pooling": "adapter", "dense_upsample": 4},
        {"adapter_mask_channels": 18},
        {"adapter_min_score": 2},
    ],
)
def test_settings_that_do_not_fit_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields)) if len(fields) == 1 else "dense_upsample"):
        ITAConfig(**fields)


def test_masks_are_thresholded_strictly_and_before_they_are_resized():
    logits = torch.full((1, 1, 8, 8), -1.0)
    logits[0, 0, 0, 0] = 100.0  # a soft mask's mean would be above one half in the whole cell
    logits[0, 0, 2, 2] = 0.0  # a probability of exactly one half
    masks = binary_masks(logits, (1, 1), 0.5)
    assert masks.shape == (1, 1, 4, 4)
    assert masks[0, 0, 0, 0] == 0.25
    assert masks.sum() == 0.25
    assert binary_masks(logits, (1, 1), 0.45)[0, 0, 1, 1] == 0.25


def test_weights_survive_logits_whose_sigmoid_underflows():
    dense = torch.arange(4.0).view(1, 1, 2, 2)
    maps = torch.full((1, 1, 2, 2), -300.0)
    assert weighted_means(dense, maps).item() == pytest.approx(1.5)
    maps[0, 0, 1, 1] = -200.0
    assert weighted_means(dense, maps).item() == pytest.approx(3.0)


@torch.no_grad()
def test_a_tower_in_half_precision_goes_with_an_adapter_in_float32(clip, pooling, images):
    dense, cell_embeds, mask_logits, in_vocab_logits = images
    exact = pool(pooling, clip, images)
    half = copy.deepcopy(clip).bfloat16()
    rounded = pool(pooling, half, (dense.bfloat16(), cell_embeds.bfloat16(), mask_logits, in_vocab_logits))
    torch.testing.assert_close(rounded.float(), exact, atol=0.05, rtol=0.05)
