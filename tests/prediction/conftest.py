"""One tiny checkpoint for all tests of a session, and the command that uses it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.tiny_checkpoint import save_tiny_checkpoint
from ita_segmentation import checkpoints
from ita_segmentation.cli.predict import predict as run_predict


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def loaded(checkpoint: Path) -> tuple[Any, Any]:
    return checkpoints.load_checkpoint(checkpoint, "cpu")


@pytest.fixture
def predict(checkpoint: Path, loaded: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`ita predict --model CHECKPOINT` with further arguments; as process `rank` of `world_size`."""
    monkeypatch.setattr("ita_segmentation.cli.predict.load_checkpoint", lambda path, device, dtype: loaded)

    def run(*arguments: object, rank: int = 0, world_size: int = 1) -> int:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        return run_predict(["--model", str(checkpoint), *map(str, arguments)])

    return run


@pytest.fixture
def noise() -> Callable[..., Path]:
    """Writes an image of noise; gives its path."""

    def write(path: Path, size: tuple[int, int] = (48, 40), seed: int = 0) -> Path:
        pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        return path

    return write
