"""Checkpoints of a training run: complete or absent, verified before use, and cheap.

A checkpoint is written to a temporary folder, with a manifest of its files last, flushed to disk and then renamed to
`checkpoint-STEP`; it is renamed back before it is deleted. Whenever a process ends, each `checkpoint-STEP` is complete.

A checkpoint loads like any other model (`from_pretrained`): two files of weights and an index. The one with the frozen
weights is a hard link to that of the checkpoint before, so a frozen CLIP of 1.4 GB is written and stored once.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ita_segmentation.errors import ITAError, UsageError, one_line
from ita_segmentation.training.clip_tuning import adapted_layers, frozen_weights, learned_weights, trainable
from ita_segmentation.training.ema import WeightAverage

logger = logging.get_logger(__name__)

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
MANIFEST = "manifest.json"
LOCK = ".lock"
FROZEN = "model-00001-of-00002.safetensors"
LEARNED = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
TRAINED = "trained.safetensors"  # where it differs from LEARNED: with an average or adapters
AVERAGED = "averaged.safetensors"
TORCH_CANNOT_WRITE = ("inline_container", "PytorchStreamWriter", "iostream error")
"""Parts of what `torch.save` raises when a disk is full."""


# ------------------------------------------------------------------------------------------------------------
# Folders


def checkpoint_folder(output: Path, step: int) -> Path:
    """Name the checkpoint of a step."""
    return output / f"checkpoint-{step}"


def temporary_folder(folder: Path) -> Path:
    """Name the folder in which a checkpoint is written, or deleted."""
    return folder.with_name(f".{folder.name}.tmp")


def checkpoints_of(output: Path) -> list[Path]:
    """List the checkpoints of a run, the latest step first."""
    if not output.is_dir():
        return []
    matches = [(CHECKPOINT.fullmatch(path.name), path) for path in output.iterdir() if path.is_dir()]
    found = [(int(match[1]), path) for match, path in matches if match]
    return [path for _, path in sorted(found, reverse=True)]


def commit(folder: Path) -> None:
    """Complete the checkpoint in `temporary_folder(folder)`: manifest, flush, rename, each before the next."""
    written = temporary_folder(folder)
    files = {
        str(file.relative_to(written)): {"bytes": file.stat().st_size, "crc32": checksum(file)}
        for file in sorted(written.rglob("*"))
        if file.is_file()
    }
    (written / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    for path in (*written.rglob("*"), written):
        _flush(path)
    if folder.exists():
        remove(folder)
    written.rename(folder)
    _flush(folder.parent)


def checksum(file: Path) -> int | None:
    """Compute the CRC-32 of a file; None for the frozen weights, which are compared with the model's instead."""
    return None if file.name == FROZEN else zlib.crc32(file.read_bytes())


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(folder: Path) -> None:
    """Delete a checkpoint, which loses its name before the first of its files."""
    shutil.rmtree(temporary_folder(folder), ignore_errors=True)
    folder.rename(temporary_folder(folder))
    shutil.rmtree(temporary_folder(folder), ignore_errors=True)


def clear_temporary(output: Path) -> None:
    """Delete what a killed process left half-written or half-deleted."""
    for path in output.glob(".checkpoint-[0-9]*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def keep_latest(output: Path, limit: int | None, best: str | None) -> None:
    """Delete all but the `limit` latest checkpoints (None deletes none) and the `best`."""
    for folder in checkpoints_of(output)[limit:] if limit else []:
        if best is None or folder.name != Path(best).name:
            remove(folder)


def damage_of(folder: Path) -> str | None:
    """Describe how a checkpoint differs from what was written; None if it does not."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
            if checksum(file) != expected["crc32"]:
                return f"the contents of {name} have changed"
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    return None


def find_checkpoint(wanted: str | None, output: Path) -> Path | None:
    """Find the checkpoint to resume from; None for a new run.

    `wanted` is None for a new run; "last" for the latest undamaged checkpoint; "auto" for the same, or a new run where
    there is none; or a checkpoint's folder. Raises UsageError if there is no such checkpoint, it is damaged, or a new
    run would mix its checkpoints with others.
    """
    present = checkpoints_of(output)
    if wanted is None:
        if present:
            raise UsageError(
                f"{output} has checkpoints of an earlier run, such as {present[0].name}: continue it with "
                "--resume_from_checkpoint, or choose another --output_dir"
            )
        return None
    if wanted.lower() not in ("last", "true", "auto"):
        folder = Path(wanted)
        if not (folder / TRAINER_STATE_NAME).is_file():
            raise UsageError(f"--resume_from_checkpoint: {folder} is not a checkpoint of a training run")
        damage = damage_of(folder)
        if damage is not None:
            raise UsageError(f"--resume_from_checkpoint: {folder} is damaged: {damage}")
        return folder
    for folder in present:
        damage = damage_of(folder)
        if damage is None:
            return folder
        logger.warning(f"{folder} is damaged: {damage}; using the one before")
    if wanted.lower() != "auto" or present:
        raise UsageError(
            f"--resume_from_checkpoint: there is no {'undamaged ' * bool(present)}checkpoint in {output}"
        )
    return None


@contextlib.contextmanager
def output_lock(output: Path, is_owner: bool = True) -> Iterator[None]:
    """Keep other training runs out of an output folder; a lock of a process that has ended does not count.

    The owner takes the lock and all processes of the run wait for it together. Raises ITAError if a running process has
    the lock, or the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        in_first_process(is_owner, lambda: stack.enter_context(_locked(output)))
        yield


def in_first_process(is_first: bool, action: Callable[[], Any]) -> Any:
    """Act in the first process; all get its result, or raise its ITAError."""
    found: list[Any] = [None, None]
    if is_first:
        try:
            found[0] = action()
        except ITAError as error:
            found[1] = error
    result, problem = broadcast_object_list(found)
    if problem is not None:
        raise problem
    return result


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    try:
        output.mkdir(parents=True, exist_ok=True)
        stream = (output / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise ITAError(f"cannot write to {output}: {error.strerror or error}") from error
    with stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel releases it when the process ends
        except OSError as error:
            stream.seek(0)
            owner = stream.read().strip()
            raise ITAError(f"{output} is in use by another training run ({owner})") from error
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        try:
            yield
        finally:
            (output / LOCK).unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------
# Weights


def on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the host, contiguous and without gradients."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def save_weights(
    model: PreTrainedModel, average: WeightAverage | None, folder: Path, before: Path | None
) -> None:
    """Write configuration, code and weights of a checkpoint into an empty folder.

    With an average the checkpoint's model has its weights; adapters are merged. The frozen weights are linked to those
    of the checkpoint `before`.
    """
    if average is None:
        learned = on_host(learned_weights(model))
    else:
        with average.in_place():
            learned = {name: tensor.clone() for name, tensor in on_host(learned_weights(model)).items()}
        average.save(folder / AVERAGED)
    model.save_pretrained(folder, state_dict=dict(learned))  # which empties its argument
    (folder / "model.safetensors").rename(folder / LEARNED)
    if average is not None or adapted_layers(model):
        save_file(on_host(dict(trainable(model))), folder / TRAINED)
    frozen = frozen_weights(model)
    try:
        os.link((before or folder) / FROZEN, folder / FROZEN)
    except OSError:  # the first checkpoint, or a file system without hard links
        save_file(on_host(frozen), folder / FROZEN, metadata={"format": "pt"})
    size = (folder / FROZEN).stat().st_size + (folder / LEARNED).stat().st_size
    weight_map = {**dict.fromkeys(frozen, FROZEN), **dict.fromkeys(learned, LEARNED)}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path) -> None:
    """Load the trainable weights of a checkpoint of the same run; raises ITAError if its weights are others."""
    source = TRAINED if (folder / TRAINED).is_file() else LEARNED
    tensors, parameters = load_file(folder / source), trainable(model)
    differing = sorted(set(tensors) ^ set(parameters)) or [
        name for name, parameter in parameters.items() if parameter.shape != tensors[name].shape
    ]
    if differing:
        raise ITAError(
            f"{folder} is of a run with other trainable weights: {len(differing)} differ, such as {differing[0]}"
        )
    frozen = frozen_weights(model)
    with safe_open(folder / FROZEN, framework="pt") as file:
        names = set(file.keys())
        if names != set(frozen) or not all(
            torch.equal(file.get_tensor(name), frozen[name].cpu()) for name in names
        ):
            raise ITAError(f"{folder} is of a run with other frozen weights: give the same --clip or --model")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def write_model(model: PreTrainedModel, processor: Any, weights: dict[str, Tensor], output: Path) -> None:
    """Write a model into a folder that may hold other files, each file replaced or left unchanged; raises ITAError."""
    written = output / ".model.tmp"

    def write() -> None:
        shutil.rmtree(written, ignore_errors=True)
        model.save_pretrained(written, state_dict=on_host(weights))
        processor.save_pretrained(written)
        for file in [path for path in written.rglob("*") if path.is_file()]:
            _flush(file)
            target = output / file.relative_to(written)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)

    failure = failure_of(write)
    shutil.rmtree(written, ignore_errors=True)
    if failure:
        raise ITAError(f"the model could not be written to {output}: {failure}")


def failure_of(action: Callable[[], None]) -> str | None:
    """Run an action that writes files; return why it could not, in one line, or None."""
    try:
        action()
    except (OSError, SafetensorError, ITAError) as error:
        return one_line(error)
    except RuntimeError as error:  # what torch makes of a full disk
        if not any(sign in str(error) for sign in TORCH_CANNOT_WRITE):
            raise
        return "torch could not write a file (is the disk full?)"
    return None
