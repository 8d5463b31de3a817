"""Content-dependent transfer of text embeddings, by itself; `test_parity.py` compares it with the published one."""

import pytest
import torch
from torch.nn import functional as F

from modeling_ita.classification import TextTransfer, shuffled_cells


@pytest.mark.parametrize("form", ["post_norm", "res_post_norm"])
@torch.no_grad()
def test_a_class_is_moved_alike_in_any_vocabulary_and_batch(form):
    torch.manual_seed(0)
    transfer = TextTransfer(16, heads=2, form=form)
    text, images = F.normalize(torch.randn(5, 16), dim=-1), torch.randn(2, 16, 2, 3)
    moved = transfer(text, images)
    assert moved.shape == (2, 5, 16)
    torch.testing.assert_close(transfer(text[2:4], images[1:])[0], moved[1, 2:4])
    assert (moved[0] - moved[1]).abs().max() > 1e-3


def test_cells_are_read_in_the_order_of_the_published_code():
    dense = torch.arange(2 * 3 * 4.0).view(2, 3, 2, 2)
    expected = torch.arange(2 * 4 * 3.0).view(2, 4, 3)  # pieces of three numbers, one after the other
    assert torch.equal(shuffled_cells(dense), expected)
    assert torch.equal(shuffled_cells(dense.contiguous(memory_format=torch.channels_last)), expected)


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit 20 channels"):
        TextTransfer(20, heads=8)
