"""Mask-Adapter learns on a frozen segmenter: its losses, its choice of masks, what it leaves alone."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from helpers.parity_checkpoint import load_parity, original_tensors
from helpers.training_runs import failure, make_inputs, run
from ita_segmentation.conversion import convert_checkpoint
from ita_segmentation.training import read_history
from ita_segmentation.training.mask_adapter import (
    MAX_PAIRS,
    MAX_TRUE_MASKS,
    MaskAdapterTraining,
    choose_masks,
    match_predictions,
)

VOCABULARY = ["sky", "grass", "cat", "road"]


@pytest.fixture(scope="module")
def network():
    description, _ = load_parity("maskadapter_fcclip_tiny")
    return convert_checkpoint(
        original_tensors(description), description["clip_model_config"], vocabulary=VOCABULARY
    )


def batch(sizes=((64, 96), (64, 64))):
    """Images of four quarters of a color each, in the size of the largest."""
    torch.manual_seed(0)
    height, width = (max(side) for side in zip(*sizes, strict=True))
    pixel_mask = torch.zeros(len(sizes), height, width)
    pixel_values = torch.zeros(len(sizes), 3, height, width)
    mask_labels = []
    for image, (h, w) in enumerate(sizes):
        pixel_mask[image, :h, :w] = 1
        masks = torch.zeros(4, height, width)
        masks[0, : h // 2, : w // 2] = masks[1, : h // 2, w // 2 : w] = 1
        masks[2, h // 2 : h, : w // 2] = masks[3, h // 2 : h, w // 2 : w] = 1
        pixel_values[image] = torch.einsum("nc,nhw->chw", torch.randn(4, 3), masks)
        mask_labels.append(masks)
    class_labels = [torch.arange(4)] * len(sizes)
    return {
        "pixel_values": pixel_values,
        "pixel_mask": pixel_mask,
        "mask_labels": mask_labels,
        "class_labels": class_labels,
        "vocabulary": VOCABULARY,
    }


@pytest.mark.parametrize("mixed", [False, True])
def test_the_loss_falls_and_only_the_adapter_learns(network, mixed, monkeypatch):
    monkeypatch.setattr("ita_segmentation.training.mask_adapter.MIN_IOU", 0.1)  # random masks overlap little
    training = MaskAdapterTraining(copy.deepcopy(network), mixed).train()
    before = {name: tensor.clone() for name, tensor in training.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in training.parameters() if p.requires_grad], lr=6e-3)
    losses = []
    for _ in range(10):
        outputs = training(**batch())
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
        losses.append(outputs.loss.item())
    assert outputs.loss_dict.keys() == {"loss_ce", "loss_cosine"} if mixed else {"loss_ce"}
    assert losses[-1] < 0.85 * losses[0]
    changed = {
        name for name, tensor in training.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == {name for name in before if ".pooling.adapter." in name}


def test_a_pair_pays_for_the_distance_of_its_embeddings(network, monkeypatch):
    training = MaskAdapterTraining(copy.deepcopy(network), mixed=True).train()
    inputs = batch()
    monkeypatch.setattr(
        "ita_segmentation.training.mask_adapter.match_predictions",
        lambda logits, masks: torch.tensor([[3, 0], [5, 2]]),
    )
    outputs = training(**inputs)
    assert 0 < outputs.loss_dict["loss_cosine"].item() < 5 * 2 * 2 / MAX_PAIRS
    outputs.loss_dict["loss_cosine"].backward()
    assert training.pooling.adapter.maps.weight.grad.abs().sum() > 0


def test_images_without_a_mask_give_no_loss_but_a_gradient(network):
    for mixed in (False, True):
        training = MaskAdapterTraining(copy.deepcopy(network), mixed).train()
        inputs = batch()
        inputs["mask_labels"] = [torch.zeros(0, 64, 96), torch.zeros(2, 64, 96)]
        inputs["class_labels"] = [torch.zeros(0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)]
        outputs = training(**inputs)
        assert outputs.loss.item() == 0
        outputs.loss.backward()
        assert training.pooling.adapter.maps.weight.grad is not None


def test_masks_are_chosen_at_random_and_none_is_empty():
    masks = torch.ones(40, 4, 4)
    masks[::2] = 0
    chosen, labels = choose_masks(masks, torch.arange(40))
    assert len(chosen) == MAX_TRUE_MASKS
    assert chosen.flatten(1).all()
    assert len(set(labels.tolist())) == MAX_TRUE_MASKS
    assert all(label % 2 for label in labels.tolist())


def test_predictions_are_paired_with_what_they_overlap():
    masks = torch.zeros(3, 16, 16)
    masks[0, :8], masks[1, 8:], masks[2, :, :4] = 1, 1, 1
    logits = torch.full((5, 4, 4), -1.0)
    logits[1, :2] = logits[4, :2] = logits[2, 2:] = 1.0
    logits[3, 1:] = 1.0  # overlaps the second by two thirds
    pairs = {tuple(pair) for _ in range(20) for pair in match_predictions(logits, masks).tolist()}
    assert pairs == {(1, 0), (4, 0), (2, 1)}
    assert match_predictions(logits, masks[:0]).shape == (0, 2)
    many = torch.ones(30, 16, 16)
    assert len(match_predictions(torch.ones(1, 4, 4), many)) == MAX_PAIRS


def test_a_model_without_an_adapter_is_refused():
    description, _ = load_parity("fcclip_convnext_tiny")
    plain = convert_checkpoint(
        original_tensors(description), description["clip_model_config"], vocabulary=VOCABULARY
    )
    with pytest.raises(ValueError, match="mask_pooling"):
        MaskAdapterTraining(plain, mixed=False)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    """Arguments that train a tiny adapter on a tiny segmenter that is there already."""
    folder = tmp_path_factory.mktemp("segmenter")
    arguments = make_inputs(folder, eval_strategy="no", save_steps=100, max_steps=1)
    run(arguments, folder / "model")
    recipe = json.loads((folder / "recipe.json").read_text())
    adapter = {"mask_pooling": "adapter", "adapter_dim": 16, "adapter_num_maps": 2}
    recipe |= {
        "clip": None,
        "model": str(folder / "model"),
        "model_config": adapter,
        "max_steps": 4,
        "save_steps": 2,
    }
    (folder / "recipe.json").write_text(
        json.dumps({key: value for key, value in recipe.items() if value is not None})
    )
    return folder


@pytest.mark.parametrize("stage", ["ground_truth", "mixed"])
def test_a_run_trains_the_adapter_alone_and_resumes_exactly(segmenter, tmp_path, stage):
    arguments = ["--config", str(segmenter / "recipe.json"), "--train_adapter", stage]
    folder = run(arguments, tmp_path / "adapter")
    before, after = (load_file(path / "model.safetensors") for path in (segmenter / "model", folder))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name.rsplit(".", 2)[0] for name in set(after) - set(before)} >= {
        "mask_classifier.pooling.adapter"
    }
    history = [entry for entry in read_history(folder) if "loss" in entry]
    assert history[-1]["loss"] == pytest.approx(
        sum(history[-1].get(n, 0) for n in ("loss_ce", "loss_cosine")), rel=1e-4
    )
    assert json.loads((folder / "eval_results.json").read_text())["eval_miou"] >= 0
    resumed = run(
        [*arguments, "--resume_from_checkpoint", str(folder / "checkpoint-2")], tmp_path / "resumed"
    )
    again = load_file(resumed / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in after.items())


def test_what_does_not_go_with_it_is_refused(segmenter, tmp_path, capsys):
    arguments = [
        "--config",
        str(segmenter / "recipe.json"),
        "--output_dir",
        str(tmp_path / "x"),
        "--train_adapter",
        "mixed",
    ]
    assert "freezes all else" in failure(capsys, arguments, "--train_clip", "norms")[1]
    assert "mask_pooling" in failure(capsys, arguments, "--model_config.mask_pooling", "hard")[1]
    assert "would stay untrained" in failure(capsys, arguments, "--train_adapter", "none")[1]
