"""A COCO release in miniature -> run_prepare.py -> accelerate launch run_train.py: the loss falls, on one process and
on two, and a run that was broken off goes on with the images that come next."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import training_runs
from helpers.miniature_releases import save_segment_ids
from ita_segmentation.cli import prepare as run_prepare

ROOT = Path(__file__).parents[2]
STEPS = 16


def build_release(folder: Path) -> None:
    """Eight images in COCO's layout: a red person (1) or a blue car (3), some with a crowd, before a grey sky
    (187); the last one has no segment at all."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    (folder / "train2017").mkdir(parents=True)
    for number in range(1, 9):
        pixels = rng.integers(100, 140, (48, 64, 3), np.uint8)
        ids = np.full((48, 64), 9_000_000)
        top, left = rng.integers(4, 20, 2)
        box = (slice(top, top + 20), slice(left, left + 24))
        category = (1, 3)[number % 2]
        pixels[box] = (220, 30, 30) if category == 1 else (30, 30, 220)
        ids[box] = 300
        rows = [(9_000_000, 187, 0), (300, category, 0)]
        if number % 3 == 0:
            ids[:3] = 70_000
            rows.append((70_000, 1, 1))
        if number == 8:
            ids[:], rows = 0, []
        name = f"{number:012}"
        Image.fromarray(pixels).save(folder / "train2017" / f"{name}.jpg", quality=95)
        save_segment_ids(folder / "annotations/panoptic_train2017" / f"{name}.png", ids)
        images.append({"id": number, "file_name": f"{name}.jpg", "width": 64, "height": 48})
        segments = [{"id": i, "category_id": c, "iscrowd": crowd, "area": 1} for i, c, crowd in rows]
        annotations.append({"image_id": number, "file_name": f"{name}.png", "segments_info": segments})
    content = {"images": images, "annotations": annotations, "categories": []}
    (folder / "annotations/panoptic_train2017.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds `data`, prepared from the release by the command line, a tiny CLIP in `clip`, and `recipe.yaml`."""
    folder = tmp_path_factory.mktemp("miniature")
    build_release(folder / "release")
    words = ["coco-panoptic", "--source", str(folder / "release"), "--output", str(folder / "data")]
    assert run_prepare.prepare_benchmark([*words, "--split", "train"]) == 0
    changes = {
        "dataset": str(folder / "data"),
        "clip": str(training_runs.make_clip(folder / "clip")),
        "min_scale": 0.8,
        "max_scale": 1.2,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "warmup_steps": 1,
        "ema_decay": 0.0,
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
    }
    (folder / "recipe.json").write_text(json.dumps(training_runs.RECIPE | changes))
    return folder


def launch_two_processes(arguments: list[str], output: Path, cache: Path) -> None:
    """Train on two processes, as a user without a GPU would."""
    config = ROOT / "recipes" / "accelerate" / "ddp_2cpu.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    launch += ["--num_cpu_threads_per_process", "1", "--main_process_port", "0"]
    subprocess.run(
        [*launch, str(ROOT / "run_train.py"), *arguments, "--output_dir", str(output)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache), "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_a_coco_release_trains_and_the_loss_falls(folder, processes):
    """One process reads memory-mapped rows; two stream them, with a worker each."""
    arguments, output = (
        ["--config", str(folder / "recipe.json"), "--max_steps", str(STEPS)],
        folder / f"out{processes}",
    )
    if processes == 1:
        training_runs.run(arguments, output)
    else:
        arguments += ["--streaming", "true", "--dataloader_num_workers", "1"]
        launch_two_processes(arguments, output, folder / "cache")
    losses = training_runs.losses_of(output)
    assert len(losses) == STEPS
    assert np.mean(losses[-4:]) < 0.85 * np.mean(losses[:4])
    assert (output / "model.safetensors").is_file()
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["epoch"] == 4 * processes  # 16 steps of 2 images for each process, out of 8


def test_a_run_broken_off_in_the_middle_of_its_second_epoch_sees_what_it_would_have_seen(folder):
    """Four steps are an epoch; the resumed run has a worker, the unbroken one has none."""
    arguments = ["--config", str(folder / "recipe.json"), "--max_steps", "10"]
    more = ["--save_strategy", "steps", "--save_steps", "6"]
    whole = training_runs.run(arguments, folder / "whole", *more)
    more = ["--resume_from_checkpoint", str(whole / "checkpoint-6"), "--dataloader_num_workers", "1"]
    resumed = training_runs.run(arguments, folder / "resumed", *more)
    losses = training_runs.losses_of(whole)
    assert len(losses) == 10 and training_runs.losses_of(resumed) == losses
