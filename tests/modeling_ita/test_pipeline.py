"""`pipeline("image-segmentation")` with a checkpoint's own classes and with candidate labels."""

import base64
import contextlib
import functools
import http.server
import logging
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    ImageSegmentationPipeline,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    pipeline,
)

from helpers.tiny_checkpoint import tiny_clip
from modeling_ita import ITAConfig, ITAForOpenVocabSegmentation, ITAImageProcessor
from modeling_ita.pipeline_ita import (
    ITAImageSegmentationPipeline,
    ITAZeroShotImageSegmentationPipeline,
    parse_candidate_labels,
)

TINY_CLIP = tiny_clip("convnext_atto", context_length=77)
EVERYTHING = {"threshold": 0.0, "mask_threshold": 0.0, "overlap_mask_area_threshold": 0.0}
EVERY_PIXEL = {"threshold": 0.0, "distractors": False}  # has a class
PIPELINES = {
    task: {"impl": f"pipeline_ita.{name}", "pt": ["AutoModelForImageSegmentation"]}
    for task, name in (
        ("image-segmentation", "ITAImageSegmentationPipeline"),
        ("zero-shot-image-segmentation", "ITAZeroShotImageSegmentationPipeline"),
    )
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    config = ITAConfig(
        clip_model_config=TINY_CLIP,
        hidden_dim=32,
        mask_dim=32,
        num_attention_heads=2,
        num_learned_queries=8,
        num_dominant_categories=2,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        vocabulary=[["cat"], ["sofa", "couch"], ["sky"]],
        stuff_names=["sky"],
        custom_pipelines=PIPELINES,
    )
    model = ITAForOpenVocabSegmentation(config).eval()
    with torch.no_grad():  # random weights call everything void: turn the void embedding round
        for name, parameter in model.named_parameters():
            if "void" in name:
                parameter.neg_()
    return model


@pytest.fixture(scope="module")
def segment(model):
    processor = ITAImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
    return ITAImageSegmentationPipeline(model=model, image_processor=processor, task="image-segmentation")


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 60, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["cat", "sofa|couch"], [["cat"], ["sofa", "couch"]]),
        ("cat, sofa|couch", [["cat"], ["sofa", "couch"]]),
        ([["sofa", "couch"], " cat "], [["sofa", "couch"], ["cat"]]),
        (["sofa, couch"], [["sofa", "couch"]]),
    ],
)
def test_candidate_labels_are_classes_of_synonyms(labels, classes):
    assert parse_candidate_labels(labels) == classes


@pytest.mark.parametrize("labels", [[], "", ["cat", ""], ["cat|"], [3], [["cat", 3]], [[]], 3])
def test_bad_candidate_labels_are_refused(segment, image, labels):
    with pytest.raises(ValueError, match="candidate"):
        segment(image, candidate_labels=labels)


@pytest.mark.parametrize("subtask", ["panoptic", "instance", "semantic", None])
def test_labels_are_the_primary_names_of_the_candidates(segment, image, subtask):
    found = segment(image, candidate_labels=["dog", "car|automobile", "lake"], subtask=subtask, **EVERYTHING)
    assert found
    for one in found:
        assert set(one) == {"score", "label", "mask"}
        assert one["label"] in {"dog", "car", "lake"}
        assert (one["score"] is None) == (subtask == "semantic")
        assert (one["mask"].mode, one["mask"].size) == ("L", image.size)
        assert set(np.unique(one["mask"])) <= {0, 255}


@pytest.mark.parametrize("subtask", ["panoptic", "semantic", None])
def test_without_candidates_it_is_the_stock_pipeline(segment, image, subtask):
    stock = ImageSegmentationPipeline(
        model=segment.model, image_processor=segment.image_processor, task="image-segmentation"
    )
    ours, theirs = (one(image, subtask=subtask, **EVERYTHING) for one in (segment, stock))
    assert [(one["score"], one["label"]) for one in ours] == [(one["score"], one["label"]) for one in theirs]
    assert all(np.array_equal(a["mask"], b["mask"]) for a, b in zip(ours, theirs, strict=True))
    assert {one["label"] for one in ours} <= {"cat", "sofa", "sky"}


def test_labels_given_at_construction_hold_until_a_call_names_others(segment, image):
    fixed = ITAImageSegmentationPipeline(
        model=segment.model,
        image_processor=segment.image_processor,
        task="image-segmentation",
        candidate_labels=["dog"],
    )
    for given, expected in (({}, {"dog"}), ({"candidate_labels": "bus|coach"}, {"bus"}), ({}, {"dog"})):
        found = fixed(image, subtask="semantic", **EVERY_PIXEL, **given)
        assert {one["label"] for one in found} == expected


def test_a_batch_gives_what_single_images_give(segment, image):
    arguments = {"candidate_labels": ["dog", "car|automobile"], **EVERYTHING}
    single = segment(image, **arguments)
    batched = segment([image] * 2, batch_size=2, **arguments)
    assert [[(one["score"], one["label"]) for one in found] for found in batched] == [
        [(pytest.approx(one["score"], abs=1e-4), one["label"]) for one in single]
    ] * 2


def test_a_transparent_image_is_seen_over_white(segment):
    inputs = segment.preprocess(Image.new("RGBA", (64, 32), (0, 0, 0, 0)))
    white = segment.preprocess(Image.new("RGB", (64, 32), "white"))
    assert torch.equal(inputs["pixel_values"], white["pixel_values"])


def test_an_unknown_subtask_is_refused(segment, image):
    with pytest.raises(ValueError, match="subtask"):
        segment(image, subtask="depth")


def test_a_checkpoint_brings_its_pipeline(segment, image, tmp_path):
    segment.save_pretrained(tmp_path)
    loaded = pipeline("image-segmentation", model=str(tmp_path), trust_remote_code=True, dtype=torch.bfloat16)
    assert type(loaded).__name__ == "ITAImageSegmentationPipeline"
    found = loaded(image, subtask="semantic", candidate_labels=["dog"], **EVERY_PIXEL)
    assert {one["label"] for one in found} == {"dog"}
    loaded.save_pretrained(tmp_path / "again")
    assert loaded.model.config.custom_pipelines == PIPELINES


# --- many images, of any kind -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images():
    random = np.random.RandomState(1)
    sizes = [(40, 60), (64, 32), (33, 50)]
    return [Image.fromarray(random.randint(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture(scope="module")
def expected(segment, images):
    """What each image alone gives, in the order of `images`."""
    return [summary(segment(one, candidate_labels="dog, car|automobile", **EVERYTHING)) for one in images]


def summary(segments):
    return [
        (one["label"], pytest.approx(one["score"], abs=1e-4), one["mask"].size, float(np.mean(one["mask"])))
        for one in segments
    ]


def close(found, expected):
    """Same segments; masks may differ in a pixel here and there, as sums of floats are made in another order."""
    assert len(found) == len(expected)
    for segments, wanted in zip(found, expected, strict=True):
        assert len(segments) == len(wanted)
        for one, (label, score, size, mean) in zip(segments, wanted, strict=True):
            assert (one["label"], one["score"], one["mask"].size) == (label, score, size)
            assert abs(float(np.mean(one["mask"])) - mean) < 2


@pytest.mark.parametrize("subtask", ["panoptic", "instance", "semantic"])
@pytest.mark.parametrize("batch_size", [2, 3])
def test_images_of_different_sizes_share_a_batch(segment, images, subtask, batch_size):
    arguments = {"candidate_labels": ["dog", "car|automobile"], "subtask": subtask, **EVERYTHING}
    alone = [segment(one, **arguments) for one in images]
    together = segment(images, batch_size=batch_size, **arguments)
    assert [[(one["label"], one["mask"].size) for one in found] for found in together] == [
        [(one["label"], one["mask"].size) for one in found] for found in alone
    ]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_generator_is_read_as_its_answers_are(segment, images, expected, batch_size):
    taken = []

    def source():
        for index, one in enumerate(images):
            taken.append(index)
            yield one

    answers = segment(source(), batch_size=batch_size, candidate_labels="dog, car|automobile", **EVERYTHING)
    first = next(iter(answers))
    assert len(taken) < len(images)
    close([first], expected[:1])
    everything = segment(
        source(), batch_size=batch_size, candidate_labels="dog, car|automobile", **EVERYTHING
    )
    close(list(everything), expected)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_column_of_a_dataset(segment, images, expected, batch_size):
    from datasets import Dataset, Features
    from datasets import Image as ImageColumn
    from transformers.pipelines.pt_utils import KeyDataset

    rows = Dataset.from_dict({"image": images}, features=Features({"image": ImageColumn()}))
    column = KeyDataset(rows, "image")
    answers = segment(column, batch_size=batch_size, candidate_labels="dog, car|automobile", **EVERYTHING)
    close(list(answers), expected)


def test_paths_addresses_base64_and_bytes_are_the_same_image(segment, images, expected, tmp_path):
    images[0].save(tmp_path / "image.png")
    data = (tmp_path / "image.png").read_bytes()
    text = base64.b64encode(data).decode()
    with served(tmp_path) as address:
        sources = [
            str(tmp_path / "image.png"),
            tmp_path / "image.png",
            f"{address}/image.png",
            text,
            f"data:image/png;base64,{text}",
            data,
        ]
        for source in sources:
            found = segment(source, candidate_labels="dog, car|automobile", **EVERYTHING)
            close([found], expected[:1])
        with pytest.raises(ValueError, match=r"missing\.png cannot be fetched: HTTP 404"):
            segment(f"{address}/missing.png")
    with pytest.raises(ValueError, match="cannot be fetched"):
        segment(f"{address}/image.png", timeout=2)


@contextlib.contextmanager
def served(folder):
    """A server of files on this machine, and its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("source", "message"),
    [("no/such/image.png", "no such image: 'no/such/image.png'"), ("", "no such image")],
)
def test_an_image_that_is_not_there_is_named(segment, source, message):
    with pytest.raises(ValueError, match=message):
        segment(source)


def test_thresholds_leave_less(segment, image):
    for subtask in ("panoptic", "instance"):
        counts = [
            len(segment(image, subtask=subtask, **{**EVERYTHING, "threshold": value})) for value in (0.0, 1.0)
        ]
        assert counts[0] > counts[1] == 0


# --- zero-shot -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zero_shot(segment):
    return pipeline(
        "zero-shot-image-segmentation", model=segment.model, image_processor=segment.image_processor
    )


def test_the_zero_shot_task_is_registered_by_this_package(zero_shot, segment, image):
    assert type(zero_shot) is ITAZeroShotImageSegmentationPipeline
    arguments = {"candidate_labels": ["dog", "lake"], "subtask": "semantic"}
    ours, theirs = zero_shot(image, **arguments), segment(image, **arguments)
    assert [one["label"] for one in ours] == [one["label"] for one in theirs]
    assert all(np.array_equal(a["mask"], b["mask"]) for a, b in zip(ours, theirs, strict=True))


def test_the_zero_shot_task_asks_for_labels(zero_shot, image):
    with pytest.raises(ValueError, match="needs candidate_labels"):
        zero_shot(image)
    with pytest.raises(ValueError, match="needs candidate_labels"):
        list(zero_shot([image, image], batch_size=2))


def test_with_the_package_a_path_needs_no_trust_in_the_code_it_holds(zero_shot, image, tmp_path):
    zero_shot.save_pretrained(tmp_path)
    for task, expected in (
        ("image-segmentation", ITAImageSegmentationPipeline),
        ("zero-shot-image-segmentation", ITAZeroShotImageSegmentationPipeline),
    ):
        loaded = pipeline(task, model=str(tmp_path))
        assert type(loaded) is expected
        found = loaded(image, subtask="semantic", candidate_labels="bus", **EVERY_PIXEL)
        assert {one["label"] for one in found} == {"bus"}
    loaded.save_pretrained(tmp_path / "again")
    assert loaded.model.config.custom_pipelines == PIPELINES


def test_a_pipeline_made_of_a_model_heeds_candidate_labels_without_complaint(segment, image):
    records = []
    listener = logging.Handler(logging.ERROR)
    listener.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(listener)
    try:
        made = pipeline("image-segmentation", model=segment.model, image_processor=segment.image_processor)
        ImageSegmentationPipeline(model=segment.model, image_processor=segment.image_processor)
    finally:
        logging.getLogger("transformers").removeHandler(listener)
    assert not records
    found = made(image, subtask="semantic", candidate_labels=["bus"], **EVERY_PIXEL)
    assert {one["label"] for one in found} == {"bus"}


def test_other_models_have_transformers_own_pipeline(image):
    config = SegformerConfig(
        depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8
    )
    stock = pipeline(
        "image-segmentation",
        model=SegformerForSemanticSegmentation(config),
        image_processor=SegformerImageProcessor(size={"height": 32, "width": 32}),
    )
    assert type(stock) is ImageSegmentationPipeline
    assert {one["label"] for one in stock(image)} <= {"LABEL_0", "LABEL_1"}


def test_stuff_labels_are_fused_and_have_no_instances(segment, image):
    arguments = {"candidate_labels": ["dog", "car|automobile", "lake"], **EVERYTHING}
    things = [one["label"] for one in segment(image, **arguments)]
    assert len(things) > len(set(things))
    stuff = [one["label"] for one in segment(image, stuff_labels=["Automobile", "dog", "lake"], **arguments)]
    assert sorted(stuff) == sorted(set(things))
    instances = segment(image, stuff_labels="automobile, lake", subtask="instance", **arguments)
    assert {one["label"] for one in instances} == {"dog"}
    with pytest.raises(ValueError, match="stuff_labels are among the candidate labels, got 'cow'"):
        segment(image, stuff_labels=["cow"], **arguments)


def test_a_misspelt_parameter_is_an_error(segment, image):
    with pytest.raises(TypeError, match="'candidate_label'"):
        segment(image, candidate_label=["cat"])


@pytest.mark.parametrize("threshold", [float("nan"), 2, -1, "0.5", True])
@pytest.mark.parametrize("subtask", ["semantic", "panoptic", "instance"])
def test_a_threshold_is_a_number_from_0_to_1(segment, image, subtask, threshold):
    with pytest.raises(ValueError, match="threshold must be a number from 0 to 1"):
        segment(image, subtask=subtask, threshold=threshold)
