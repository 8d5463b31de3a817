"""Training runs as processes of their own, to be watched and killed; and what two runs must have in common."""

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
import torch
from open_clip.model import CustomTextCLIP
from PIL import Image
from safetensors.torch import load_file, save_file

from ita_segmentation.training.history import read_history

CLIP_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {
        "timm_model_name": "resnet10t",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": 64,
    },
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
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
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
TIMES = ("images_per_second", "eta_minutes", "minutes", "memory_gib", "runtime", "per_second")


def make_clip(folder: Path) -> Path:
    """A tiny random CLIP."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP_CONFIG}))
    weights = CustomTextCLIP(**CLIP_CONFIG).state_dict()
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        folder / "open_clip_model.safetensors",
    )
    return folder


def make_data(folder: Path, num_images: int = 10) -> Path:
    """Images with a square in front of a wall."""
    generator = np.random.default_rng(0)
    images, labels = [], []
    for _ in range(num_images):
        label = np.ones((48, 56), np.uint8)
        top, left = generator.integers(0, 24, 2)
        label[top : top + 20, left : left + 20] = 0
        noise = generator.integers(0, 60, (48, 56, 3))
        images.append(Image.fromarray((np.where(label[..., None], 40, 180) + noise).astype(np.uint8)))
        labels.append(Image.fromarray(label))
    names = datasets.ClassLabel(names=["box", "wall"])
    features = {"image": datasets.Image(), "label": datasets.Image(), "classes": datasets.List(names)}
    columns = {"image": images, "label": labels, "classes": [[0, 1]] * num_images}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    datasets.DatasetDict(train=table, validation=table.select(range(2))).save_to_disk(folder)
    return folder


def make_world(folder: Path, **changes: Any) -> list[str]:
    """CLIP, data and recipe in a folder; returns the command line that trains with them, without an output."""
    recipe = RECIPE | {"clip": str(make_clip(folder / "clip")), "dataset": str(make_data(folder / "data"))}
    (folder / "recipe.json").write_text(json.dumps(recipe | changes))
    return ["--config", str(folder / "recipe.json")]


# ------------------------------------------------------------------------------------------------------------
# Processes

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["run_train", "training_runs"])


def run_process(words: list[str], environment: dict[str, str], log: str, file_bytes: int | None) -> None:
    """A process of a run; what it writes goes into a file."""
    from ita_segmentation.cli import train as run_train

    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    run_train.main(words)


def start(words: list[str], log: Path, num_processes: int = 1, file_bytes: int | None = None) -> list[Any]:
    """Starts a run of one or more processes, which can be forbidden to write files beyond a size."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    processes = []
    for rank in range(num_processes):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment = common | (ranks | place if num_processes > 1 else {})
        processes.append(FORKS.Process(target=run_process, args=(words, environment, str(log), file_bytes)))
        processes[-1].start()
    return processes


def finish(processes: list[Any], seconds: float = 900.0) -> list[int]:
    """Exit statuses, of processes that end by themselves."""
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
    return all(process.is_alive() for process in processes)


def wait_for(processes: list[Any], output: Path, pattern: str, seconds: float = 300.0) -> bool:
    """Waits until a name appears in the output folder; False if the run ends before."""
    deadline = time.monotonic() + seconds
    while is_running(processes) and time.monotonic() < deadline:
        if output.is_dir() and any(output.glob(pattern)):
            return True
        time.sleep(0.0005)
    return False


def kill_until_finished(
    words: list[str], output: Path, num_kills: int, num_processes: int, seconds: float, seed: int
) -> dict[str, int]:
    """Starts a run again and again, and kills it, until it has been killed often enough; then lets it finish.

    Every second kill comes while a checkpoint is being written, the others at random moments of `seconds`. Runs that
    finish before all kills are done are moved aside, to `OUTPUT-0`, `OUTPUT-1`, ..., and begun anew.

    Returns: how many kills came "writing" a checkpoint, "before" the first checkpoint and "after" it, and how many
        "rounds" were finished.
    """
    moments = random.Random(seed)
    counts = {"writing": 0, "before": 0, "after": 0, "rounds": 0}
    resumed = [*words, "--output_dir", str(output), "--resume_from_checkpoint", "auto"]
    while (done := counts["writing"] + counts["before"] + counts["after"]) < num_kills:
        processes = start(resumed, output.with_suffix(".log"), num_processes)
        if done % 2 == 0:
            killed = wait_for(processes, output, ".unfinished-checkpoint-*")
            time.sleep(moments.uniform(0, 0.03))
        else:
            time.sleep(moments.uniform(0, seconds))
            killed = is_running(processes)
        killed = killed and is_running(processes)
        if killed:
            kill(processes)
            has_checkpoint = any(output.glob("checkpoint-*"))
            is_writing = any(output.glob(".unfinished-checkpoint-*"))
            moment = "writing" if is_writing else "after" if has_checkpoint else "before"
            counts[moment] += 1
            with output.with_suffix(".kills").open("a") as file:
                file.write(f"{moment}\n")
        else:
            assert finish(processes) == [0] * num_processes, output.with_suffix(".log").read_text()[-2000:]
            output.rename(output.with_name(f"{output.name}-{counts['rounds']}"))
            counts["rounds"] += 1
    assert finish(start(resumed, output.with_suffix(".log"), num_processes)) == [0] * num_processes
    output.rename(output.with_name(f"{output.name}-{counts['rounds']}"))
    counts["rounds"] += 1
    return counts


# ------------------------------------------------------------------------------------------------------------
# What runs have in common


def logged(output: Path) -> list[dict[str, Any]]:
    """Everything that a run has logged, but times and memory."""
    return [
        {name: value for name, value in entry.items() if not name.endswith(TIMES)}
        for entry in read_history(output)
        if "train_runtime" not in entry
    ]


def assert_same_run(output: Path, reference: Path) -> None:
    """Bitwise: everything that was logged, and the weights at the end."""
    assert logged(output) == logged(reference)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (output, reference))
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name
