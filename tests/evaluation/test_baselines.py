"""Other models scored by the same command: their predictions are those of their own post-processing."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers as hf
from accelerate.state import AcceleratorState
from PIL import Image
from torch.nn.functional import interpolate
from transformers.models.eomt.modeling_eomt import EomtForUniversalSegmentationOutput

from helpers.prepared_squares import IGNORE, NAMES, save_squares
from helpers.tiny_baselines import CLASSES, IS_THING, checkpoint_maker, save_tiny_baseline
from ita_segmentation.cli import eval as run_eval
from ita_segmentation.errors import ITAError
from ita_segmentation.evaluation.baselines import clipseg, postprocessing
from ita_segmentation.evaluation.baselines.loading import load_baseline
from ita_segmentation.evaluation.baselines.postprocessing import (
    best_labels,
    fuse_stuff,
    logits_of_labels,
)

SEMANTIC = ["segformer", "upernet", "dpt", "beit"]
WITH_QUERIES = ["mask2former", "maskformer", "oneformer", "eomt"]
SIZE = (60, 90)
SHUFFLED = [["tree"], ["automobile", "car"], ["sky"], ["puppy", "dog"], ["grass"]]
"""`CLASSES` in another order: label i is class `PLACES[i]`."""
PLACES = [2, 3, 4, 1, 0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoint_maker(tmp_path_factory)


@pytest.fixture
def load(checkpoint):
    def make(name: str, classes=CLASSES, is_thing=IS_THING, **settings):
        return load_baseline(checkpoint(name), classes, is_thing, "cpu", **settings)

    return make


def random_image(height: int = SIZE[0], width: int = SIZE[1], seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (height // 10, width // 10, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR)


def own_outputs(predictor, image, **prompt):
    """What a user of transformers gets: the processor's inputs through the model."""
    network = predictor.network
    inputs = network.processor(images=image, return_tensors="pt", **prompt)
    with torch.no_grad():
        return network.model(**inputs)


def semantic_of(predictor, image, size=SIZE) -> np.ndarray:
    return predictor([image], [size], frozenset({"semantic"}))[0].semantic


def random_outputs(
    monkeypatch, predictor, queries: int = 8, labels: int = 5, side: int = 16, apart: bool = False
):
    """Lets the model answer every image with the same varied outputs; gives them. `apart`: masks do not overlap."""
    generator = torch.Generator().manual_seed(1)
    masks = 4 * torch.randn(1, queries, side // 4, side // 4, generator=generator)
    masks = interpolate(masks, size=(side, side), mode="bicubic")
    if apart:
        masks = torch.where(masks == masks.amax(1, keepdim=True), 8.0, -8.0)
    logits = torch.randn(1, queries, labels + 1, generator=generator)
    for query in range(queries):
        logits[0, query, query % labels] += 5  # sure of itself, so that each label appears
    return answer(monkeypatch, predictor, logits, masks)


def answer(monkeypatch, predictor, logits: torch.Tensor, masks: torch.Tensor):
    """Lets the model answer every image with these class logits (1, Q, L + 1) and masks (1, Q, h, w)."""
    outputs = EomtForUniversalSegmentationOutput(
        class_queries_logits=logits, masks_queries_logits=masks, patch_offsets=[]
    )
    monkeypatch.setattr(predictor.network.model, "forward", lambda **inputs: outputs)
    return outputs


@pytest.mark.parametrize("in_pieces", [False, True], ids=["at once", "in pieces"])
@pytest.mark.parametrize("name", [*SEMANTIC, *WITH_QUERIES[:2], "detr", "eomt_of_windows"])
def test_semantic_maps_are_those_of_the_models_own_post_processing(name, in_pieces, load, monkeypatch):
    if in_pieces:  # one label a piece
        monkeypatch.setattr(postprocessing, "SCORE_BYTES", 4 * SIZE[0] * SIZE[1])
    predictor = load(name, SHUFFLED)
    outputs = own_outputs(predictor, random_image())
    labels = predictor.image_processor.post_process_semantic_segmentation(outputs, target_sizes=[SIZE])[0]
    expected = np.array(PLACES)[labels.numpy()]
    assert (semantic_of(predictor, random_image()) == expected).all()


@pytest.mark.parametrize("name", WITH_QUERIES[:3])
def test_semantic_maps_of_varied_outputs_are_the_post_processing(name, load, monkeypatch):
    predictor = load(name)
    outputs = random_outputs(monkeypatch, predictor)
    expected = predictor.image_processor.post_process_semantic_segmentation(outputs, target_sizes=[SIZE])[
        0
    ].numpy()
    assert len(np.unique(expected)) >= 3
    for size_of_piece in (2**28, 4 * 384**2, 8 * 384**2):
        monkeypatch.setattr(postprocessing, "SCORE_BYTES", size_of_piece)
        assert (semantic_of(predictor, random_image()) == expected).all()


@pytest.mark.parametrize("name", ["segformer", "mask2former"])
def test_labels_that_are_no_class_leave_their_pixels_to_the_next_best(name, load, monkeypatch):
    predictor = load(name, [["tree"], ["dog"], ["grass"]], [False, True, False])
    assert predictor.notes == ("2 labels that are no class are left out: 'sky', 'car'",)
    outputs = (
        random_outputs(monkeypatch, predictor)
        if name == "mask2former"
        else own_outputs(predictor, random_image())
    )
    read = predictor.image_processor.post_process_semantic_segmentation
    scores = read(outputs, target_sizes=[SIZE], return_segmentation_scores=True)[0].segmentation_scores
    assert not np.isin(scores.argmax(0), [1, 2, 4]).all()
    assert (semantic_of(predictor, random_image()) == scores[[4, 1, 2]].argmax(0).numpy()).all()


def test_scores_of_all_labels_are_never_held_at_once(monkeypatch):
    monkeypatch.setattr(postprocessing, "SCORE_BYTES", 3 * 4 * 10 * 10)
    scores = torch.randn(20, 10, 10, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    asked = []

    def scores_of(labels):
        asked.append(len(labels))
        return scores[list(labels)]

    where, best = best_labels(scores_of, range(20), (10, 10), "cpu")
    assert max(asked) == 3
    assert (where == scores.argmax(0)).all()
    assert (best == scores.amax(0)).all()


def test_probabilities_of_some_labels_are_those_among_all():
    logits = 3 * torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    some = logits_of_labels(logits, [4, 0]).softmax(-1)
    assert torch.allclose(some[:, :2], logits.softmax(-1)[:, [4, 0]], rtol=1e-6)
    assert some.shape == (4, 3)
    assert logits_of_labels(logits, range(6)) is logits


@pytest.mark.parametrize("name", ["maskformer", "eomt", "segformer", "clipseg"])
def test_an_image_scores_the_same_whatever_its_neighbours(name, load):
    predictor = load(name)
    images = [random_image(), random_image(40, 120, 1)]
    sizes = [(image.height, image.width) for image in images]
    together = predictor(images, sizes, predictor.tasks)
    for image, size, one in zip(images, sizes, together, strict=True):
        alone = predictor([image], [size], predictor.tasks)[0]
        assert one.semantic.shape == size
        assert (one.semantic == alone.semantic).all()


def test_padding_is_cut_from_eomts_semantic_map(load, monkeypatch):
    """In a wide image the padding is the lower half: what the masks say there must not show."""
    predictor = load("eomt")
    masks = torch.full((1, 2, 16, 16), -9.0)
    masks[0, 0, :8], masks[0, 1, 8:] = 9.0, 9.0
    logits = torch.full((1, 2, 6), -9.0)
    logits[0, 0, 1], logits[0, 1, 3] = 9.0, 9.0
    answer(monkeypatch, predictor, logits, masks)
    labels = semantic_of(predictor, random_image(40, 80), (40, 80))
    assert (labels[:39] == 1).all()


def test_images_are_not_center_cropped(load, checkpoint):
    assert json.loads((checkpoint("beit") / "preprocessor_config.json").read_text())["do_center_crop"]
    assert load("beit").network.inputs(random_image())["pixel_values"].shape == (1, 3, 64, 64)


@pytest.mark.parametrize("name", WITH_QUERIES)
def test_panoptic_segments_are_those_of_the_models_own_post_processing(name, load, monkeypatch):
    predictor = load(name, SHUFFLED, [IS_THING[PLACES.index(index)] for index in range(5)])
    outputs = random_outputs(monkeypatch, predictor, queries=6, apart=True)  # the last one is fused
    fused = {"stuff_classes": [0, 2, 4]} if name == "eomt" else {"label_ids_to_fuse": {0, 2, 4}}
    expected = predictor.image_processor.post_process_panoptic_segmentation(
        outputs, target_sizes=[SIZE], **fused
    )[0]
    found = predictor([random_image()], [SIZE], frozenset({"panoptic"}))[0]
    assert found.semantic is None and found.instances is None
    of_id = {info["id"]: PLACES[info["label_id"]] for info in expected["segments_info"]}
    assert sorted(segment["label_id"] for segment in found.segments) == sorted(of_id.values())
    assert len(of_id) >= 4
    own_ids = expected["segmentation"].numpy()
    for segment in found.segments:
        inside = found.panoptic == segment["id"]
        [own_id] = np.unique(own_ids[inside])
        assert of_id[own_id] == segment["label_id"]
        assert ((own_ids == own_id) == inside).all()


@pytest.mark.parametrize("name", WITH_QUERIES[:3])
def test_no_segment_is_lost_when_stuff_is_fused_before_it(name, load, monkeypatch):
    """Queries of sky, dog, grass, car, tree, sky, dog, grass: the post-processing of transformers loses one of them."""
    predictor = load(name)
    random_outputs(monkeypatch, predictor, queries=8, apart=True)
    found = predictor([random_image()], [SIZE], frozenset({"panoptic"}))[0]
    assert [segment["label_id"] for segment in found.segments] == [0, 1, 2, 3, 4, 1]
    assert [segment["id"] for segment in found.segments] == [1, 2, 3, 4, 5, 6]
    assert set(np.unique(found.panoptic)) - {0} == {1, 2, 3, 4, 5, 6}


def test_segments_of_one_stuff_class_become_one_and_no_id_is_used_twice():
    ids = np.array([[-1, 1, 1, 2], [3, 3, 4, 5]])
    labels = [0, 1, 0, 1, 2]  # sky, dog, sky, dog, grass
    infos = [{"id": i + 1, "label_id": label, "score": i / 10} for i, label in enumerate(labels)]
    panoptic, segments = fuse_stuff(ids, infos, [7, 8, 9], frozenset({7, 9}))
    assert panoptic.tolist() == [[0, 1, 1, 2], [1, 1, 3, 4]]
    assert [(segment["id"], segment["label_id"], segment["score"]) for segment in segments] == [
        (1, 7, 0.2),
        (2, 8, 0.1),
        (3, 8, 0.3),
        (4, 9, 0.4),
    ]


@pytest.mark.parametrize("name", ["mask2former", "maskformer"])
def test_instances_are_the_post_processing_with_things_only_and_the_best_first(name, load, monkeypatch):
    predictor = load(name)
    outputs = random_outputs(monkeypatch, predictor)
    own = predictor.image_processor.post_process_instance_segmentation(
        outputs, threshold=0.0, target_sizes=[SIZE], return_binary_maps=True
    )[0]
    expected = {
        (info["score"], info["label_id"], mask.numpy().astype(bool).tobytes())
        for info, mask in zip(own["segments_info"], own["segmentation"], strict=True)
        if IS_THING[info["label_id"]]
    }
    found = predictor([random_image()], [SIZE], frozenset({"instance"}))[0].instances
    assert len(found.scores) == len(expected) >= 3
    assert (np.diff(found.scores) <= 0).all()
    assert (
        set(zip(found.scores, found.labels, (mask.tobytes() for mask in found.masks), strict=True))
        == expected
    )
    assert found.masks.dtype == bool and found.masks.sum(0).max() > 1  # they overlap


@pytest.mark.parametrize("name", ["oneformer", "eomt"])
def test_instances_are_ranked_and_whole(name, load, monkeypatch):
    """Two instances that overlap, worked out by hand: score = class probability x mean mask probability."""
    predictor = load(name)
    masks = torch.full((1, 2, 16, 16), -30.0)
    masks[0, 0, :, :10], masks[0, 1, :, 6:] = 2.0, 1.0
    logits = torch.full((1, 2, 6), -30.0)
    logits[0, 0, 3], logits[0, 0, 5], logits[0, 1, 1] = 0.0, 0.0, 30.0  # half a car, surely a dog
    answer(monkeypatch, predictor, logits, masks)
    found = predictor([random_image(64, 64)], [(64, 64)], frozenset({"instance"}))[0].instances
    assert found.labels[:2].tolist() == [1, 3]
    sigmoid = torch.tensor([1.0, 2.0]).sigmoid()
    assert found.scores[:2] == pytest.approx([float(sigmoid[0]), float(sigmoid[1]) / 2], abs=0.02)
    assert found.masks[0][:, 30:].all() and not found.masks[0][:, :22].any()
    assert found.masks[1][:, :34].all() and not found.masks[1][:, 42:].any()


def test_oneformer_is_told_the_task_and_needs_no_list_of_names_from_the_hub(
    checkpoint, tmp_path, monkeypatch
):
    folder = shutil.copytree(checkpoint("oneformer"), tmp_path / "oneformer")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"class_info_file": "ade20k_panoptic.json", "repo_path": "nobody/nowhere"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    predictor = load_baseline(folder, CLASSES, IS_THING, "cpu")
    told = []
    forward = predictor.network.model.forward
    monkeypatch.setattr(
        predictor.network.model,
        "forward",
        lambda **inputs: told.append(inputs["task_inputs"].tolist()) or forward(**inputs),
    )
    predictor([random_image()], [SIZE], predictor.tasks)
    words = hf.AutoTokenizer.from_pretrained(folder)
    assert ["".join(words.decode(tokens).split("<|endoftext|>")[0].split()) for [tokens] in told] == [
        f"<|startoftext|>thetaskis{task}" for task in ("instance", "panoptic", "semantic")
    ]
    expected = own_outputs(predictor, random_image(), task_inputs=["semantic"])
    labels = predictor.image_processor.post_process_semantic_segmentation(expected, target_sizes=[SIZE])[
        0
    ].numpy()
    assert (semantic_of(predictor, random_image()) == labels).all()


@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        ("mask2former", {"semantic", "panoptic", "instance"}),
        ("detr", {"semantic", "panoptic"}),
        ("eomt", {"semantic", "panoptic", "instance"}),
        ("eomt_of_windows", {"semantic"}),
        ("segformer", {"semantic"}),
        ("clipseg", {"semantic"}),
    ],
)
def test_each_model_does_what_it_can(name, tasks, load):
    predictor = load(name)
    assert predictor.tasks == tasks
    assert predictor.seen is None
    assert load(name, is_thing=None).tasks == {"semantic"}
    if tasks == {"semantic"}:
        with pytest.raises(ValueError, match="cannot do panoptic segmentation"):
            predictor([random_image()], [SIZE], frozenset({"panoptic"}))


def naive_clipseg(predictor, folder: Path, classes) -> torch.Tensor:
    """Logits of each class at the decoder's size: every name a prompt of its own, with its own pass."""
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    processor = hf.CLIPSegProcessor(predictor.network.processor, tokenizer)
    logits = []
    for names in classes:
        answers = []
        for name in names:
            inputs = processor(text=[f"a photo of a {name}."], images=[random_image()], return_tensors="pt")
            with torch.no_grad():
                answers.append(predictor.network.model(**inputs).logits.reshape(64, 64))
        logits.append(torch.stack(answers).amax(0))
    return torch.stack(logits)


@pytest.mark.parametrize("prompts_at_once", [2, 32])
def test_clipseg_is_one_prompt_for_each_name(prompts_at_once, load, checkpoint, monkeypatch):
    monkeypatch.setattr(clipseg, "PROMPTS_AT_ONCE", prompts_at_once)
    monkeypatch.setattr(postprocessing, "SCORE_BYTES", 3 * 4 * SIZE[0] * SIZE[1])
    predictor = load("clipseg")
    logits = naive_clipseg(predictor, checkpoint("clipseg"), CLASSES)
    scores = interpolate(logits[None], size=SIZE, mode="bilinear", align_corners=False)[0]
    assert len(scores.argmax(0).unique()) >= 4
    sure = (scores.topk(2, dim=0).values.diff(dim=0)[0].abs() > 1e-5).numpy()
    assert sure.mean() > 0.9
    assert (semantic_of(predictor, random_image()) == scores.argmax(0).numpy())[sure].all()


def test_clipsegs_background_is_where_every_prompt_says_no(load, checkpoint):
    predictor = load("clipseg", [["dog"], ["background"], ["car"]])
    logits = naive_clipseg(predictor, checkpoint("clipseg"), [["dog"], ["car"]])
    scores = interpolate(logits[None], size=SIZE, mode="bilinear", align_corners=False)[0]
    expected = torch.where(scores.amax(0) < 0, 1, 2 * scores.argmax(0)).numpy()
    found = semantic_of(predictor, random_image())
    assert 0.02 < (expected == 1).mean() < 0.98
    assert (found == expected).mean() > 0.999


def test_clipseg_encodes_prompts_once_and_each_image_once(load, monkeypatch):
    predictor = load("clipseg")
    clip = predictor.network.model.clip
    seen = []
    encode = clip.get_image_features
    monkeypatch.setattr(
        clip, "get_image_features", lambda **inputs: seen.append(len(seen)) or encode(**inputs)
    )
    monkeypatch.setattr(clip, "get_text_features", None)  # not called again
    predictor([random_image(), random_image(seed=1)], [SIZE, SIZE], predictor.tasks)
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("name", "shape"), [("segformer", (96, 96)), ("oneformer", (96, 144)), ("clipseg", (96, 96))]
)
def test_size_is_the_shortest_side_fed_to_the_network(name, shape, load):
    predictor = load(name, size=96)
    prompt = {"task_inputs": ["semantic"]} if name == "oneformer" else {}
    assert predictor.network.inputs(random_image(), **prompt)["pixel_values"].shape[-2:] == shape
    assert semantic_of(predictor, random_image()).shape == SIZE


def test_a_size_that_the_model_cannot_take_is_one_line(load):
    with pytest.raises(ITAError, match="cannot take images of size 96"):
        load("eomt", size=96)


@pytest.mark.parametrize("name", ["segformer", "mask2former"])
def test_mixed_precision_is_close_to_full_precision(name, load):
    full, half = load(name), load(name, dtype=torch.bfloat16)
    assert (semantic_of(full, random_image()) == semantic_of(half, random_image())).mean() > 0.8
    assert next(half.network.model.parameters()).dtype == torch.float32


@pytest.fixture
def a_new_process():
    """accelerate's precision is set once for a process, and each test is a run of its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", ["segformer", "mask2former", "clipseg"])
def test_ita_eval_scores_other_models_as_it_scores_ita(name, tmp_path, a_new_process):
    """Its confusion matrix is that of the model's own maps, counted here pixel by pixel."""
    data, output = save_squares(tmp_path / "squares", count=2), tmp_path / "scores"
    model = save_tiny_baseline(name, tmp_path / "model", ["car", "sky", "zebra", "grass", "dog"])
    arguments = ["--model", model, "--benchmarks", data.name, "--data_dir", tmp_path, "--output", output]
    assert (
        run_eval.evaluate([*map(str, arguments), "--mixed_precision", "no", "--num_report_images", "0"]) == 0
    )
    results = json.loads((output / "results.json").read_text())["benchmarks"]["squares"]
    classes = [names.split(", ") for names in NAMES]
    predictor = load_baseline(model, classes, [False, True, False, True], "cpu")
    expected = np.zeros((4, 4), int)
    for row in datasets.load_dataset("parquet", data_files=str(data / "data" / "*.parquet"), split="train"):
        label = np.array(row["label"])
        counted = label != IGNORE
        found = semantic_of(predictor, row["image"].convert("RGB"), label.shape)
        np.add.at(expected, (label[counted], found[counted]), 1)
    union = expected.sum(0) + expected.sum(1) - np.diag(expected)
    assert results["miou"] == pytest.approx((np.diag(expected) / union).mean())
    assert results["num_images"] == 2
    assert ("pq" in results and "ap" in results) == (name == "mask2former")
    assert results["settings"]["notes"] == list(predictor.notes)


def test_ita_eval_refuses_labels_that_are_not_the_classes(tmp_path, a_new_process):
    data = save_squares(tmp_path / "squares", count=1)
    model = save_tiny_baseline("segformer", tmp_path / "model", ["car", "sky", "zebra", "grass", "lion"])
    arguments = [
        "--model",
        model,
        "--benchmarks",
        data.name,
        "--data_dir",
        tmp_path,
        "--output",
        tmp_path / "out",
    ]
    with pytest.raises(
        ITAError, match=r"has no label for 1 of the 4 classes: 'dog' \(--allow_missing_classes"
    ):
        run_eval.evaluate([*map(str, arguments)])
    assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match="'dog'; they are scored as never predicted"):
        assert run_eval.evaluate([*map(str, arguments), "--allow_missing_classes"]) == 0
