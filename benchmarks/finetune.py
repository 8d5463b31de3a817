"""What fine-tuning a checkpoint on fifty images of five new classes gains on these and costs on the old ones.

    python benchmarks/finetune.py --output FOLDER      # data, training and scores; other arguments go to run_train.py

The images are scenes with five things that Scenes does not have, among its own things and textures. Of the fifty for
training only the five are labeled. The commands are those of a user: `run_prepare.py folder`, `run_train.py --config
recipes/finetune_folder.yaml`, `run_eval.py`. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ita_segmentation.data.scenes import IGNORE_INDEX, scene, scenes_vocabulary
from ita_segmentation.data.scenes import classes as scenes_classes

ROOT = Path(__file__).resolve().parents[1]
NEW_THINGS = {
    "accordion": "U+1FA97",
    "avocado": "U+1F951",
    "dinosaur": "U+1F996",
    "microscope": "U+1F52C",
    "gift box": "U+1F381",
}
"""Names and pictograms; Scenes has no class with one of these names."""
SEEDS = {"train": 501, "validation": 502}
OLD_THINGS, OLD_STUFF = 5, 4
"""Number of old classes, different ones for each image, that may be beside new ones."""
SIZE = 192


@contextlib.contextmanager
def extended_scenes() -> Iterator[None]:
    """In this context Scenes also has the new things, after its own things and before stuff."""
    before = scenes_classes.VOCABULARY_FILE
    table = json.loads(before.read_text(encoding="utf-8"))
    table["things"] += [
        {"name": name, "synonyms": [], "codepoints": [point], "seen": True}
        for name, point in NEW_THINGS.items()
    ]
    caches = (scenes_classes.scenes_vocabulary, scenes_classes._select_classes)
    with tempfile.TemporaryDirectory() as folder:
        scenes_classes.VOCABULARY_FILE = Path(folder) / "vocabulary.json"
        scenes_classes.VOCABULARY_FILE.write_text(json.dumps(table), encoding="utf-8")
        for cache in caches:
            cache.cache_clear()
        scenes_vocabulary()
    try:
        yield
    finally:
        scenes_classes.VOCABULARY_FILE = before
        for cache in caches:
            cache.cache_clear()


def draw_images(split: str, count: int, size: int = SIZE) -> Iterator[tuple[Image.Image, np.ndarray]]:
    """Images that show at least one new thing each, and (size, size) uint8 ids in the extended Scenes' classes."""
    with extended_scenes():
        vocabulary = scenes_vocabulary()
        new = [vocabulary.names.index(name) for name in NEW_THINGS]
        old = sorted(set(vocabulary.thing_ids) - set(new))
        index = 0
        while count:
            rng = np.random.default_rng([SEEDS[split], index])
            others = [
                *rng.choice(old, OLD_THINGS, False),
                *rng.choice(vocabulary.stuff_ids, OLD_STUFF, False),
            ]
            drawn = scene(SEEDS[split], index, size, [*new, *map(int, others)])
            index += 1
            if np.isin(drawn.semantic, new).any():
                count -= 1
                yield drawn.image, drawn.semantic


def write_folder(folder: Path, split: str, count: int, classes: list[list[str]], size: int = SIZE) -> None:
    """Images, label PNGs and classes.json as `run_prepare.py folder` takes them; other classes become 255."""
    with extended_scenes():
        names = scenes_vocabulary().names
    table = np.full(256, IGNORE_INDEX, np.uint8)
    for label, (name, *_) in enumerate(classes):
        table[names.index(name)] = label
    for part in ("images", "labels"):
        (folder / part / split).mkdir(parents=True, exist_ok=True)
    for number, (image, semantic) in enumerate(draw_images(split, count, size)):
        image.save(folder / "images" / split / f"{number:04}.jpg", quality=95)
        Image.fromarray(table[semantic]).save(folder / "labels" / split / f"{number:04}.png")
    (folder / "classes.json").write_text(json.dumps(classes), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------
# Commands


def run_command(*arguments: Any) -> float:
    """Run a command as a user would; return its seconds. Raises CalledProcessError if it fails."""
    print("$ python", *arguments, flush=True)
    started = time.monotonic()
    settings = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=settings, check=True)
    return time.monotonic() - started


def make_data(folder: Path, classes: list[list[str]]) -> None:
    """Make `folder/data/mine` (only the new classes) and, for scores, `folder/data/all` (all classes)."""
    new = [[name] for name in NEW_THINGS]
    write_folder(folder / "source" / "mine", "train", 50, new)
    write_folder(folder / "source" / "all", "validation", 120, [*classes, *new])
    for name in ("mine", "all"):
        source, output = folder / "source" / name, folder / "data" / name
        run_command("run_prepare.py", "folder", "--source", source, "--output", output)


def scores_of(model: Path, folder: Path, name: str) -> dict[str, float]:
    """mIoU of the new classes and of all others on the images with both; of all of Scenes on its own images."""
    results: dict[str, Any] = {}
    for part in ("all", "scenes"):
        output = folder / "scores" / name / part
        options = [
            "--benchmarks",
            part,
            "--data_dir",
            folder / "data",
            "--tasks",
            "semantic",
            "--num_report_images",
            0,
        ]
        options += ["--limit", 100] if part == "scenes" else []
        run_command("run_eval.py", "--model", model, *options, "--output", output)
        results[part] = json.loads((output / "results.json").read_text(encoding="utf-8"))["benchmarks"][part]
    iou = {row["name"]: row["iou"] for row in results["all"]["classes"]}
    others = [value for name, value in iou.items() if name not in NEW_THINGS and value is not None]
    scenes = {
        f"scenes {group}": results["scenes"][f"miou{group and '_'}{group}"]
        for group in ("", "seen", "unseen")
    }
    return {
        "new": float(np.mean([iou[name] or 0.0 for name in NEW_THINGS])),
        "old": float(np.mean(others)),
        **scenes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for data, runs and scores")
    parser.add_argument("--model", type=Path, default=Path("models/ita-tiny"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    arguments, more = parser.parse_known_args()
    folder = arguments.output.resolve()
    make_data(folder, scenes_vocabulary().classes)
    rows = {"before": scores_of(arguments.model, folder, "before")}
    for seed in arguments.seeds:
        output = folder / "runs" / str(seed)
        words = ["--model", arguments.model, "--dataset", folder / "data" / "mine", "--output_dir", output]
        seconds = run_command(
            "run_train.py", "--config", "recipes/finetune_folder.yaml", *words, "--seed", seed, *more
        )
        rows[f"after, seed {seed} ({seconds / 60:.1f} min)"] = scores_of(output, folder, str(seed))
    heads = list(rows["before"])
    print(
        f"\n{datetime.date.today().isoformat()}, mIoU\n\n|  | {' | '.join(heads)} |\n|{' --- |' * (1 + len(heads))}"
    )
    for name, scores in rows.items():
        print(f"| {name} | {' | '.join(f'{scores[head]:.3f}' for head in heads)} |")


if __name__ == "__main__":
    main()
