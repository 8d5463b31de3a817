"""The model as its users meet it: vocabularies, batches, options, saving and loading."""

import copy
import logging

import pytest
import torch

from helpers.tiny_checkpoint import EncodedNames, tiny_clip
from helpers.tiny_model import CLASSES, assert_same, build, pixels, segment
from modeling_ita import ITAConfig, ITAForOpenVocabSegmentation, normalize_vocabulary
from modeling_ita.classification import class_logits
from modeling_ita.ops import mask_mean

# --- what comes out ---


def test_outputs_have_the_documented_shapes(tower_model):
    outputs = segment(tower_model, pixels(2, 3, 64, 96))
    assert outputs.class_queries_logits.shape == (2, 9, 6)
    assert outputs.masks_queries_logits.shape == (2, 9, 16, 24)
    assert outputs.image_sizes.tolist() == [[64, 96], [64, 96]]
    assert [len(names) for names in outputs.dominant_categories] == [3, 3]
    assert torch.allclose(outputs.class_queries_logits.exp().sum(dim=-1), torch.ones(2, 9), atol=1e-5)


def test_dominant_names_are_the_nearest_of_all_names_and_the_word_other(model):
    outputs = segment(model, pixels(1, 3, 64, 64))
    features = model.clip_backbone(pixels(1, 3, 64, 64))
    everywhere = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    image = torch.nn.functional.normalize(
        model.clip_backbone.pool_masks(features.dense, everywhere)[0, 0], dim=0
    )
    names = ["cat", "sofa", "couch", "wall", "grass", "tree", "other"]
    similarity = model.text_encoder.embed_names(names, model.config.templates) @ image
    assert outputs.dominant_categories[0] == [names[i] for i in similarity.argsort(descending=True)[:3]]


def test_the_thumbnail_is_the_same_as_open_clips_own_embedding(model):
    import open_clip
    from PIL import Image

    from modeling_ita.clip_backbone import CLIP_MEAN, CLIP_STD

    image = torch.randint(0, 256, (3, 70, 50), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]
    transform = open_clip.image_transform(64, is_train=False, mean=CLIP_MEAN, std=CLIP_STD)
    with torch.no_grad():
        ours = model.clip_backbone.embed_thumbnail((image / 255 - mean) / std)
        theirs = model.clip_backbone.clip.encode_image(
            transform(Image.fromarray(image.permute(1, 2, 0).numpy()))[None]
        )
    assert torch.equal(ours, theirs)


def test_text_cut_at_the_end_of_the_longest_prompt_is_open_clips_own_encoding(tower_model):
    clip = tower_model.clip_backbone
    prompts = ["cat", "a photo of a large sofa."]
    with torch.no_grad():
        assert_same(clip.encode_text(prompts), clip.clip.encode_text(clip.tokenizer(prompts)), 1e-5)


# --- padding ---


@pytest.mark.parametrize("size", [(64, 64), (50, 90), (33, 70)])
def test_padding_never_changes_an_images_result(tower_model, size):
    alone = pixels(1, 3, *size)
    height, width = -(-size[0] // 32) * 32, -(-size[1] // 32) * 32
    expected = segment(tower_model, alone)
    batch = pixels(2, 3, 128, 160, seed=5)  # what lies in the padding must not matter either
    batch[0, :, : size[0], : size[1]] = alone[0]
    mask = torch.ones(2, 128, 160, dtype=torch.int64)
    mask[0] = 0
    mask[0, : size[0], : size[1]] = 1
    outputs = segment(tower_model, batch, pixel_mask=mask)
    assert outputs.image_sizes[0].tolist() == list(size)
    assert_same(outputs.class_queries_logits[0], expected.class_queries_logits[0])
    assert_same(
        outputs.masks_queries_logits[0, :, : height // 4, : width // 4], expected.masks_queries_logits[0]
    )
    assert outputs.dominant_categories[0] == expected.dominant_categories[0]


def test_the_pixel_mask_reaches_mask_pooling_and_attention(model):
    """Cells that hold padding only take no part: what the last level says there does not matter."""
    size = (64, 66)  # pads to 64 x 96: the last columns of the finer levels are padding only
    seen = {}
    handle = model.image_text_aggregation.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(args=args), with_kwargs=True
    )
    segment(model, pixels(1, 3, *size))
    handle.remove()
    queries, mask_features, levels, valid = seen["args"][:4]
    changed = [level.clone() for level in levels]
    for level, stride in zip(changed[1:], (16, 8), strict=True):
        level[..., -(-size[1] // stride) :] = 50.0
    changed_masks = mask_features.clone()
    changed_masks[..., -(-size[1] // 4) + 8 :] += 50.0  # beyond the reach of bilinear resizing
    with torch.no_grad():
        before = model.image_text_aggregation(queries, mask_features, levels, valid)[0][-1]
        after = model.image_text_aggregation(queries, changed_masks, changed, valid)[0][-1]
    assert_same(after.class_embeds, before.class_embeds)


# --- vocabularies ---


def test_each_image_may_have_its_own_vocabulary(model):
    images = pixels(2, 3, 64, 64)
    first, second = ["cat", "wall"], ["grass", ["sofa", "couch"], "tree", "car"]
    outputs = segment(model, images, vocabulary=None, vocabularies=[first, second])
    for index, classes in enumerate((first, second)):
        alone = segment(model, images[index : index + 1], vocabulary=classes)
        count = len(classes)
        queries = alone.class_queries_logits.shape[1]
        assert_same(
            outputs.class_queries_logits[index, :queries, :count], alone.class_queries_logits[0, :, :count]
        )
        assert_same(outputs.class_queries_logits[index, :queries, -1], alone.class_queries_logits[0, :, -1])
        assert_same(outputs.masks_queries_logits[index, :queries], alone.masks_queries_logits[0])
    assert (outputs.class_queries_logits[0, :, 2:4] == float("-inf")).all()


def test_the_same_classes_in_another_order_score_the_same(model):
    order = [3, 0, 4, 2, 1]
    expected = segment(model, pixels(1, 3, 64, 64))
    outputs = segment(model, pixels(1, 3, 64, 64), vocabulary=[CLASSES[i] for i in order])
    assert_same(outputs.class_queries_logits[..., :-1], expected.class_queries_logits[..., order])
    assert_same(outputs.masks_queries_logits, expected.masks_queries_logits)


def test_a_class_scores_the_maximum_of_its_names(model):
    grouped = model.encode_vocabulary([["sofa", "couch"], "wall"])
    separate = model.encode_vocabulary(["sofa", "couch", "wall"])
    embeddings = pixels(1, 4, 32)
    scale, void = torch.tensor(10.0), model.void_embedding
    together, apart = (class_logits(embeddings, text, void, scale) for text in (grouped, separate))
    assert torch.allclose(together[..., 0], apart[..., :2].amax(dim=-1))
    assert torch.allclose(together[..., 1:], apart[..., 2:])


def test_one_class_a_thousand_and_duplicates_all_work(model):
    one = segment(model, pixels(1, 3, 64, 64), vocabulary=["cat"])
    assert one.class_queries_logits.shape == (
        1,
        8,
        2,
    )  # "cat" and "other" are all the text queries there can be
    assert sorted(one.dominant_categories[0]) == ["cat", "other"]
    many = segment(model, pixels(1, 3, 64, 64), vocabulary=[f"thing {i}" for i in range(1000)])
    assert many.class_queries_logits.shape == (1, 9, 1001)
    once = segment(model, pixels(1, 3, 64, 64), vocabulary=["cat", "wall"]).class_queries_logits
    twice = segment(model, pixels(1, 3, 64, 64), vocabulary=["cat", "wall", "cat"]).class_queries_logits
    assert_same(twice[..., [0, 1, 3]], once)
    assert (twice[..., 2].exp() == 0).all()


def test_commas_in_a_name_separate_synonyms():
    assert normalize_vocabulary(["cat,kitty", ["sofa, couch", "settee"]]) == [
        ["cat", "kitty"],
        ["sofa", "couch", "settee"],
    ]


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ([], "empty"),
        (["cat", ""], "empty name"),
        ([["cat", " "]], "empty name"),
        ([[]], "no name"),
        ("cat", "list"),
        ([3], "neither"),
    ],
)
def test_a_malformed_vocabulary_is_refused_in_one_line(model, classes, words):
    with pytest.raises(ValueError, match=words) as refusal:
        segment(model, pixels(1, 3, 64, 64), vocabulary=classes)
    assert "\n" not in str(refusal.value)


def test_a_second_call_with_the_same_classes_encodes_nothing():
    model = build()
    encoded = EncodedNames(model)
    segment(model, pixels(1, 3, 64, 64))
    assert encoded.count == 7  # six names and `other`
    segment(model, pixels(1, 3, 64, 96))
    assert encoded.count == 7
    segment(model, pixels(1, 3, 64, 64), vocabulary=[*CLASSES, "lamp"])
    assert encoded.count == 8


def test_new_text_weights_empty_the_cache():
    model = build()
    before = model.encode_vocabulary(["cat"]).prompt_embeds
    with torch.no_grad():
        model.clip_backbone.text_tower.positional_embedding.add_(1.0)
    assert not torch.allclose(model.encode_vocabulary(["cat"]).prompt_embeds, before)


def test_a_vocabulary_first_met_in_inference_mode_can_be_trained_on():
    model = build()
    with torch.inference_mode():
        model(pixels(1, 3, 64, 64), vocabulary=CLASSES)
    train_step(model, pixels(1, 3, 64, 64)).loss.backward()


def test_a_name_longer_than_the_context_is_a_warning_that_names_it(model, caplog):
    logging.getLogger("transformers").propagate = True
    logging.getLogger("modeling_ita").propagate = True
    name = "a very long name " * 6
    with caplog.at_level(logging.WARNING):
        segment(model, pixels(1, 3, 64, 64), vocabulary=[name.strip(), "cat"])
    assert any(name.strip() in record.getMessage() for record in caplog.records)


def test_a_model_without_a_vocabulary_says_so():
    model = build(vocabulary=None)
    with pytest.raises(ValueError, match="set_vocabulary"):
        model(pixels(1, 3, 64, 64))
    model.set_vocabulary(["cat", ["sofa", "couch"]])
    assert model.config.id2label == {0: "cat", 1: "sofa"}
    assert segment(model, pixels(1, 3, 64, 64), vocabulary=None).class_queries_logits.shape[-1] == 3


def test_plain_id2label_is_a_vocabulary():
    model = build(vocabulary=None, id2label={0: "cat", 1: "sofa,couch"})
    assert model.default_vocabulary == [["cat"], ["sofa", "couch"]]


def test_templates_and_ensemble_weights_can_be_given_per_call(model):
    image = pixels(1, 3, 64, 64)
    usual = segment(model, image).class_queries_logits
    assert not torch.allclose(
        segment(model, image, templates=["a drawing of a {}."]).class_queries_logits, usual
    )
    alone = segment(model, image, ensemble_alpha=0.0, ensemble_beta=0.0).class_queries_logits
    trained = segment(
        model, image, ensemble_alpha=0.0, ensemble_beta=0.7, train_vocabulary=["couch"]
    ).class_queries_logits
    assert not torch.allclose(alone, usual)
    assert not torch.allclose(trained, alone)
    with pytest.raises(ValueError, match="template"):
        segment(model, image, templates=["no place for the name"])


def test_dominant_categories_can_be_given(model):
    image = pixels(2, 3, 64, 64)
    given = ["lamp", "cat"]
    outputs = segment(model, image, dominant_categories=given)
    assert outputs.dominant_categories == [given, given]
    assert outputs.class_queries_logits.shape[1] == 8
    own = segment(model, image[:1])
    again = segment(model, image[:1], dominant_categories=own.dominant_categories)
    assert torch.equal(again.class_queries_logits, own.class_queries_logits)
    with pytest.raises(ValueError, match="at most 3"):
        segment(model, image, dominant_categories=["a", "b", "c", "d"])


def test_without_dominant_categories_and_with_self_attention_it_is_fc_clip():
    model = build(num_dominant_categories=0, num_learned_queries=7, decoder_self_attention=True)
    outputs = segment(model, pixels(1, 3, 64, 64))
    assert outputs.class_queries_logits.shape == (1, 7, 6)
    assert outputs.dominant_categories == [[]]


# --- training ---


def train_step(model, images):
    model.train()
    count, _, height, width = images.shape
    masks = [torch.rand(2, height, width) > 0.5 for _ in range(count)]
    return model(images, vocabulary=CLASSES, mask_labels=masks, class_labels=[torch.tensor([0, 2])] * count)


def test_the_frozen_clip_stays_frozen_and_in_eval_mode():
    model = build()
    outputs = train_step(model, pixels(2, 3, 64, 64))
    outputs.loss.backward()
    assert not any(module.training for module in model.clip_backbone.modules())
    assert all(parameter.grad is None for parameter in model.clip_backbone.parameters())
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert len(outputs.loss_dict) == 3 * (model.config.decoder_layers + 1)


def test_losses_are_the_same_in_eval_mode():
    model = build()
    torch.manual_seed(3)
    expected = train_step(model, pixels(1, 3, 64, 64)).loss
    model.eval()
    torch.manual_seed(3)
    masks = [torch.rand(2, 64, 64) > 0.5]
    outputs = model(
        pixels(1, 3, 64, 64), vocabulary=CLASSES, mask_labels=masks, class_labels=[torch.tensor([0, 2])]
    )
    assert torch.allclose(outputs.loss, expected, rtol=1e-4)


def test_labels_without_masks_are_refused(model):
    with pytest.raises(ValueError, match="both"):
        segment(model, pixels(1, 3, 64, 64), class_labels=[torch.tensor([0])])


# --- damaged input and configurations ---


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_nan_or_infinite_are_refused(model, value):
    image = pixels(2, 3, 64, 64)
    image[1, 0, 63, 63] = value
    with pytest.raises(ValueError, match="pixel_values has values that are NaN or infinite"):
        segment(model, image)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"clip_model_name": "convnext_colossal"}, "no CLIP named 'convnext_colossal'"),
        ({"clip_model_name": "ViT-B-32"}, "four stages"),
        ({"clip_model_config": {"embed_dim": 8}}, "lacks vision_cfg, text_cfg"),
        (
            {
                "clip_model_config": {
                    **tiny_clip("convnext_atto"),
                    "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "image_size": 64},
                }
            },
            "strides",
        ),
    ],
)
def test_a_clip_that_cannot_serve_is_refused_in_one_line(config, words):
    with pytest.raises(ValueError, match=words) as refusal:
        ITAForOpenVocabSegmentation(ITAConfig(**config))
    assert "\n" not in str(refusal.value)


def test_the_default_configuration_is_the_papers_model():
    config = ITAConfig()
    assert (config.num_learned_queries, config.num_dominant_categories, config.decoder_layers) == (180, 20, 9)
    with torch.device("meta"):
        model = ITAForOpenVocabSegmentation(config)
    assert model.clip_backbone.channels == [192, 384, 768, 1536]
    assert model.clip_backbone.embed_dim == 768


# --- precision, mistakes and overrides ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_finite_results_near_those_of_single(dtype):
    model = build(train_vocabulary=CLASSES)
    image = pixels(1, 3, 128, 128)
    expected = segment(model, image)
    with torch.autocast("cpu", dtype=dtype):
        mixed = segment(model, image)
    half = segment(copy.deepcopy(model).to(dtype), image.to(dtype))
    for outputs in (mixed, half):
        assert outputs.class_queries_logits.isfinite().all()
        assert outputs.masks_queries_logits.isfinite().all()
    difference = mixed.class_queries_logits.exp() - expected.class_queries_logits.exp()
    assert difference.abs().max() < 0.1


def test_pooling_holds_large_and_empty_masks_in_half_precision():
    features = torch.full((1, 2, 300, 300), 60.0, dtype=torch.float16)
    masks = torch.stack([torch.ones(300, 300), torch.zeros(300, 300)]).bool()[None]
    assert torch.allclose(mask_mean(features, masks)[0], torch.tensor([[60.0, 60.0], [0.0, 0.0]]), rtol=1e-3)


def test_a_misspelt_argument_is_an_error(model):
    with pytest.raises(TypeError, match="vocabulry"):
        segment(model, pixels(1, 3, 64, 64), vocabulry=CLASSES)


@pytest.mark.parametrize(
    ("masks", "labels", "words"),
    [
        (torch.ones(1, 192, 192), [0], "mask_labels"),
        (torch.ones(2, 64, 64), [0], "class_labels"),
        (torch.ones(1, 64, 64), [5], "below the number of classes"),
        (torch.ones(1, 64, 64), [-1], "at least 0"),
    ],
)
def test_labels_that_do_not_fit_are_refused(model, masks, labels, words):
    with pytest.raises(ValueError, match=words):
        segment(model, pixels(1, 3, 64, 64), mask_labels=[masks], class_labels=[torch.tensor(labels)])


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"ensemble_beta": 2.0}, "from 0 to 1"),
        ({"ensemble_alpha": float("nan")}, "from 0 to 1"),
        ({"dominant_categories": [""]}, "dominant_categories"),
        ({"dominant_categories": [3]}, "dominant_categories"),
        ({"templates": [3]}, "template"),
        ({"pixel_mask": torch.ones(1, 64, 64).index_fill(1, torch.arange(10), 0)}, "rectangle"),
    ],
)
def test_arguments_out_of_range_are_refused(model, kwargs, words):
    with pytest.raises(ValueError, match=words):
        segment(model, pixels(1, 3, 64, 64), **kwargs)


def test_classes_that_differ_only_in_case_change_nothing(model):
    once = segment(model, pixels(1, 3, 64, 64), vocabulary=["cat", "wall"], dominant_categories=["cat"])
    twice = segment(
        model, pixels(1, 3, 64, 64), vocabulary=["cat", "wall", "Cat"], dominant_categories=["cat"]
    )
    assert_same(twice.class_queries_logits[..., [0, 1, 3]], once.class_queries_logits)


# --- damaged checkpoints ---


def test_a_clip_that_cannot_be_built_is_a_readable_error():
    config = build().config
    config.clip_model_config = {
        **config.clip_model_config,
        "vision_cfg": {"timm_model_name": "no_such_trunk"},
    }
    with pytest.raises(ValueError, match="CLIP configuration"):
        ITAForOpenVocabSegmentation(config)
