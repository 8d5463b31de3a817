"""The package without torch follows the rules of the model's code: images, names, tokens, segments."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import SizeDict

from helpers.exported import ROOT, run_eagerly, write_without_graphs
from ita_segmentation.export import OnnxPredictor
from ita_segmentation.export.ita_onnx import (
    images,
    instance_segments,
    parse_classes,
    preprocess,
    read_image,
    vocabulary,
)
from modeling_ita import ITAForOpenVocabSegmentation, ITAImageProcessor
from modeling_ita import text as rules

FILES = sorted((ROOT / "examples").glob("scene_*"))[:4]
CLASSES = ["water", "concrete", ["teddy bear", "teddy"], "french fries", ["a new word", "and its synonym"]]
FOLDER = ROOT / "models" / "ita-tiny"


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    model = ITAForOpenVocabSegmentation.from_pretrained(FOLDER).eval()
    processor = ITAImageProcessor.from_pretrained(FOLDER)
    folder = tmp_path_factory.mktemp("shipped") / "exported"
    write_without_graphs(model, processor, folder)
    return model, processor, OnnxPredictor(folder, run=run_eagerly(model))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"threshold": 0.3}, {"threshold": 0.3, "num_classes": 4}])
@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_segments_are_those_of_the_image_processor(shipped, task, options):
    model, processor, predictor = shipped
    read = [Image.open(file).convert("RGB") for file in FILES]
    outputs = model(**processor(images=read, return_tensors="pt"), vocabulary=CLASSES)
    post_process = getattr(processor, f"post_process_{task}_segmentation")
    expected = post_process(outputs, target_sizes=[image.size[::-1] for image in read], **options)
    count = 0
    for one, other in zip(predictor.segment(FILES, CLASSES, task, **options), expected, strict=True):
        if task == "semantic":
            assert (one == other.numpy()).mean() >= 0.999
            continue
        assert (one["segmentation"] == other["segmentation"].numpy()).mean() >= 0.999
        for segment, wanted in zip(one["segments_info"], other["segments_info"], strict=True):
            assert segment.pop("score") == pytest.approx(wanted.pop("score"), abs=1e-4)
            assert segment == wanted
            count += 1
    assert task == "semantic" or count > 1


@torch.no_grad()
def test_instances_keep_what_others_hide(shipped):
    model, processor, predictor = shipped
    image = Image.open(FILES[0]).convert("RGB")
    outputs = model(**processor(images=image, return_tensors="pt"), vocabulary=CLASSES)
    [expected] = processor.post_process_instance_segmentation(
        outputs, target_sizes=[(100, 150)], threshold=0.1, return_binary_maps=True
    )
    options = {"threshold": 0.1, "return_binary_maps": True}
    [found] = predictor.outputs([image], CLASSES, target_sizes=[(100, 150)])
    found = instance_segments(found, **options)
    assert len(expected["segmentation"]) > 1
    assert (found["segmentation"] == expected["segmentation"].numpy()).mean() >= 0.999


def test_the_checkpoints_other_classes_compete_without_being_reported(shipped):
    _, _, predictor = shipped
    alone = predictor(FILES[0], ["unicorn"])
    assert set(np.unique(alone)) == {0}
    among_others = predictor(FILES[0], ["unicorn"], distractors=True)
    assert (among_others == 255).mean() > 0.9


@pytest.mark.parametrize(
    ("old", "new"),
    [((240, 320), (192, 256)), ((31, 47), (77, 40)), ((300, 41), (30, 41)), ((64, 64), (64, 64))],
)
def test_pixels_are_resized_as_the_image_processor_does(old, new):
    pixels = np.random.default_rng(0).integers(0, 256, (*old, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    expected = ITAImageProcessor().resize(tensor, SizeDict(height=new[0], width=new[1]), resample=2)
    assert (images.resize(pixels, new) == expected.permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize(
    "size",
    [
        {"shortest_edge": 96, "longest_edge": 128},
        {"shortest_edge": 96},
        {"longest_edge": 96},
        {"max_height": 50, "max_width": 90},
        {"height": 70, "width": 40},
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "I;16"])
def test_network_inputs_are_those_of_the_image_processor(size, mode, tmp_path):
    generator = np.random.default_rng(0)
    for shape in ((60, 100), (101, 61), (64, 32)):
        if mode == "I;16":
            image = Image.fromarray(generator.integers(0, 65536, shape).astype(np.uint16))
        else:
            channels = {"RGB": (3,), "RGBA": (4,)}.get(mode, ())
            image = Image.fromarray(generator.integers(0, 256, (*shape, *channels), dtype=np.uint8)).convert(
                mode
            )
        image.save(tmp_path / "image.png")
        processor = ITAImageProcessor(size=size)
        expected = processor(images=str(tmp_path / "image.png"), return_tensors="pt")
        found = preprocess(read_image(tmp_path / "image.png"), processor.to_dict())
        assert np.abs(found.pixel_values - expected["pixel_values"][0].numpy()).max() < 1e-5
        assert (found.valid == expected["pixel_mask"][0].bool().numpy()).all()


def test_a_rotated_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "rotated.jpg", exif=exif)
    assert read_image(tmp_path / "rotated.jpg").size == (20, 40)


def test_images_of_different_padded_sizes_are_refused_as_one_batch():
    settings = ITAImageProcessor(do_resize=False).to_dict()
    inputs = [preprocess(Image.new("RGB", size), settings) for size in ((64, 32), (60, 30), (32, 65))]
    assert images.stack(inputs[:2])["pixel_values"].shape == (2, 3, 32, 64)
    with pytest.raises(ValueError, match="one padded size, got 32 x 64, 96 x 32: give them one by one"):
        images.stack(inputs)


names = st.text(st.characters(codec="utf-8", exclude_characters="|;,\n"), min_size=1, max_size=12).filter(
    str.strip
)
classes = st.lists(
    st.lists(names | st.sampled_from(["Cat", "cats", "sky", "SKY", "ß", "ss"]), min_size=1), min_size=1
)


@given(classes, classes, classes)
@settings(max_examples=60, deadline=None)
def test_vocabularies_follow_the_rules_of_the_model(first, own, trained):
    expected = rules.normalize_vocabulary(first)
    found = vocabulary.normalize_vocabulary(first)
    assert found == list(expected)
    assert vocabulary.is_duplicate(found) == expected.is_duplicate
    assert vocabulary.distinct([*expected.names, vocabulary.OTHER]) == expected.candidate_names
    own, trained = rules.normalize_vocabulary(own), rules.normalize_vocabulary(trained)
    assert vocabulary.classes_among(found, own.names) == expected.shares_name_with(own.names)
    competing, _ = rules.with_distractors(expected, own, trained)
    assert vocabulary.with_distractors(found, own, trained) == list(competing)
    text = ", ".join("|".join(entry) for entry in first)
    assert parse_classes(text) == list(rules.parse_classes(text))


@pytest.mark.parametrize("bad", ["", " , ", "cat,,dog", "cat|"])
def test_bad_vocabularies_are_refused_as_by_the_model(bad):
    with pytest.raises(ValueError) as expected:
        rules.parse_classes(bad)
    with pytest.raises(ValueError, match=f"^{re.escape(str(expected.value))}$"):
        parse_classes(bad)


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_tokens_are_those_of_open_clip_for_text_in_any_script(shipped, text):
    model, _, predictor = shipped
    # What ftfy repairs of mistaken encodings, and control characters, are not the tokenizer's.
    if any(not one.isprintable() for one in text) or _is_repaired(text):
        return
    predictor._tokenize(["a"])
    expected = model.clip_backbone.tokenize([text, f"a photo of a {text}."])[0]
    assert predictor._tokenize([text, f"a photo of a {text}."]).tolist() == expected.tolist()


def _is_repaired(text):
    import ftfy

    return ftfy.fix_encoding(text) != text


@pytest.mark.parametrize(
    "name",
    [
        "Café au lait",
        "it's a dog's  life",
        "R2-D2",
        "T&amp;C",
        "ﬁre‘s “x”",
        "日本の猫 123",
        "naïve ÅNGSTRÖM",
        "🙂🐕",
        "x" * 300,
    ],
)
def test_tokens_are_those_of_open_clip(shipped, name):
    model, _, predictor = shipped
    expected = model.clip_backbone.tokenize([name, "cat"])[0]
    assert predictor._tokenize([name, "cat"]).tolist() == expected.tolist()
