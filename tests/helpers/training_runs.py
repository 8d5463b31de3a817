"""Tiny training runs, in this process or in processes that can be killed, and what two equal runs have in common."""

import json
import multiprocessing
import os
import random
import resource
import socket
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from open_clip.model import CustomTextCLIP
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers import fsdp_cpu
from helpers.tiny_checkpoint import tiny_config
from ita_segmentation.cli.parser import run_command
from ita_segmentation.cli.train import parse_arguments, train
from ita_segmentation.training import ITATrainer, build_trainer, read_history

MODEL_CONFIG = {
    "hidden_dim": 64,
    "mask_dim": 32,
    "num_attention_heads": 2,
    "num_learned_queries": 6,
    "num_dominant_categories": 2,
    "encoder_layers": 1,
    "encoder_ffn_dim": 32,
    "decoder_layers": 2,
    "decoder_ffn_dim": 32,
    "train_num_points": 64,
    "templates": ["a photo of a {}."],
}
# An epoch has five steps; log entries, checkpoints and evaluations fall on different ones.
RECIPE: dict[str, Any] = {
    "image_size": 64,
    "model_config": MODEL_CONFIG,
    "max_steps": 12,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "max_grad_norm": 1.0,
    "warmup_steps": 2,
    "lr_scheduler_type": "poly",
    "ema_decay": 0.9,
    "logging_steps": 2,
    "save_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 7,
    "eval_images": 2,
    "sample_images": 0,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
TIMES = ("images_per_second", "eta_minutes", "minutes", "memory_gib", "runtime", "per_second")


def clip_config() -> dict[str, Any]:
    """The tiny CLIP's configuration in open_clip's form."""
    config = dict(tiny_config().clip_model_config or {})
    del config["custom_text"]
    return config


def make_clip(folder: Path, seed: int = 0) -> Path:
    """Write a tiny random CLIP."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    preprocessing = {"mean": [0.5] * 3, "std": [0.2] * 3}
    config = {"model_cfg": clip_config(), "preprocess_cfg": preprocessing}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    weights = CustomTextCLIP(**clip_config()).state_dict()
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


def make_data(folder: Path, names: tuple[str, str] = ("box", "wall"), ignored: bool = False) -> Path:
    """Write ten images with a square in front of a wall; with `ignored`, no pixel has a label."""
    generator = np.random.default_rng(0)
    images, labels = [], []
    for _ in range(10):
        label = np.ones((48, 56), np.uint8)
        top, left = generator.integers(0, 24, 2)
        label[top : top + 20, left : left + 20] = 0
        noise = generator.integers(0, 60, (48, 56, 3))
        images.append(Image.fromarray((np.where(label[..., None], 40, 180) + noise).astype(np.uint8)))
        labels.append(Image.fromarray(np.full_like(label, 255) if ignored else label))
    label_type = datasets.ClassLabel(names=list(names))
    features = {"image": datasets.Image(), "label": datasets.Image(), "classes": datasets.List(label_type)}
    columns = {"image": images, "label": labels, "classes": [[0, 1]] * len(images)}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    datasets.DatasetDict(train=table, validation=table.select(range(2))).save_to_disk(folder)
    return folder


def make_inputs(folder: Path, **changes: Any) -> list[str]:
    """Write a CLIP, data and a recipe; return the arguments that train with them, without an output folder."""
    recipe = RECIPE | {"clip": str(make_clip(folder / "clip")), "dataset": str(make_data(folder / "data"))}
    (folder / "recipe.json").write_text(json.dumps(recipe | changes))
    return ["--config", str(folder / "recipe.json")]


def build(arguments: list[str], output: Path, *more: str) -> ITATrainer:
    """Build the trainer of `ita train`."""
    return build_trainer(*parse_arguments([*arguments, "--output_dir", str(output), *more]))[0]


def run(arguments: list[str], output: Path, *more: str) -> Path:
    """Run `ita train` in this process."""
    assert train([*arguments, "--output_dir", str(output), *more]) == 0
    return output


def failure(capsys: Any, arguments: list[str], *more: str) -> tuple[int, str]:
    """Run `ita train` as the command line does; return the exit status and what it wrote to stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_command(train, [*arguments, *more])
    assert isinstance(stop.value.code, int)
    return stop.value.code, capsys.readouterr().err.strip()


# ------------------------------------------------------------------------------------------------------------
# Processes

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["helpers.training_runs", "ita_segmentation.training.setup", "matplotlib.figure"]
)


def run_process(arguments: list[str], environment: dict[str, str], log: str, file_bytes: int | None) -> None:
    """Run `ita train`, with its output in a file."""
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    if "ACCELERATE_USE_FSDP" in environment:
        fsdp_cpu.allow_fsdp_on_cpus()
    run_command(train, arguments)


def start(
    arguments: list[str],
    log: Path,
    num_processes: int = 1,
    file_bytes: int | None = None,
    more_environment: dict[str, str] | None = None,
) -> list[Any]:
    """Start a run of one or more processes, which can be forbidden to write files beyond a size."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    processes = []
    for rank in range(num_processes):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment = common | (more_environment or {}) | (ranks | place if num_processes > 1 else {})
        process = FORKS.Process(target=run_process, args=(arguments, environment, str(log), file_bytes))
        process.start()
        processes.append(process)
    return processes


def finish(processes: list[Any], seconds: float = 900.0) -> list[int]:
    """Wait for processes that end by themselves; return their exit statuses."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0.1))
    alive = [process for process in processes if process.is_alive()]
    kill(alive)
    assert not alive, f"{len(alive)} processes were still running after {seconds:.0f} s"
    return [process.exitcode for process in processes]


def kill(processes: list[Any]) -> None:
    """kill -9."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def is_running(processes: list[Any]) -> bool:
    """Tell whether all of a run's processes are alive."""
    return all(process.is_alive() for process in processes)


def wait_for(processes: list[Any], output: Path, pattern: str, seconds: float = 300.0) -> bool:
    """Wait until a name appears in the output folder; False if the run ends before."""
    deadline = time.monotonic() + seconds
    while is_running(processes) and time.monotonic() < deadline:
        if output.is_dir() and any(output.glob(pattern)):
            return True
        time.sleep(0.0005)
    return False


def kill_until_finished(
    arguments: list[str], output: Path, num_kills: int, num_processes: int, seconds: float, seed: int
) -> int:
    """Start a run again and again, and kill it, until it has been killed often enough; then let it finish.

    Every second kill comes while a checkpoint is being written, the others at random moments of `seconds`. Runs that
    finish before all kills are done are moved to `OUTPUT-0`, `OUTPUT-1`, ..., and begun anew.

    Returns:
        How many runs were finished.
    """
    moments = random.Random(seed)
    num_finished, done = 0, 0
    resumed = [*arguments, "--output_dir", str(output), "--resume_from_checkpoint", "auto"]
    while True:
        processes = start(resumed, output.with_suffix(".log"), num_processes)
        killed = done < num_kills
        if killed and done % 2 == 0:
            killed = wait_for(processes, output, ".checkpoint-*.tmp")
            time.sleep(moments.uniform(0, 0.03))
        elif killed:
            time.sleep(moments.uniform(0, seconds))
        if killed and is_running(processes):
            kill(processes)
            done += 1
            continue
        assert finish(processes) == [0] * num_processes, output.with_suffix(".log").read_text()[-2000:]
        output.rename(output.with_name(f"{output.name}-{num_finished}"))
        num_finished += 1
        if done >= num_kills:
            return num_finished


# ------------------------------------------------------------------------------------------------------------
# What equal runs have in common


def logged(output: Path) -> list[dict[str, Any]]:
    """Everything that a run has logged, but times and memory."""
    return [
        {name: value for name, value in entry.items() if not name.endswith(TIMES)}
        for entry in read_history(output)
        if "train_runtime" not in entry
    ]


def losses_of(output: Path) -> list[float]:
    """The losses that a run has logged."""
    return [entry["loss"] for entry in read_history(output) if "loss" in entry]


def assert_same_run(output: Path, reference: Path) -> None:
    """Bitwise: everything that was logged, and the final weights."""
    assert logged(output) == logged(reference)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (output, reference))
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name
