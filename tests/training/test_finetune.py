"""Fine-tuning on a few classes: what the checkpoint knew is learned beside the labels, through the public commands."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from finetune import NEW_THINGS, draw_images, extended_scenes, write_folder
from PIL import Image
from safetensors.torch import load_file

from helpers import training_runs
from helpers.tiny_checkpoint import save_tiny_checkpoint
from ita_segmentation.cli import prepare as run_prepare
from ita_segmentation.data.scenes import scene, scenes_vocabulary
from ita_segmentation.errors import UsageError
from ita_segmentation.training import PseudoLabeler, name_tuning
from ita_segmentation.training.name_tuning import (
    images_to_use,
    own_tokens,
    region_embeddings,
    tune_tokens,
)
from ita_segmentation.training.pseudo_labels import kept_classes
from modeling_ita import ITAForOpenVocabSegmentation, ITAImageProcessor
from modeling_ita.text import normalize_vocabulary

NEW = ["kite", ["automobile", "coach"]]  # "automobile" is a name of the checkpoint's class "car"
KEPT = [["sky"], ["dog", "puppy"], ["grass"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny checkpoint in `model`, and `data`: six images with a red square, label 0, and nothing else labelled."""
    folder = tmp_path_factory.mktemp("finetune")
    save_tiny_checkpoint(folder / "model", hidden_dim=64)
    for part in ("images", "labels"):
        (folder / "release" / part).mkdir(parents=True)
    (folder / "release/classes.json").write_text(json.dumps(NEW))
    for number in range(6):
        pixels, labels = np.full((64, 64, 3), 90, np.uint8), np.full((64, 64), 255, np.uint8)
        box = (slice(4 * number, 4 * number + 30), slice(10, 40))
        pixels[box], labels[box] = (220, 30, 30), 0
        Image.fromarray(pixels).save(folder / f"release/images/{number}.png")
        Image.fromarray(labels).save(folder / f"release/labels/{number}.png")
    words = ["folder", "--source", str(folder / "release"), "--output", str(folder / "data")]
    assert run_prepare.prepare_benchmark(words) == 0
    return folder


@pytest.fixture(scope="module")
def arguments(folder) -> list[str]:
    """Arguments of a run of six steps on the data, from the checkpoint."""
    options = {
        "model": folder / "model",
        "dataset": folder / "data",
        "min_scale": 0.9,
        "image_size": 64,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": "true",
        "use_cpu": "true",
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def load(path: Path) -> ITAForOpenVocabSegmentation:
    return ITAForOpenVocabSegmentation.from_pretrained(path).eval()


# ------------------------------------------------------------------------------------------------------------
# What is learned


@pytest.fixture(scope="module")
def kept(folder) -> PseudoLabeler:
    processor = ITAImageProcessor.from_pretrained(folder / "model")
    return PseudoLabeler(load(folder / "model"), processor, NEW, first_label=2, threshold=0.5)


def test_all_classes_that_share_no_word_with_the_new_ones_are_kept(folder, kept):
    model = load(folder / "model")
    assert kept.classes == KEPT == kept_classes(model, ["kite", "Car"])
    with pytest.raises(UsageError, match="no classes but those"):
        kept_classes(model, ["sky", "puppy", "grass", "car"])


def test_segments_are_learned_where_labels_leave_at_least_half_of_them(kept):
    masks = torch.zeros(1, 4, 8, dtype=torch.bool)
    masks[0, :, :3] = True  # the label covers three columns of a padded image of 4 x 6
    segmentation = torch.tensor([[1, 1, 1, 2, 2, 0]] * 2 + [[3, 3, 3, 3, 3, 0], [4, 4, 4, 4, 4, 4]])
    segments = [{"id": number, "label_id": number % 3} for number in (1, 2, 3, 4)]
    completed, labels = kept.add_segments(masks, torch.tensor([1]), segmentation, segments)
    # Segment 1 is under the label, and of 3 only 2 of 5 cells are not; of 4 half is left.
    assert labels.tolist() == [1, 2 + 2, 2 + 1]
    assert torch.equal(completed[0], masks[0])
    assert completed[1].nonzero().tolist() == [[0, 3], [0, 4], [1, 3], [1, 4]]
    assert completed[2].nonzero().tolist() == [[3, 3], [3, 4], [3, 5]]


def test_the_checkpoint_labels_as_it_was_however_the_model_has_learned(folder):
    model = load(folder / "model")
    model.void_embedding.data.neg_()  # random weights call everything void: turn it round
    kept = PseudoLabeler(model, ITAImageProcessor.from_pretrained(folder / "model"), NEW, 2, 1e-6)
    batch = {
        "pixel_values": torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
        "mask_labels": [torch.zeros(0, 64, 64, dtype=torch.bool)] * 2,
        "class_labels": [torch.zeros(0, dtype=torch.int64)] * 2,
    }
    before = kept.add_pseudo_labels(batch)
    assert kept.model.clip_backbone is model.clip_backbone  # a frozen CLIP is not held twice
    assert sum(map(len, before["class_labels"])) > 0
    assert all(2 <= label < 5 for labels in before["class_labels"] for label in labels.tolist())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    after = kept.add_pseudo_labels(batch)
    for name in ("mask_labels", "class_labels"):
        assert all(torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True))


# ------------------------------------------------------------------------------------------------------------
# Words


def test_tokens_that_a_kept_name_or_a_template_has_are_not_a_new_name_s_own(folder):
    model = load(folder / "model")
    encode = model.clip_backbone.tokenizer.encode
    assert own_tokens(model, ["sky kite", "photo kite"], ["sky"]) == encode("kite")
    assert own_tokens(model, ["sky", "photo"], ["sky"]) == []


def test_new_names_come_to_where_their_images_are_and_no_other_name_moves(folder, kept):
    model = load(folder / "model")
    new = normalize_vocabulary(NEW)
    before = model.encode_vocabulary(KEPT).prompt_embeds.clone()
    generator = torch.Generator().manual_seed(1)
    places = torch.nn.functional.normalize(torch.randn(2, 32, generator=generator), dim=-1)
    regions = torch.cat(
        [places.repeat_interleave(5, 0), before]
    )  # five of each new class, and each old name's own
    classes = torch.tensor([0] * 5 + [1] * 5 + [2, 3, 3, 4])
    losses = tune_tokens(model, new, kept.classes, regions, classes)
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(model.encode_vocabulary(KEPT).prompt_embeds, before)
    names = torch.cat(
        [model.encode_vocabulary(NEW).prompt_embeds, before]
    )  # kite, automobile, coach, sky, dog, puppy, grass
    nearest = (regions @ names.T).argmax(1)
    assert torch.tensor([0, 1, 1, 2, 3, 3, 4])[nearest].tolist() == classes.tolist()


def test_regions_are_pooled_as_at_inference(folder):
    """A mask over everything is the image's own embedding, and a mask of one pixel has no cell."""
    model = load(folder / "model")
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    masks = torch.ones(2, 64, 64, dtype=torch.bool)
    masks[1] = False
    masks[1, 0, 0] = True
    batch = {"pixel_values": pixels, "mask_labels": [masks], "class_labels": [torch.tensor([4, 3])]}
    regions, classes = region_embeddings(model, batch)
    with torch.no_grad():
        visual = model.clip_backbone.clip.visual
        whole = visual.head(
            visual.trunk.forward_head(visual.trunk.forward_features(pixels).mean((2, 3), keepdim=True))
        )
    assert classes.tolist() == [4]
    torch.testing.assert_close(regions, torch.nn.functional.normalize(whole.reshape(1, -1), dim=-1))


def test_small_data_sets_are_looked_at_again_and_large_ones_evenly():
    assert images_to_use(7) == list(range(100))
    assert images_to_use(1000) == list(range(0, 1000, 10))


# ------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def kept_run(folder, arguments) -> Path:
    """A run that keeps the checkpoint's vocabulary, with a checkpoint in the middle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(name_tuning, "NUM_IMAGES", 8)
        more = ["--keep_vocabulary", "0.01", "--learn_words", "true", "--save_strategy", "steps"]
        return training_runs.run(arguments, folder / "kept", *more, "--save_steps", "3")


def test_a_run_keeps_the_vocabulary_adds_to_it_and_changes_clip_only_in_new_tokens(folder, kept_run):
    before, after = load(folder / "model"), load(kept_run)
    new = [["kite"], ["automobile", "coach"]]
    assert after.config.vocabulary == [*KEPT, *new]
    assert after.config.train_vocabulary == [*before.config.train_vocabulary, *new]
    old, trained = (load_file(path / "model.safetensors") for path in (folder / "model", kept_run))
    same = {name for name in old if torch.equal(old[name], trained[name])}
    clip = {name for name in old if name.startswith("clip_backbone.")}
    table = next(name for name in clip if name.endswith("token_embedding.weight"))
    assert clip - same == {table} and len(old) - len(same) > 50
    assert 0 < (old[table] != trained[table]).any(1).sum() <= 3  # kite, automobile, coach


def test_without_it_only_the_data_s_classes_are_left(folder, arguments, tmp_path):
    output = training_runs.run(arguments, tmp_path / "alone", "--max_steps", "1")
    assert load(output).config.vocabulary == [["kite"], ["automobile", "coach"]]


def test_a_resumed_run_keeps_what_the_checkpoint_knew_at_the_start(kept_run, arguments, tmp_path):
    more = ["--keep_vocabulary", "0.01", "--tune_class_names", "true"]
    more += ["--resume_from_checkpoint", str(kept_run / "checkpoint-3")]
    resumed = training_runs.run(arguments, tmp_path / "resumed", *more)
    losses = training_runs.losses_of(kept_run)
    assert len(losses) == 6 and training_runs.losses_of(resumed) == losses


TUNED = ["--keep_vocabulary", "0.5", "--tune_class_names", "true"]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--keep_vocabulary", "1.5"], "must be at least 0 and below 1"),
        (["--tune_class_names", "true"], "tune_class_names needs keep_vocabulary"),
        (["--keep_vocabulary", "0.5", "--dataset", "own"], "no classes but those of the dataset"),
        (["--keep_vocabulary", "0.5", "--clip", "somewhere"], "give one of --clip CLIP"),
        ([*TUNED, "--model_config.mask_pooling", "adapter"], "not for a mask adapter"),
        ([*TUNED, "--model_config.text_transfer", "post_norm"], "not for a mask adapter or a text transfer"),
    ],
)
def test_what_cannot_be_kept_is_refused_in_one_line(arguments, tmp_path, capsys, more, reason):
    if "own" in more:
        for part in ("images", "labels"):
            (tmp_path / "release" / part).mkdir(parents=True)
        (tmp_path / "release/classes.json").write_text(json.dumps(["sky", "dog", "grass", "car"]))
        Image.new("RGB", (64, 64)).save(tmp_path / "release/images/0.png")
        Image.new("L", (64, 64)).save(tmp_path / "release/labels/0.png")
        words = ["folder", "--source", str(tmp_path / "release"), "--output", str(tmp_path / "own")]
        assert run_prepare.prepare_benchmark(words) == 0
        more = [str(tmp_path / word) if word == "own" else word for word in more]
    status, text = training_runs.failure(capsys, arguments, "--output_dir", str(tmp_path / "refused"), *more)
    assert status == 2 and reason in text.splitlines()[-1] and "Traceback" not in text
    assert not (tmp_path / "refused").exists()


def test_a_new_model_has_nothing_to_keep(arguments, tmp_path, capsys):
    words = [*arguments[2:], "--keep_vocabulary", "0.5", "--clip", "somewhere"]
    status, text = training_runs.failure(capsys, words, "--output_dir", str(tmp_path / "refused"))
    assert status == 2 and "--keep_vocabulary is for --model" in text


# ------------------------------------------------------------------------------------------------------------
# The images of the documentation's figures


def test_images_with_new_things_label_these_alone(tmp_path):
    new = [[name] for name in NEW_THINGS]
    write_folder(tmp_path, "train", 4, new, size=96)
    found = set()
    for file in sorted((tmp_path / "labels/train").iterdir()):
        labels = np.asarray(Image.open(file))
        found |= set(labels.flat)
        assert (labels < 5).any() and (labels == 255).mean() > 0.5
    assert found <= {0, 1, 2, 3, 4, 255} and len(found) > 2
    assert len(list((tmp_path / "images/train").iterdir())) == 4


def test_scenes_are_extended_only_within_the_context():
    before = scene(3, 0, 64, "all")
    own = list(scenes_vocabulary().names)
    names = {name for names in scenes_vocabulary().classes for name in names}
    assert names.isdisjoint(NEW_THINGS)
    with extended_scenes():
        assert len(scenes_vocabulary().names) == len(own) + 5
    assert next(draw_images("train", 1, 64))[1].max() > 154
    assert scenes_vocabulary().names == own
    assert np.array_equal(scene(3, 0, 64, "all").image, before.image)
