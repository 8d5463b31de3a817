"""Converted original checkpoints compute what the published implementations compute."""

import pytest
import torch

from helpers.parity_checkpoint import (
    NAMES,
    RELATIVE,
    assert_close,
    load_parity,
    original_tensors,
    pixel_values,
)
from ita_segmentation.conversion import convert_checkpoint, convert_name
from modeling_ita import normalize_vocabulary, set_criterion
from modeling_ita.classification import class_logits
from modeling_ita.image_processing_ita import ITAImageProcessor
from modeling_ita.image_text_aggregation import ImageTextAggregation
from modeling_ita.postprocessing import semantic_scores


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    description, expected = load_parity(request.param)
    model = convert_checkpoint(
        original_tensors(description),
        description["clip_model_config"],
        vocabulary=description["vocabulary"],
        train_vocabulary=description["train_vocabulary"],
        train_num_points=description["train_num_points"],
    )
    return model, description, expected


@pytest.fixture(scope="module")
def run(case):
    model, _, expected = case
    decoder_logits = {}

    def keep(module, args, output):
        decoder_logits["class_embeds"] = output[0][-1].class_embeds

    results = {}
    handle = model.image_text_aggregation.register_forward_hook(keep)
    for image in "ab":
        with torch.no_grad():
            outputs = model(**pixel_values(expected[f"{image}.image"]))
            in_vocab = class_logits(
                decoder_logits["class_embeds"],
                model.encode_vocabulary(),
                model.void_embedding,
                model.image_text_aggregation.scale,
            )
        results[image] = outputs, in_vocab[0]
    handle.remove()
    return results


def test_the_text_classifier_is_the_published_one(case):
    model, _, expected = case
    assert_close(model.encode_vocabulary().prompt_embeds, expected["text_classifier"], "text classifier")


def test_sizes_are_read_off_the_tensors(case):
    model, description, _ = case
    config = model.config
    for field in (
        "hidden_dim",
        "mask_dim",
        "encoder_layers",
        "decoder_layers",
        "decoder_ffn_dim",
        "encoder_ffn_dim",
    ):
        assert getattr(config, field) == description[field]
    is_ita = description["variant"] == "ita"
    assert config.num_learned_queries == description["num_learned_queries"]
    assert config.num_dominant_categories == (20 if is_ita else 0)
    assert config.decoder_self_attention == (not is_ita)
    assert config.ensemble_on_valid_mask == description["ensemble_on_valid_mask"]


@pytest.mark.parametrize("image", ["a", "b"])
def test_dominant_categories_and_text_queries(case, run, image):
    model, description, expected = case
    outputs, _ = run[image]
    if model.dominant_categories is None:
        assert outputs.dominant_categories == [[]]
        return
    assert outputs.dominant_categories == [description["dominant_categories"][image]]
    bare = model.text_encoder.embed_names(outputs.dominant_categories[0], model.config.templates)
    assert_close(
        model.dominant_categories.project(bare).detach(), expected[f"{image}.text_queries"], "text queries"
    )


@pytest.mark.parametrize("image", ["a", "b"])
def test_masks_logits_and_probabilities(case, run, image):
    _, _, expected = case
    outputs, in_vocab = run[image]
    assert_close(outputs.masks_queries_logits[0], expected[f"{image}.mask_logits"], "mask logits")
    assert_close(in_vocab, expected[f"{image}.in_vocab_logits"], "in-vocabulary logits")
    probabilities = outputs.class_queries_logits[0].exp()
    assert_close(
        (probabilities + 1e-8).log(), expected[f"{image}.class_log_probs"], "class log probabilities"
    )


@pytest.mark.parametrize("image", ["a", "b"])
def test_semantic_scores(case, run, image):
    _, description, expected = case
    size = description["sizes"][image]
    outputs = run[image][0]
    image_size = outputs.image_sizes[0].tolist()
    scores = semantic_scores(
        outputs.class_queries_logits[0], outputs.masks_queries_logits[0], image_size, size
    )
    assert_close(scores[:, 1::3, 1::3], expected[f"{image}.semantic_scores"], "semantic scores")
    maps = ITAImageProcessor().post_process_semantic_segmentation(run[image][0], target_sizes=[size])[0]
    differing = (maps[1::3, 1::3] != expected[f"{image}.semantic_scores"].argmax(dim=0)).float().mean()
    assert differing <= 1e-3


@pytest.mark.parametrize("image", ["a", "b"])
def test_panoptic_map(case, run, image):
    _, description, expected = case
    result = ITAImageProcessor().post_process_panoptic_segmentation(
        run[image][0],
        threshold=0.0,
        overlap_mask_area_threshold=description["overlap_threshold_ab"],
        label_ids_to_fuse=description.get("stuff_ids", set(range(18)) - {0, 1, 5, 8}),
        target_sizes=[description["sizes"][image]],
    )[0]
    assert [segment["label_id"] for segment in result["segments_info"]] == expected[
        f"{image}.panoptic_categories"
    ].tolist()
    differing = (result["segmentation"] != expected[f"{image}.panoptic_map"]).float().mean()
    assert differing <= 1e-3


def test_losses_and_gradients(case, monkeypatch):
    model, description, expected = case
    points = expected["loss.points"]
    monkeypatch.setattr(
        set_criterion,
        "draw_points",
        lambda masks, count, device: points[:count].expand(masks, -1, -1).clone(),
    )
    given = description.get("train_dominant_categories")
    model.train()
    model.zero_grad()
    outputs = model(
        **pixel_values(expected["loss.image"]),
        vocabulary=normalize_vocabulary(description["train_vocabulary"]),
        dominant_categories=[given] if given else None,
        mask_labels=[expected["loss.mask_labels"].float()],
        class_labels=[expected["loss.class_labels"]],
    )
    outputs.loss.backward()
    model.eval()
    losses = {
        name.removeprefix("loss."): value for name, value in expected.items() if name.startswith("loss.loss_")
    }
    assert outputs.loss_dict.keys() == losses.keys()
    for name, value in losses.items():
        assert outputs.loss_dict[name].item() == pytest.approx(value.item(), rel=RELATIVE), name
    norms = {
        name.removeprefix("grad_norm."): value for name, value in expected.items() if "grad_norm." in name
    }
    assert norms
    for name, value in norms.items():
        gradient = model.get_parameter(convert_name(name)).grad
        assert gradient.norm().item() == pytest.approx(value.item(), rel=RELATIVE), name
    assert all(parameter.grad is None for parameter in model.clip_backbone.parameters())


def test_the_decoder_takes_no_short_cut_that_shows(case):
    model, _, expected = case
    inputs = pixel_values(expected["a.image"])
    decoder = model.image_text_aggregation
    assert isinstance(decoder, ImageTextAggregation)
    seen = {}
    handle = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(args=args), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
        handle.remove()
        last = decoder(*seen["args"], every_layer=False)[0][-1]
        every = decoder(*seen["args"], every_layer=True)[0]
    assert len(every) == len(decoder.layers) + 1
    assert torch.equal(last.mask_logits, every[-1].mask_logits)
    assert torch.equal(last.class_embeds, every[-1].class_embeds)
