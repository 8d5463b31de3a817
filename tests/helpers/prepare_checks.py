"""Call `ita prepare` in tests, and compare what it leaves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers.miniature_releases import save_png
from helpers.miniature_streets import build_folder
from ita_segmentation.cli.prepare import prepare_benchmark
from ita_segmentation.errors import ITAError


def run(benchmark: str, source: Path, output: Path, *more: object) -> int:
    return prepare_benchmark(
        [str(word) for word in (benchmark, "--source", source, "--output", output, *more)]
    )


def refusal(benchmark: str, source: Path, output: Path, *more: object) -> str:
    """Run a preparation that must fail, and return its message, which must be one line."""
    with pytest.raises(ITAError) as caught:
        run(benchmark, source, output, *more)
    message = str(caught.value)
    assert "\n" not in message
    return message


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def many_images(source: Path, count: int, side: int = 8) -> None:
    """Build a user's folder of noise, so that each image and label differs."""
    build_folder(source)
    for part in ("images", "labels"):
        for path in (source / part).iterdir():
            path.unlink()
    rng = np.random.default_rng(0)
    for number in range(count):
        save_png(source / f"images/{number:04d}.png", rng.integers(0, 256, (side, side, 3)))
        save_png(source / f"labels/{number:04d}.png", rng.integers(0, 3, (side, side)))
