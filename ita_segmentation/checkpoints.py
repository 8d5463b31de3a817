"""Find and load checkpoints: a folder, or a repository on the Hub."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.files import read_text

MODEL_HELP = "checkpoint folder or Hub id (OWNER/NAME, or OWNER/NAME@REVISION)"
DTYPES = ("float32", "bfloat16", "auto")
DTYPE_HELP = "float32, bfloat16, or auto: bfloat16 where the hardware computes in it (default: %(default)s)"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHT_FILES = (WEIGHTS, WEIGHTS_INDEX)
WEIGHT_SAMPLES = 4096
"""Places at which a file of weights is sampled to tell it from another."""
HUB_FILES = ("*.json", "*.safetensors", "README.md", "examples/*")


def resolve_checkpoint(model: str | Path) -> Path:
    """Find the folder of a checkpoint; one on the Hub is fetched into the Hub's cache.

    Cache, offline mode and authentication are those of huggingface_hub (`HF_HOME`, `HF_HUB_OFFLINE`, `HF_TOKEN`). No
    code is fetched: the checkpoint runs with the code of this package.

    Args:
        model: a folder, a Hub id `OWNER/NAME`, or one with a branch, tag or commit: `OWNER/NAME@REVISION`.

    Returns:
        The folder.

    Raises:
        ITAError: there is neither such a folder nor such a repository, or the Hub cannot be reached.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    name, _, revision = str(model).partition("@")

    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import validate_repo_id

    missing = f"no such checkpoint folder: {model}"
    try:
        validate_repo_id(name)
        if name.count("/") != 1 or folder.exists():
            raise ITAError(missing)
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(HUB_FILES)))
    except HFValidationError as error:
        raise ITAError(missing) from error
    except RevisionNotFoundError as error:
        raise ITAError(f"{name} on the Hub has no revision {revision}") from error
    except RepositoryNotFoundError as error:
        raise ITAError(f"{missing}; nor is there such a repository on the Hub that you may read") from error
    except LocalEntryNotFoundError as error:
        why = (
            "offline mode is on (HF_HUB_OFFLINE)"
            if constants.is_offline_mode()
            else "the Hub cannot be reached"
        )
        raise ITAError(f"{missing}; nor is it in the Hub's cache, and {why}") from error
    except (HfHubHTTPError, OSError) as error:
        raise ITAError(f"{name} cannot be fetched from the Hub: {one_line(error, 200)}") from error


def checkpoint_digest(folder: Path) -> str:
    """Give what tells a checkpoint folder from another one, the same model trained further included.

    Of weights a few thousand samples are read, spread evenly over the files.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for sample in range(WEIGHT_SAMPLES):
                file.seek(size * sample // WEIGHT_SAMPLES)
                digest.update(file.read(16))
    return digest.hexdigest()[:16]


def choose_dtype(name: str, device: Any) -> Any:
    """Give the `torch.dtype` that one of `DTYPES` means on a device."""
    import torch

    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # an x86 CPU without these instructions emulates bfloat16
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = device.type == "cpu" and any(getattr(torch.cpu, check, bool)() for check in checks)
    return torch.bfloat16 if native else torch.float32


def load_checkpoint(model: str | Path, device: str | None = None, dtype: str = "float32") -> tuple[Any, Any]:
    """Load model and image processor of a checkpoint.

    Args:
        model: as for `resolve_checkpoint`.
        device: where to put the model; None takes a GPU if there is one.
        dtype: one of `DTYPES`.

    Returns:
        The model, in eval mode, and the processor.

    Raises:
        ITAError: there is no such checkpoint, it is not one of ITA, files or weights are missing, weights are NaN or
            infinite, or it does not fit together.
    """
    folder = resolve_checkpoint(model)
    _check_files(folder)

    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoImageProcessor
    from transformers.utils import logging

    from modeling_ita import ITAForOpenVocabSegmentation

    logging.disable_progress_bar()
    damage: tuple[type[Exception], ...] = (
        ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError,
        ValueError, MemoryError, SafetensorError, StrictDataclassError,
    )  # fmt: skip
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        network, report = ITAForOpenVocabSegmentation.from_pretrained(
            folder, output_loading_info=True, dtype=choose_dtype(dtype, chosen)
        )
        processor = AutoImageProcessor.from_pretrained(folder)
    except damage as error:
        raise ITAError(f"the checkpoint {folder} cannot be loaded: {one_line(error, 240)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ITAError(f"the checkpoint {folder} lacks {len(missing)} of its weights, such as {missing[0]}")
    try:
        return network.eval().to(chosen), processor
    except (RuntimeError, AssertionError) as error:
        raise ITAError(
            f"the checkpoint {folder} cannot be put on {chosen}: {one_line(error, 240)}"
        ) from error


def domain_notice(config: Any) -> str | None:
    """Say in one line what a checkpoint was trained on, where that is not photographs."""
    domain = getattr(config, "domain", None)
    if not isinstance(domain, str) or not domain or "photograph" in domain.lower():
        return None
    return (
        f"this checkpoint was trained on {domain}: do not expect it to segment photographs (see `ita models`)"
    )


def set_shortest_side(processor: Any, side: int | None) -> None:
    """Make the processor bring images to another size."""
    if side is None:
        return
    size = dict(processor.size)
    ratio = (size.get("longest_edge") or 1333) / (size.get("shortest_edge") or 800)
    processor.size = type(processor.size)(shortest_edge=side, longest_edge=round(side * ratio))
    processor.do_resize = True


def _check_files(folder: Path) -> None:
    """Check that the files of a checkpoint are there and that it is one of ITA."""
    if not (folder / "config.json").is_file():
        raise ITAError(f"{folder} is not a checkpoint folder: it has no config.json")
    kind = _read_json(folder / "config.json").get("model_type")
    if kind != "ita":
        raise ITAError(
            f"{folder} is not an ITA checkpoint: the model_type of its config.json is {kind!r:.40}"
        )
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise ITAError(f"the checkpoint folder {folder} has no weights ({WEIGHTS})")
    if not (folder / WEIGHTS).is_file():
        _check_shards(folder)
    if not (folder / "preprocessor_config.json").is_file():
        raise ITAError(f"the checkpoint folder {folder} has no image processor (preprocessor_config.json)")


def _check_shards(folder: Path) -> None:
    """Check the files that an index of weights names: all there, and none outside of the folder."""
    index = folder / WEIGHTS_INDEX
    files = _read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise ITAError(f"{index} does not say which file holds which weight")
    for name in dict.fromkeys(files.values()):
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in name:
            raise ITAError(f"{index} names a file outside of its folder: {json.dumps(name)}")
        if not (folder / path).is_file():
            raise ITAError(f"the checkpoint folder {folder} lacks the weights in {name}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ITAError(f"{path} is not JSON: {one_line(error, 120)}") from error
    if not isinstance(content, dict):
        raise ITAError(f"{path} must hold a JSON object")
    return content
