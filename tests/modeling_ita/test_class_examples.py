"""Classes given by examples: what a region becomes, how it joins a name, and one clear line for everything wrong."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from helpers.tiny_checkpoint import save_tiny_checkpoint, tiny_clip
from helpers.tiny_model import CLASSES, assert_same, build, pixels, segment
from modeling_ita import normalize_vocabulary
from modeling_ita.class_examples import check_examples, encode_class_examples, region_of_image

LEFT = torch.zeros(64, 96)
LEFT[:, :40] = 1
KEY = normalize_vocabulary(CLASSES).key


def checked(model, examples, weight=None):
    return check_examples(examples, weight, [KEY], model.clip_backbone.embed_dim)


@pytest.fixture(scope="module")
def rows(model):
    return model.encode_examples(pixels(1, 3, 64, 96), [LEFT[None]])[0]


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    return pipeline("image-segmentation", str(save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8))


def test_each_region_has_a_unit_row_of_its_own(tower_model):
    found = tower_model.encode_examples(pixels(1, 3, 64, 96), [torch.stack([LEFT, 1 - LEFT])])
    assert [one.shape for one in found] == [(2, tower_model.clip_backbone.embed_dim)]
    assert_same(found[0].norm(dim=-1), torch.ones(2))
    assert float(found[0][0] @ found[0][1]) < 0.9


def test_padding_and_company_change_no_row(tower_model):
    batch = torch.nn.functional.pad(pixels(2, 3, 64, 96), (0, 32, 0, 64))
    mask = torch.zeros(2, 128, 128)
    mask[0, :64, :96] = mask[1, :50, :70] = 1
    region = torch.zeros(1, 50, 70)
    region[:, 10:30, 5:40] = 1
    together = tower_model.encode_examples(batch, [LEFT[None], region], mask)
    alone = tower_model.encode_examples(batch[1:, :, :50, :70], [region])
    assert_same(together[0], tower_model.encode_examples(batch[:1, :, :64, :96], [LEFT[None]])[0])
    assert_same(together[1], alone[0])


def test_a_region_smaller_than_a_cell_and_one_of_the_whole_image_have_rows(model):
    regions = torch.zeros(3, 64, 96)
    regions[0, 5, 7] = regions[1, 60, 90] = regions[2] = 1
    [found] = model.encode_examples(pixels(1, 3, 64, 96), [regions])
    assert_same(found.norm(dim=-1), torch.ones(3))
    assert float(found[0] @ found[1]) < 0.99  # each sees its own cell


def test_a_learned_pooling_embeds_examples_too():
    adapter = build(clip_model_config=tiny_clip("convnext_atto"), mask_pooling="adapter", adapter_dim=16)
    [found] = adapter.encode_examples(pixels(1, 3, 64, 96), [torch.stack([LEFT, 1 - LEFT])])
    assert_same(found.norm(dim=-1), torch.ones(2))


def test_without_weight_examples_change_nothing_and_with_it_only_their_class_moves(model, rows):
    plain = segment(model, pixels(1, 3, 64, 64))
    same = segment(model, pixels(1, 3, 64, 64), examples={"sofa": rows}, example_weight=0)
    assert torch.equal(plain.class_queries_logits, same.class_queries_logits)
    text = model.encode_vocabulary(CLASSES)
    mixed = model._encode(KEY, None, None, examples=checked(model, {"sofa": rows}))
    moved = (mixed.prompt_embeds != text.prompt_embeds).any(dim=-1)
    assert moved.tolist() == [False, True, True, False, False, False]
    assert (mixed.name_embeds != text.name_embeds).any(dim=-1).tolist() == [*moved.tolist(), False]
    assert mixed.is_seen.tolist() == [seen and index != 1 for index, seen in enumerate(text.is_seen.tolist())]


def test_a_class_given_by_examples_alone_has_no_use_for_its_name(model, rows):
    images, others = pixels(1, 3, 64, 64), [one for one in CLASSES if one != "wall"]
    found = [
        segment(model, images, vocabulary=[*others, name], examples={name: rows}, example_weight=1)
        for name in ("wall", "number 4711")
    ]
    assert_same(*(one.class_queries_logits for one in found))
    plain = segment(model, images, vocabulary=[*others, "wall"])
    assert (plain.class_queries_logits - found[0].class_queries_logits).abs().max() > 1e-3


def test_more_examples_weigh_more_beside_a_name(model):
    def weight(count: int) -> float:
        return checked(model, {"wall": torch.ones(count, 32)}).weights["wall"]

    assert [weight(count) for count in (1, 4, 12)] == [0.2, 0.5, 0.75]


def test_several_examples_count_by_their_mean_direction(model):
    rows = torch.nn.functional.normalize(pixels(3, model.clip_backbone.embed_dim), dim=-1)
    mean = checked(model, {"wall": rows}, 1.0).rows["wall"]
    assert_same(mean, torch.nn.functional.normalize(rows.mean(dim=0), dim=-1))


def test_a_class_seen_in_training_counts_as_unseen_with_examples(model, rows):
    images = pixels(1, 3, 64, 64)
    model_seen = {"train_vocabulary": ["wall"], "ensemble_alpha": 0.0, "ensemble_beta": 1.0}
    unseen = model_seen | {"train_vocabulary": ["nothing"]}
    given = {"examples": {"wall": rows}}
    found = [segment(model, images, ["wall", "cat"], **call, **given) for call in (model_seen, unseen)]
    assert torch.equal(*(one.class_queries_logits for one in found))


@pytest.mark.parametrize(
    ("examples", "weight", "message"),
    [
        ({"elephant": torch.ones(1, 32)}, None, "'elephant', which is not among the classes"),
        ({3: torch.ones(1, 32)}, None, "3, which is not among the classes"),
        ({"wall": torch.ones(32)}, None, r"examples of 'wall' are embeddings \(n, 32\)"),
        ({"wall": torch.ones(0, 32)}, None, r"\(n, 32\)"),
        ({"wall": [0.5]}, None, r"\(n, 32\)"),
        ([torch.ones(1, 32)], None, "maps names of classes"),
        (
            {"sofa": torch.ones(1, 32), "couch": torch.ones(1, 32)},
            None,
            "under two names, 'sofa' and 'couch'",
        ),
        ({"wall": torch.ones(1, 32)}, 1.5, "example_weight must be a number from 0 to 1"),
    ],
)
def test_examples_that_do_not_fit_a_call_are_refused_in_a_line(model, examples, weight, message):
    with pytest.raises(ValueError, match=message) as refused:
        segment(model, pixels(1, 3, 64, 64), examples=examples, example_weight=weight)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([torch.zeros(1, 64, 96)], "mask without a pixel"),
        ([torch.ones(1, 60, 96)], r"must be \(n, 64, 96\), got \(1, 60, 96\)"),
        ([torch.ones(64, 96)], r"must be \(n, 64, 96\)"),
        ([], "masks for 0 images, but there are 1"),
    ],
)
def test_regions_that_do_not_fit_their_image_are_refused_in_a_line(model, masks, message):
    with pytest.raises(ValueError, match=message):
        model.encode_examples(pixels(1, 3, 64, 96), masks)


def test_a_box_is_a_mask_that_is_filled_and_whole_pixels_of_it_count():
    expected = torch.zeros(6, 8)
    expected[1:4, 2:7] = 1
    assert torch.equal(region_of_image((2, 1, 7, 4), (8, 6)), expected)
    assert torch.equal(region_of_image(np.array([2.2, 1.9, 6.1, 3.5]), (8, 6)), expected)
    mask = Image.fromarray((expected * 255).numpy().astype(np.uint8))
    for one in (mask, mask.convert("1"), expected.numpy().astype(bool), expected):
        assert torch.equal(region_of_image(one, (8, 6)), expected)


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ((0, 0, 81, 60), "the box .* is not inside the image of 80 x 60 pixels"),
        ((0, -1, 8, 6), "the box .* is not inside"),
        ((float("nan"), 0, 8, 6), "the box .* is not inside"),
        ((5, 5, 5, 9), "the box .* is empty"),
        ((0, 0, "a", 3), "the box .* is not four numbers"),
        (np.ones((80, 60)), "the mask is 60 x 80 pixels, but the image is 80 x 60"),
        (np.zeros((60, 80)), "the mask is empty"),
        ("left", r"a mask is an image or array, a box is \(left, top, right, bottom\)"),
    ],
)
def test_a_region_that_cannot_be_used_is_named_in_a_line(segmenter, image, region, message):
    with pytest.raises(ValueError, match=f"^examples: example 2 of 'sky': {message}") as refused:
        segmenter(image, examples={"sky": [(image, (0, 0, 9, 9)), (image, region)]})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ({"sky": []}, "a list of"),
        ({"sky": "image.png"}, "a list of"),
        ({"sky": [3]}, r"example 1 of 'sky': it is \(image, mask or box\)"),
        ({"sky": [("nowhere.png", (0, 0, 9, 9))]}, "example 1 of 'sky': no such image"),
        ([3], "map names of classes"),
    ],
)
def test_examples_of_another_form_are_refused_in_a_line(segmenter, image, examples, message):
    with pytest.raises(ValueError, match=message):
        segmenter(image, examples=examples)


def test_examples_of_a_class_that_is_not_asked_for_are_refused(segmenter, image):
    with pytest.raises(ValueError, match="'elephant', which is not among the classes"):
        segmenter(image, examples={"elephant": [(image, (0, 0, 9, 9))]})


def test_the_pipeline_gives_what_the_model_gives_and_keeps_examples_of_its_construction(segmenter, image):
    model, processor = segmenter.model, segmenter.image_processor
    box = (10, 10, 50, 40)
    everything = {"subtask": "semantic", "threshold": 0.0, "distractors": False}
    rows = encode_class_examples(model, processor, {"Dog": [(image, box)]})
    with torch.inference_mode():
        outputs = model(**processor(images=image, return_tensors="pt"), examples=rows, example_weight=1)
    [labels] = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])
    given = {"examples": {"Dog": [(image, region_of_image(box, image.size))]}, "example_weight": 1}
    found = segmenter(image, **everything, **given)
    ids = {model.config.id2label[one]: one for one in labels.unique().tolist()}
    assert {one["label"] for one in found} == set(ids)
    for one in found:
        assert np.array_equal(np.asarray(one["mask"]) > 0, (labels == ids[one["label"]]).numpy())
    kept = pipeline("image-segmentation", model, image_processor=processor, **given)
    assert [np.asarray(one["mask"]).sum() for one in kept(image, **everything)] == [
        np.asarray(one["mask"]).sum() for one in found
    ]
    tiled = segmenter(image, tiles=100, **everything, **given)  # one tile
    assert {one["label"] for one in tiled} == set(ids)
