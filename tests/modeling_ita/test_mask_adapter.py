"""The learned mask pooling, by itself; `test_parity.py` compares it with the published network."""

import pytest
import torch

from modeling_ita import mask_adapter
from modeling_ita.mask_adapter import MaskAdapter, binary_masks, weighted_means


@pytest.fixture(scope="module")
def adapter():
    torch.manual_seed(0)
    return MaskAdapter(embed_dim=8, mask_channels=8, channels=12, num_maps=3).eval()


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(1)
    masks = binary_masks(torch.randn(2, 5, 16, 24), (2, 3), 0.5).flatten(0, 1)
    return torch.randn(2, 6, 2, 3), torch.randn(2, 8, 2, 3), masks, torch.arange(2).repeat_interleave(5)


@torch.no_grad()
def test_a_mask_is_pooled_alike_in_any_company(adapter, inputs, monkeypatch):
    dense, image_embeds, masks, image_of_mask = inputs
    together = adapter(dense, image_embeds, masks, image_of_mask)
    assert together.shape == (10, 3, 6)
    order = torch.randperm(10)
    monkeypatch.setattr(mask_adapter, "MAX_CHUNK_ACTIVATIONS", 3 * 4 * 12 * 2 * 3)  # three masks
    shuffled = adapter(dense, image_embeds, masks[order], image_of_mask[order])
    torch.testing.assert_close(shuffled, together[order])
    alone = adapter(dense[1:], image_embeds[1:], masks[7:8], torch.zeros(1, dtype=torch.long))
    torch.testing.assert_close(alone[0], together[7])


def test_no_masks_give_no_embeddings(adapter, inputs):
    dense, image_embeds, masks, image_of_mask = inputs
    assert adapter(dense, image_embeds, masks[:0], image_of_mask[:0]).shape == (0, 3, 6)


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
