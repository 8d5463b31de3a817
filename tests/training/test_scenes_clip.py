"""The small CLIP of Scenes: its two trainings learn, keep the split, and write what open_clip loads."""

import json
import math

import pytest
import torch
from open_clip.model import CustomTextCLIP
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file

from helpers.tiny_checkpoint import tiny_clip
from ita_segmentation.cli import train_clip as run_train_clip
from ita_segmentation.data.scenes import scenes_vocabulary
from ita_segmentation.errors import ITAError
from ita_segmentation.training.scenes_clip import ScenesClipRecipe, ScenesClipTrainer, load_clip
from ita_segmentation.training.scenes_clip.images import ImageSource, Regions
from ita_segmentation.training.scenes_clip.text import (
    CaptionSampler,
    caption_of,
    concept_vectors,
    encode_names,
    train_text_tower,
)
from ita_segmentation.training.scenes_clip.trainer import (
    CONFIG_NAME,
    RESULTS_NAME,
    TEXT_NAME,
    WEIGHTS_NAME,
    build_clip,
    caption_set_loss,
    dense_embeddings,
    pool_regions,
)
from modeling_ita.configuration_ita import VILD_TEMPLATES

CLIP = tiny_clip(width=32, context_length=24, image_size=32)


TINY = {
    "clip": CLIP,
    "minutes": 5.0,
    "max_steps": 4,
    "text_steps": 2,
    "text_batch_size": 4,
    "pixels_per_batch": 4 * 32 * 32,
    "single_sizes": [32],
    "captioned_sizes": [32],
    "region_sizes": [32],
    "calibration_batches": 2,
    "evaluation_size": 32,
    "evaluation_images": 10,
    "num_threads": 1,
}


@pytest.fixture(scope="module")
def trainer():
    torch.set_num_threads(1)
    trainer = ScenesClipTrainer(ScenesClipRecipe(**TINY))
    trainer.clip.text.requires_grad_(False).eval()
    trainer.bank = concept_vectors(
        len(trainer.vocabulary.classes), 32, steps=20
    )  # in place of a trained tower
    return trainer


def test_concept_vectors_are_unit_and_further_apart_than_chance():
    start, end = concept_vectors(60, 32, steps=0), concept_vectors(60, 32, steps=60)
    off_diagonal = ~torch.eye(60, dtype=torch.bool)
    assert torch.allclose(end.norm(dim=-1), torch.ones(60), atol=1e-5)
    assert (end @ end.T)[off_diagonal].abs().max() < (start @ start.T)[off_diagonal].abs().max()


def test_a_caption_names_things_then_stuff():
    assert caption_of(["cat", "dog", "cup"], ["grass"]) == "a cat, a dog and a cup on grass"
    assert caption_of(["cat"], []) == "a cat"
    assert caption_of([], ["sand", "water"]) == "sand, water"


def test_the_text_tower_learns_that_synonyms_are_one():
    torch.manual_seed(0)
    clip = build_clip(CLIP)
    tokenize = SimpleTokenizer(context_length=24)
    classes = [["cat", "kitten"], ["sofa", "couch"], ["grass", "lawn"]]
    sampler = CaptionSampler(classes, [True, True, False], VILD_TEMPLATES[:2])
    losses = train_text_tower(clip.text, tokenize, sampler, steps=40, batch_size=24, learning_rate=5e-3)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    bank = encode_names(clip.encode_text, tokenize, classes, VILD_TEMPLATES[:2])
    with torch.no_grad():
        synonyms = clip.encode_text(tokenize(["kitten", "couch", "lawn"]), normalize=True)
    assert (synonyms @ bank.T).argmax(-1).tolist() == [0, 1, 2]


def test_region_batches_hold_no_unseen_class():
    seen = scenes_vocabulary().seen
    source = ImageSource(seed=3)
    for _ in range(4):
        assert all(seen[c] for c in source.regions(4, 64).class_ids.tolist())


def test_captioned_batches_show_unseen_classes_too():
    seen = scenes_vocabulary().seen
    named = ImageSource(seed=3).captioned(24, 64).named
    assert any(not seen[c] for ids in named for c in ids)


def test_a_mask_of_an_unseen_class_is_refused(trainer):
    unseen = scenes_vocabulary().seen.index(False)
    batch = Regions(torch.zeros(1, 3, 32, 32), torch.ones(1, 4, 4), torch.tensor([0]), torch.tensor([unseen]))
    with pytest.raises(ValueError, match="unseen"):
        trainer.region_loss(batch)


def test_region_weights_are_shares_of_cells():
    regions = ImageSource(seed=5).regions(2, 64)
    assert regions.weights.shape[1:] == (8, 8)
    per_image = torch.stack([regions.weights[regions.images == b].sum(0) for b in range(2)])
    assert regions.weights.min() >= 0 and per_image.max() <= 1 + 1e-6


def test_pooling_all_cells_equals_the_image_embedding(trainer):
    trainer.clip.eval()
    pixels = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        cells = dense_embeddings(trainer.clip, pixels)
        assert torch.allclose(cells.mean((2, 3)), trainer.clip.encode_image(pixels), atol=1e-5)
        fine = torch.zeros(1, 8, 12)
        fine[:, :4, :4] = 1
        corner = pool_regions(cells, fine, torch.tensor([1]))
    assert (corner[0] - cells[1, :, 0, 0]).norm() < (corner[0] - cells[1, :, 1, 2]).norm()


def test_the_caption_set_loss_asks_for_every_named_class_and_no_other():
    named = torch.tensor([[True, True, False]])
    right = torch.tensor([[[9.0, 0, 0], [0, 9.0, 0]]]).log_softmax(-1)
    one_missing = torch.tensor([[[9.0, 0, 0], [9.0, 0, 0]]]).log_softmax(-1)
    stranger = torch.tensor([[[9.0, 0, 0], [0, 0, 9.0]]]).log_softmax(-1)
    assert caption_set_loss(right, named) < 0.01
    assert caption_set_loss(one_missing, named) > 1
    assert caption_set_loss(stranger, named) > 1


def test_the_image_tower_learns(trainer):
    source = ImageSource(seed=0)
    batch = source.captioned(6, 32)
    optimizer = torch.optim.AdamW(trainer.clip.visual.parameters(), lr=2e-3)
    trainer.clip.visual.train()
    losses = []
    for _ in range(12):
        loss = trainer.captioned_loss(batch, dense=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_one_command_writes_files_that_open_clip_loads_strictly(tmp_path, capsys):
    recipe, output = tmp_path / "recipe.json", tmp_path / "out"
    recipe.write_text(json.dumps(TINY))
    command = ["--config", str(recipe), "--output", str(output), "--seed", "1"]
    assert run_train_clip.train_clip(command) == 0
    clip = CustomTextCLIP(**json.loads((output / CONFIG_NAME).read_text()))
    clip.load_state_dict(load_file(output / WEIGHTS_NAME), strict=True)
    results = json.loads((output / RESULTS_NAME).read_text())
    assert {"single_thing_seen", "single_thing_unseen", "region_thing", "region_stuff"} <= set(results)
    assert results["steps"] == 4
    assert results["recipe"]["seed"] == 1
    assert math.isfinite(results["vision_minutes"])
    assert {path.name for path in output.iterdir()} == {CONFIG_NAME, RESULTS_NAME, TEXT_NAME, WEIGHTS_NAME}
    loaded = load_clip(output)
    assert not loaded.training
    assert torch.isfinite(loaded.visual(torch.randn(1, 3, 64, 64))).all()


def test_a_text_tower_is_reused_only_for_the_same_settings(tmp_path):
    def losses(**changes):
        return ScenesClipTrainer(ScenesClipRecipe(**TINY | changes)).train_text(tmp_path)

    assert len(losses()) == 2
    assert losses() == []
    assert len(losses(text_steps=3)) == 3
    (tmp_path / TEXT_NAME).write_bytes(b"damaged")
    assert len(losses(text_steps=3)) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown argument 'learning_rat'"),
        ("minutes: 0", "must be positive"),
        ("minutes: .nan", "must be positive"),
        ("region_sizes: [100]", "multiples of 32"),
        ("[1, 2]", "must be a mapping"),
        ("clip: {embed_dim: 8}", "lacks vision_cfg"),
    ],
)
def test_a_bad_recipe_ends_with_one_clear_line(tmp_path, text, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(ITAError, match=message) as caught:
        run_train_clip.train_clip(["--config", str(recipe), "--output", str(tmp_path / "out")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
