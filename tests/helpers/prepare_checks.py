"""How the tests of run_prepare call it and compare what it left."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from helpers.miniature_releases import save_png
from helpers.miniature_streets import build_folder
from ita_segmentation.cli import prepare as run_prepare


def run(benchmark: str, source: Path, output: Path, *more: object) -> int:
    words = [benchmark, "--source", source, "--output", output, *more]
    return run_prepare.prepare_benchmark([str(word) for word in words])


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def looks_complete(output: Path) -> bool:
    return (output / "data").exists() or (output / "README.md").exists()


def many_images(source: Path, count: int, side: int = 8) -> None:
    """A user's folder of noise, so that each image and label differs."""
    build_folder(source)
    for part in ("images", "labels"):
        for path in (source / part).iterdir():
            path.unlink()
    rng = np.random.default_rng(0)
    for number in range(count):
        save_png(source / f"images/{number:04d}.png", rng.integers(0, 256, (side, side, 3)))
        save_png(source / f"labels/{number:04d}.png", rng.integers(0, 3, (side, side)))
