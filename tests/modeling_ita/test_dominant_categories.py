"""Dominant categories: selection by cells, and text queries that answer for the class they were selected for."""

import pytest
import torch

from helpers.tiny_checkpoint import tiny_config
from helpers.tiny_model import CLASSES, assert_same, build, pixels, segment
from modeling_ita.classification import class_logits

# --- dominant categories of cells ---


def test_cells_select_one_name_of_each_class_and_the_class_that_some_cell_shows_best():
    model = build(dominant_category_source="cells", num_dominant_categories=3)
    images = pixels(2, 3, 64, 96)
    text = model.encode_vocabulary(CLASSES)
    dense = model.clip_backbone(images).dense
    names = [name for classes in CLASSES for name in ([classes] if isinstance(classes, str) else classes)]
    outputs = segment(model, images)
    for index, selected in enumerate(outputs.dominant_categories):
        probs = []
        for row in range(dense.shape[2]):
            for column in range(dense.shape[3]):
                mask = torch.zeros(1, 1, *dense.shape[2:], dtype=torch.bool)
                mask[..., row, column] = True
                embeds = model.clip_backbone.pool_masks(dense[index : index + 1], mask)
                logits = class_logits(embeds, text, model.void_embedding, model.clip_backbone.logit_scale)
                probs.append(logits[0, 0, :-1].softmax(-1))
        order = torch.stack(probs).amax(0).argsort(descending=True)[:3].tolist()
        assert [text.class_of_name[names.index(name)].item() for name in selected] == order
    assert outputs.class_queries_logits.shape[1] == 3 + model.config.num_learned_queries


def test_cells_of_padding_select_nothing():
    model = build(dominant_category_source="cells", num_dominant_categories=2)
    images = pixels(1, 3, 64, 64)
    padded = torch.nn.functional.pad(images, (0, 64, 0, 32))
    mask = torch.nn.functional.pad(torch.ones(1, 64, 64, dtype=torch.long), (0, 64, 0, 32))
    alone, among = segment(model, images), segment(model, padded, pixel_mask=mask)
    assert among.dominant_categories == alone.dominant_categories
    valid = mask.bool()
    text = model.encode_vocabulary(CLASSES)
    with torch.no_grad():
        inside = model.segment(padded, text, valid)
    assert inside.dominant.shape == (1, 2) and inside.log_probs.isfinite().all()


def test_given_categories_stand_for_the_selected_ones_in_cells():
    model = build(dominant_category_source="cells", num_dominant_categories=3)
    image = pixels(1, 3, 64, 64)
    selected = segment(model, image)
    given = segment(model, image, dominant_categories=selected.dominant_categories)
    assert_same(given.class_queries_logits, selected.class_queries_logits)
    few = segment(model, image, vocabulary=["cat", "dog"])
    assert len(few.dominant_categories[0]) == 2


# --- text queries that answer for their class ---

OWN_CLASS = {
    "dominant_category_source": "cells",
    "num_dominant_categories": 3,
    "text_query_matching": "own_class",
    "text_query_class_bias": True,
    "text_query_regions": True,
}


@pytest.mark.parametrize("weight", [0.0, 1.0], ids=["decoder", "clip"])
def test_a_class_bias_moves_the_own_class_of_text_queries_and_nothing_else(weight):
    model = build(**OWN_CLASS | {"text_query_regions": False})
    image, weights = pixels(1, 3, 64, 64), {"ensemble_alpha": weight, "ensemble_beta": weight}
    results = {}
    for bias in (0.0, 7.0):
        model.dominant_categories.class_bias.data.fill_(bias)
        results[bias] = segment(model, image, **weights)
        results["foreign", bias] = segment(model, image, dominant_categories=["lamp"], **weights)
    moved = (results[7.0].class_queries_logits - results[0.0].class_queries_logits)[0, :, :-1]
    names = ["cat", "sofa", "couch", "wall", "grass", "tree"]
    expected = torch.zeros_like(moved)
    for query, name in enumerate(results[0.0].dominant_categories[0]):
        expected[query, [0, 1, 1, 2, 3, 4][names.index(name)]] = 7.0
    difference = moved - expected
    assert (difference - difference[:, :1]).abs().max() < 2e-3, "all other classes keep their ratios"
    foreign = [results["foreign", bias].class_queries_logits for bias in (0.0, 7.0)]
    assert torch.equal(*foreign)


def test_text_queries_first_look_where_the_dense_feature_shows_their_class():
    model = build(**OWN_CLASS)
    seen = {}
    layer = model.image_text_aggregation.layers[0]
    layer.register_forward_pre_hook(lambda module, inputs, kwargs=None: seen.update(allowed=inputs[4]))
    images = pixels(2, 3, 64, 96)
    outputs = segment(model, images)
    names = ["cat", "sofa", "couch", "wall", "grass", "tree"]
    cells, valid = model.clip_backbone.embed_cells(model.clip_backbone(images).dense, None)
    text = model.encode_vocabulary(CLASSES)
    logits = class_logits(cells, text, model.void_embedding, model.clip_backbone.logit_scale)[..., :-1]
    probs = logits.softmax(dim=-1)
    for image, selected in enumerate(outputs.dominant_categories):
        for query, name in enumerate(selected):
            label = [0, 1, 1, 2, 3, 4][names.index(name)]
            own, logit = probs[image, :, label], logits[image, :, label]
            expected = (own >= own.max() / 2) & (logit >= logit.max() - 4)
            assert seen["allowed"][image, query].tolist() == expected.tolist()
    given = segment(model, images, dominant_categories=outputs.dominant_categories)
    assert_same(given.class_queries_logits, outputs.class_queries_logits)


def test_the_only_class_of_a_vocabulary_is_looked_for_where_it_is_nearest():
    """Its probability is 1 in every cell."""
    model, seen = build(**OWN_CLASS), {}
    model.clip_backbone.clip.logit_scale.data.fill_(9.0)
    layer = model.image_text_aggregation.layers[0]
    layer.register_forward_pre_hook(lambda module, inputs: seen.update(allowed=inputs[4]))
    segment(model, pixels(1, 3, 96, 96), vocabulary=["cat"])
    assert 0 < seen["allowed"][0, 0].sum() < 9


def test_a_given_name_of_no_class_is_looked_for_everywhere():
    model, seen = build(**OWN_CLASS), {}
    model.clip_backbone.clip.logit_scale.data.fill_(9.0)  # so that cells differ
    layer = model.image_text_aggregation.layers[0]
    layer.register_forward_pre_hook(lambda module, inputs: seen.update(allowed=inputs[4]))
    segment(model, pixels(1, 3, 64, 96), dominant_categories=["lamp"])
    assert seen["allowed"][0, 0].all()


def test_in_training_text_queries_are_matched_with_their_own_class_alone():
    model = build(**OWN_CLASS).train()
    images, masks = pixels(2, 3, 64, 64), [torch.rand(3, 64, 64) > 0.5 for _ in range(2)]
    labels = [torch.tensor([0, 2, 0]), torch.tensor([4, 1, 3])]
    given = [["cat", "lamp", "tree"], ["couch"]]
    model(
        images, vocabulary=CLASSES, mask_labels=masks, class_labels=labels, dominant_categories=given
    ).loss.backward()
    assert model.dominant_categories.class_bias.grad is not None
    for image, own in enumerate(([0, None, 4], [1])):
        for queries, targets in zip(*model.criterion.matches.of(image), strict=True):
            matched = {
                query: labels[image][target] for query, target in zip(queries.tolist(), targets, strict=True)
            }
            for query, label in enumerate(own):
                assert matched.get(query) == (label if label in labels[image].tolist() else None)


def test_images_with_and_without_text_queries_of_their_own_make_a_batch():
    model = build(**OWN_CLASS)
    images = pixels(2, 3, 64, 64)
    together = segment(model, images, vocabulary=None, vocabularies=[["cat", "wall"], CLASSES])
    for index, vocabulary in enumerate((["cat", "wall"], CLASSES)):
        alone = segment(model, images[index : index + 1], vocabulary=vocabulary)
        count = alone.class_queries_logits.shape[1:]
        assert_same(
            together.class_queries_logits[index : index + 1, : count[0], : count[1] - 1],
            alone.class_queries_logits[..., :-1],
        )


@pytest.mark.parametrize(
    "option",
    [{"text_query_matching": "own_class"}, {"text_query_class_bias": True}, {"text_query_regions": True}],
)
def test_text_queries_that_answer_for_a_class_need_selection_by_cells(option):
    with pytest.raises(ValueError, match='dominant_category_source="cells"'):
        tiny_config(**option)
    config = tiny_config(**option, dominant_category_source="cells")
    with pytest.raises(ValueError, match='dominant_category_source="cells"'):
        config.dominant_category_source = "features"


def test_text_queries_of_their_own_class_need_learned_queries_beside_them():
    with pytest.raises(ValueError, match="learned queries"):
        tiny_config(**OWN_CLASS, num_learned_queries=0)


def test_clips_own_classification_lifts_unseen_masks_out_of_void():
    model = build(train_vocabulary=["cat", "wall"])
    image = pixels(1, 3, 64, 64)
    published = segment(model, image).class_queries_logits
    model.config.objectness_weight = 1.0
    seen = segment(model, image, train_vocabulary=CLASSES).class_queries_logits
    corrected = segment(model, image).class_queries_logits
    model.config.objectness_weight = 0.0
    assert_same(seen, segment(model, image, train_vocabulary=CLASSES).class_queries_logits, 1e-5)
    assert not torch.allclose(corrected, published, atol=1e-3)
    classes = (0, slice(None), slice(0, -1))
    relative = corrected[classes].log_softmax(-1) - published[classes].log_softmax(-1)
    assert relative.abs().max() < 1e-4, "among classes nothing changes"
    assert torch.allclose(corrected.exp().sum(-1), torch.ones(()), atol=1e-5)
