"""A shortlist of classes: those alone are classified that have a name among the nearest to the image."""

import pytest
import torch

from helpers.tiny_checkpoint import tiny_config
from modeling_ita import ITAForOpenVocabSegmentation
from modeling_ita.image_processing_ita import semantic_map

CLASSES = ["cat", ["sofa", "couch"], "wall", "grass", ["tree", "oak", "bush"], "lamp", "door", "sky", "road"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ITAForOpenVocabSegmentation(tiny_config()).eval()


@torch.no_grad()
def segment(model, batch=1, **kwargs):
    pixels = torch.randn(batch, 3, 64, 96, generator=torch.Generator().manual_seed(5))
    return model(pixels, vocabulary=CLASSES, **kwargs)


def kept(logits):
    """Classes that the shortlist left in, of (Q, K + 1)."""
    return logits[:, :-1].isfinite().any(0).nonzero().flatten().tolist()


def test_a_list_of_all_names_is_no_list(model):
    everything, listed = segment(model, batch=2), segment(model, batch=2, class_shortlist=100)
    torch.testing.assert_close(listed.class_queries_logits, everything.class_queries_logits)


def test_listed_classes_are_as_in_a_vocabulary_of_their_own(model):
    listed = segment(model, class_shortlist=3)
    classes = kept(listed.class_queries_logits[0])
    assert 1 <= len(classes) <= 3
    alone = segment(
        model, class_shortlist=None, dominant_categories=listed.dominant_categories[0]
    )  # the full vocabulary, to see that the list matters
    assert not torch.equal(alone.class_queries_logits, listed.class_queries_logits)
    with torch.no_grad():
        pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(5))
        own = model(
            pixels,
            vocabulary=[CLASSES[index] for index in classes],
            dominant_categories=listed.dominant_categories[0],
        )
    columns = [*classes, len(CLASSES)]
    torch.testing.assert_close(listed.class_queries_logits[..., columns], own.class_queries_logits)
    torch.testing.assert_close(listed.masks_queries_logits, own.masks_queries_logits)


def test_images_of_a_batch_have_lists_of_their_own(model):
    torch.manual_seed(3)
    pixels = torch.randn(3, 3, 64, 64) * torch.tensor([0.1, 1.0, 5.0])[:, None, None, None]
    with torch.no_grad():
        together = model(pixels, vocabulary=CLASSES, class_shortlist=2).class_queries_logits
        alone = [
            model(one[None], vocabulary=CLASSES, class_shortlist=2).class_queries_logits[0] for one in pixels
        ]
    for found, expected in zip(together, alone, strict=True):
        assert kept(found) == kept(expected)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_nearest_classes_are_those_of_the_nearest_names(model):
    classifier = model.text_classifier(CLASSES)
    names = classifier.candidate_names
    image = classifier.candidates[[names.index("oak"), names.index("other")]]
    similarity = image @ classifier.candidates.T
    for row, found in zip(similarity, classifier.nearest_classes(image, 4), strict=True):
        ranking = [names[index] for index in row.argsort(descending=True) if names[index] != "other"]
        owner = {n: i for i, c in enumerate(CLASSES) for n in ([c] if isinstance(c, str) else c)}
        assert found == sorted({owner[name] for name in ranking[:4]})
    assert 4 in classifier.nearest_classes(image, 1)[0]


def test_an_image_always_has_a_class(model):
    """Even where `other`, which is no class, is nearest."""
    classifier = model.text_classifier(CLASSES)
    other = classifier.candidates[[classifier.candidate_names.index("other")]]
    assert len(classifier.nearest_classes(other, 1)[0]) == 1


def test_the_configuration_can_ask_for_it(model):
    model.config.class_shortlist = 2
    try:
        from_config = segment(model)
    finally:
        model.config.class_shortlist = None
    assert torch.equal(
        from_config.class_queries_logits, segment(model, class_shortlist=2).class_queries_logits
    )


def test_an_empty_list_is_refused(model):
    with pytest.raises(ValueError, match="class_shortlist must be at least 1"):
        segment(model, class_shortlist=0)


def test_maps_hold_listed_classes_only_and_the_right_ones(model):
    outputs = segment(model, class_shortlist=3)
    logits, masks = outputs.class_queries_logits[0], outputs.masks_queries_logits[0]
    found = semantic_map(logits, masks)
    upsampled = torch.nn.functional.interpolate(
        masks[None], scale_factor=4, mode="bilinear", align_corners=False
    )[0]
    scores = torch.einsum("qk,qhw->khw", logits.softmax(-1)[:, :-1], upsampled.sigmoid())
    best = scores.topk(2, dim=0)
    clear = best.values[0] - best.values[1] > 1e-5
    assert set(found.unique().tolist()) <= set(kept(logits))
    assert clear.float().mean() > 0.9 and torch.equal(found[clear], best.indices[0][clear])
