"""Small models with random weights, of each kind of image tower, and calls of them."""

import torch

from helpers.tiny_checkpoint import tiny_clip, tiny_config
from modeling_ita import ITAForOpenVocabSegmentation

CLASSES = ["cat", ["sofa", "couch"], "wall", "grass", "tree"]
TOWERS = {
    "resnet10t": {},
    "convnext": {"clip_model_config": tiny_clip("convnext_atto")},
    "modified_resnet": {"clip_model_config": tiny_clip("modified_resnet")},
}


def build(**changes) -> ITAForOpenVocabSegmentation:
    torch.manual_seed(0)
    model = ITAForOpenVocabSegmentation(tiny_config(**changes)).eval()
    for module in model.clip_backbone.clip.visual.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics that keep random features apart
            module.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


@torch.no_grad()
def segment(model, pixels, vocabulary=CLASSES, **kwargs):
    return model(pixels, vocabulary=vocabulary, **kwargs)


def pixels(*size, seed=1):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def assert_same(a, b, tolerance=1e-4):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b[b.isfinite()].abs().max()
