"""Mask-Adapter and MAFT+: converted checkpoints compute what the published implementations compute.

Image `c` is not a multiple of 32 large: these systems treat the padding like the rest of the image.
"""

import pytest
import torch
from transformers import AutoModel

from helpers.parity_checkpoint import (
    FAMILY,
    assert_close,
    load_parity,
    original_tensors,
    pixel_values,
    untold_settings,
)
from ita_segmentation.conversion import convert_checkpoint
from modeling_ita import ITAForOpenVocabSegmentation
from modeling_ita.image_processing_ita import ITAImageProcessor
from modeling_ita.postprocessing import semantic_scores

IMAGES = ("a", "b", "c")


def convert(description, tensors=None, **settings):
    return convert_checkpoint(
        original_tensors(description) if tensors is None else tensors,
        description["clip_model_config"],
        vocabulary=description["vocabulary"],
        train_vocabulary=description["train_vocabulary"],
        **{**untold_settings(description), **settings},
    )


@pytest.fixture(scope="module", params=FAMILY)
def case(request):
    description, expected = load_parity(request.param)
    return convert(description), description, expected


@pytest.fixture(scope="module")
def run(case):
    """Each image's outputs, and what the parts of the mask classifier gave on the way."""
    model, _, expected = case
    parts = model.mask_classifier
    seen, results = {}, {}

    def keep(name):
        def hook(module, args, output):
            seen[name] = args, output

        return hook

    hooks = [
        parts.register_forward_hook(keep("logits")),
        parts.pooling.register_forward_hook(keep("pooling")),
    ]
    if parts.text_transfer is not None:
        hooks.append(parts.text_transfer.register_forward_hook(keep("text")))
    if hasattr(parts.pooling, "adapter"):
        hooks.append(parts.pooling.adapter.register_forward_hook(keep("maps")))
    for image in IMAGES:
        seen.clear()
        with torch.no_grad():
            results[image] = model(**pixel_values(expected[f"{image}.image"])), dict(seen)
    for hook in hooks:
        hook.remove()
    return results


@pytest.mark.parametrize("image", IMAGES)
def test_masks_and_probabilities(run, case, image):
    expected, (outputs, _) = case[2], run[image]
    assert_close(outputs.masks_queries_logits[0], expected[f"{image}.mask_logits"], "mask logits")
    log_probs = (outputs.class_queries_logits[0].exp() + 1e-8).log()
    assert_close(log_probs, expected[f"{image}.class_log_probs"], "class log-probabilities")


@pytest.mark.parametrize("image", IMAGES)
def test_every_step_on_the_way(run, case, image):
    expected, (_, seen) = case[2], run[image]
    (_, cell_embeds, *_), (embeds, _) = seen["pooling"]
    steps = {"clip_dense_embeddings": cell_embeds[0], "clip_embeddings": embeds[0]}
    steps["out_vocab_logits"] = seen["logits"][1][0][0]
    if "text" in seen:
        steps["text_embeddings"] = seen["text"][1][0]
    if "maps" in seen:
        steps["activation_maps"] = seen["maps"][1]
    assert {f"{image}.{name}" for name in steps} == expected.keys() & {
        f"{image}.{name}"
        for name in (
            "clip_dense_embeddings",
            "clip_embeddings",
            "out_vocab_logits",
            "text_embeddings",
            "activation_maps",
        )
    }
    for name, actual in steps.items():
        assert_close(actual, expected[f"{image}.{name}"], name)


def test_semantic_scores_and_panoptic_maps(run, case):
    _, description, expected = case
    outputs = run["a"][0]
    size = description["sizes"]["a"]
    scores = semantic_scores(
        outputs.class_queries_logits[0],
        outputs.masks_queries_logits[0],
        outputs.image_sizes[0].tolist(),
        size,
    )
    assert_close(scores[:, 1::6, 1::6], expected["a.semantic_scores"], "semantic scores")
    for image in IMAGES:
        result = ITAImageProcessor().post_process_panoptic_segmentation(
            run[image][0],
            threshold=0.0,
            overlap_mask_area_threshold=description["overlap_threshold_ab"],
            label_ids_to_fuse=set(range(18)) - set(description["thing_classes"]),
            target_sizes=[description["sizes"][image]],
        )[0]
        labels = [segment["label_id"] for segment in result["segments_info"]]
        assert labels == expected[f"{image}.panoptic_categories"].tolist()
        assert (result["segmentation"] != expected[f"{image}.panoptic_map"]).float().mean() <= 1e-3


def test_a_batch_with_a_vocabulary_per_image_changes_nothing(run, case):
    model, description, expected = case
    other = ["water", "sky", ["cat", "kitty"]]
    processor = ITAImageProcessor(do_resize=False)
    images = [expected["a.image"].numpy(), expected["c.image"].numpy()]
    inputs = processor(images=images, input_data_format="channels_first", return_tensors="pt")
    with torch.no_grad():
        together = model(**inputs, vocabularies=[description["vocabulary"], other])
        alone = model(**pixel_values(expected["c.image"]), vocabulary=other)
    assert_close(together.class_queries_logits[0], run["a"][0].class_queries_logits[0], "first image")
    own = together.class_queries_logits[1][:, [0, 1, 2, -1]]
    assert_close(own, alone.class_queries_logits[0], "second image")


def test_a_saved_checkpoint_computes_the_same(run, case, tmp_path):
    model, _, expected = case
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=True).eval()
    with torch.no_grad():
        outputs = loaded(**pixel_values(expected["b.image"]))
    assert_close(outputs.class_queries_logits, run["b"][0].class_queries_logits, "log-probabilities")
    assert not any(parameter.requires_grad for parameter in loaded.mask_classifier.parameters())


def test_training_leaves_the_mask_classifier_alone(case):
    model, _, expected = case
    masks = torch.zeros(2, *expected["b.image"].shape[1:])
    masks[0, :30], masks[1, 30:] = 1, 1
    model.train()
    outputs = model(
        **pixel_values(expected["b.image"]), mask_labels=[masks], class_labels=[torch.tensor([2, 3])]
    )
    outputs.loss.backward()
    model.eval()
    assert model.image_text_aggregation.learned_queries.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.mask_classifier.parameters())
    model.zero_grad()


def test_an_adapter_that_a_checkpoint_lacks_starts_anew(tmp_path):
    description, _ = load_parity("fcclip_convnext_tiny")
    convert(description).save_pretrained(tmp_path)
    model = ITAForOpenVocabSegmentation.from_pretrained(
        tmp_path, mask_pooling="adapter", adapter_dim=16, text_transfer="post_norm"
    )
    parameters = dict(model.mask_classifier.named_parameters())
    assert all(parameter.abs().max() < 10 for parameter in parameters.values())  # also not NaN
    assert parameters["pooling.adapter.block2.scale"].tolist() == pytest.approx([1e-6] * 16)
    weights = [parameter for parameter in parameters.values() if parameter.ndim > 1]
    assert min(weight.std() for weight in weights) > 0.01
