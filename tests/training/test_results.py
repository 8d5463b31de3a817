"""What a run shows of itself: `results.png`, sample predictions, TensorBoard, and the log that they are read from."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ita_segmentation.data.training import TrainingClasses
from ita_segmentation.errors import ITAError
from ita_segmentation.training import draw_results, read_history
from ita_segmentation.training.results import draw_samples, take_sample
from modeling_ita import ITAImageProcessor

CLASSES = TrainingClasses([["sky $x"], ["dog"]], [True, True], [])


def test_a_run_draws_its_results_and_the_predictions_of_each_evaluation(finished):
    with Image.open(finished / "results.png") as image:
        assert image.format == "PNG" and image.width > 1000 and len(image.convert("L").getcolors()) > 20
    assert sorted(file.name for file in (finished / "samples").iterdir()) == ["step-3.jpg", "step-6.jpg"]
    events = b"".join(file.read_bytes() for file in finished.glob("runs/*/events*"))
    assert b"samples" in events and b"train/loss_dice_sum" in events and b"eval/miou" in events
    assert not list(finished.glob(".*"))  # neither a lock nor a temporary file


def test_the_results_of_a_killed_run_are_drawn_from_its_last_checkpoint(finished, tmp_path):
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = (finished / f"checkpoint-{step}" / "trainer_state.json").read_text()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert max(entry["step"] for entry in read_history(tmp_path)) == 4
    assert draw_results(tmp_path) == tmp_path / "results.png"
    assert Image.open(tmp_path / "results.png").size == Image.open(finished / "results.png").size


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"log_history": [{"loss": 1.0}]}', '{"log_history": 5}', "\x00"],
)
def test_a_damaged_log_is_one_line(tmp_path, content):
    (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(ITAError, match="is damaged") as caught:
        draw_results(tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "results.png").exists()


def test_a_folder_without_a_log_is_named(tmp_path):
    with pytest.raises(ITAError, match="has no training log"):
        read_history(tmp_path)


def test_non_finite_and_missing_values_leave_gaps(tmp_path):
    history = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": float("inf")}]
    state = {"log_history": history, "global_step": 3}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert draw_results(tmp_path).stat().st_size > 1000


def test_a_sample_shows_the_image_without_padding():
    processor = ITAImageProcessor()
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 320, 160), np.uint8))
    batch = {
        "inputs": dict(processor(images=[pixels, pixels[:, :, :100]], do_resize=False, return_tensors="pt"))
    }
    batch |= {"labels": [None, np.zeros((320, 100), np.int64)], "image_names": ["zero", "one"]}
    sample = take_sample(batch, 1, torch.ones(320, 100, dtype=torch.int64), processor, CLASSES)
    assert (sample.image_id, sample.score) == ("one", 0.0)
    assert np.array_equal(np.asarray(sample.image), pixels[:, :, :100].permute(1, 2, 0).numpy())
    assert [label for _, label, _ in sample.legend] == ["sky $x: missed", "dog: not in the labels"]


def test_a_drawing_leaves_ignored_pixels_unpainted_and_survives_odd_names():
    truth = np.full((64, 64), 255)
    truth[:32] = 0
    inputs = {"pixel_values": torch.zeros(1, 3, 64, 64), "pixel_mask": torch.ones(1, 64, 64)}
    batch = {"inputs": inputs, "labels": [truth], "image_names": ["a $\\frac image\n$"]}
    prediction = torch.ones(64, 64, dtype=torch.int64)
    sample = take_sample(batch, 0, prediction, ITAImageProcessor(), CLASSES)
    is_painted = np.ptp(np.asarray(sample.reference).astype(int), axis=-1) > 20
    assert is_painted[:32].all() and not is_painted[32:].any()
    drawn = draw_samples([sample, sample])
    assert drawn.height == 2 * draw_samples([sample]).height
