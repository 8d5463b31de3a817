"""Trains the small CLIP of the Scenes world from scratch.

    python run_train_clip.py --config recipes/scenes_clip.yaml --output outputs/scenes_clip

Writes `open_clip_config.json` and `open_clip_model.safetensors` (for `open_clip.model.CustomTextCLIP`) and
`results.json`. A text tower that an earlier run left in the output folder is used again.
"""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from tqdm import tqdm

from ita_segmentation.training.scenes_clip.trainer import TEXT_NAME, ScenesClipRecipe, ScenesClipTrainer


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the small CLIP of the Scenes world from scratch.")
    parser.add_argument(
        "--config", type=Path, help="YAML or JSON recipe; recipes/scenes_clip.yaml is the shipped one"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the model, made if missing")
    parser.add_argument(
        "--minutes", type=float, help="wall-clock minutes of the vision stages, over the recipe's"
    )
    parser.add_argument("--max_steps", type=int, help="most steps of the vision stages, over the recipe's")
    parser.add_argument("--seed", type=int, help="random seed, over the recipe's")
    return parser.parse_args(arguments)


def read_recipe(arguments: argparse.Namespace) -> ScenesClipRecipe:
    """The recipe file with the command line's values over it.

    Raises:
        ValueError, OSError: the file is missing or holds what no recipe can.
    """
    values: Any = {}
    if arguments.config is not None:
        try:
            values = yaml.safe_load(arguments.config.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{arguments.config} is not YAML: {str(error).splitlines()[0]}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{arguments.config} must hold a mapping of keys to values")
    for key in ("minutes", "max_steps", "seed"):
        if getattr(arguments, key) is not None:
            values[key] = getattr(arguments, key)
    return ScenesClipRecipe.from_dict(values)


def train_or_reuse_text(trainer: ScenesClipTrainer, path: Path) -> None:
    """The text tower: the one at `path` if it was trained for the same words and recipe, or else a new one."""
    recipe = trainer.recipe
    made_for = [
        trainer.vocabulary.classes,
        recipe.clip,
        recipe.text_steps,
        recipe.text_batch_size,
        recipe.seed,
    ]
    fingerprint = hashlib.sha256(json.dumps([*made_for, recipe.text_learning_rate]).encode()).hexdigest()
    mark = path.with_suffix(".sha256")
    if path.exists() and mark.exists() and mark.read_text() == fingerprint:
        trainer.load_text(path)
        return
    with tqdm(total=recipe.text_steps, desc="text", mininterval=2) as bar:

        def show(step: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        trainer.train_text(show)
    save_file({name: tensor.contiguous() for name, tensor in trainer.clip.text.state_dict().items()}, path)
    mark.write_text(fingerprint)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        recipe = read_recipe(options)
        options.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, TypeError, OSError) as error:
        print(f"run_train_clip.py: error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(recipe.num_threads)
    trainer = ScenesClipTrainer(recipe)
    train_or_reuse_text(trainer, options.output / TEXT_NAME)

    start = time.monotonic()
    averages: dict[str, float] = {}
    form = "vision {percentage:3.0f}%|{bar}| {elapsed} {postfix}"
    with tqdm(total=1.0, bar_format=form, mininterval=5) as bar:

        def show(done: float, measured: dict[str, float]) -> None:
            for key, value in measured.items():
                averages[key] = 0.95 * averages.get(key, value) + 0.05 * value
            shown = {key: f"{value:.2f}" for key, value in averages.items()}
            bar.set_postfix(images=trainer.images_seen, **shown, refresh=False)
            bar.update(min(done, 1.0) - bar.n)

        def checkpoint() -> None:
            bar.write(json.dumps(trainer.evaluate(150)))
            trainer.save(options.output)

        trainer.train_vision(show, checkpoint)
    results: dict[str, Any] = dict(trainer.evaluate())
    results["images_seen"] = trainer.images_seen
    results["steps"] = trainer.steps
    results["vision_minutes"] = round((time.monotonic() - start) / 60, 2)
    trainer.save(options.output, results)
    print(json.dumps(results, indent=2))
    return 0
