"""`ita train-clip`: train the small CLIP of Scenes, a synthetic dataset, from scratch.

    ita train-clip --config recipes/scenes_clip.yaml --output outputs/scenes_clip

Writes `open_clip_config.json` and `open_clip_model.safetensors` (for `open_clip.model.CustomTextCLIP`) and
`results.json`. A text tower that an earlier run left in the output folder is reused.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from ita_segmentation.cli.options import add_output
from ita_segmentation.cli.parser import ConfigArgumentParser
from ita_segmentation.files import output_folder
from ita_segmentation.training.scenes_clip.recipe import ScenesClipRecipe


def build_parser() -> ConfigArgumentParser:
    """Build the parser of the command line: the output and every field of the recipe."""
    parser = ConfigArgumentParser(description="Train the small CLIP of Scenes from scratch.")
    add_output(parser, "folder of the model")
    defaults = ScenesClipRecipe()
    for field in dataclasses.fields(ScenesClipRecipe):
        default = getattr(defaults, field.name)
        options: dict[str, Any] = {"default": default, "help": field.metadata["help"]}
        if isinstance(default, dict):
            options |= {"type": json.loads, "metavar": "JSON"}
        elif isinstance(default, tuple):
            options |= {"type": int, "nargs": "+", "metavar": "N"}
        else:
            options |= {"type": type(default), "metavar": "N"}
        parser.add_argument(f"--{field.name}", **options)
    return parser


def train_clip(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate and save the CLIP that the arguments describe."""
    arguments = vars(build_parser().parse_command_line(argv))
    output = output_folder(arguments.pop("output"))
    arguments.pop("config", None)
    recipe = ScenesClipRecipe(**arguments)

    import torch

    from ita_segmentation.training.scenes_clip.trainer import ScenesClipTrainer

    torch.set_num_threads(recipe.num_threads)
    trainer = ScenesClipTrainer(recipe)
    with tqdm(total=recipe.text_steps, desc="text", mininterval=2) as bar:

        def show_text(step: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        trainer.train_text(output, show_text)

    start = time.monotonic()
    averages: dict[str, float] = {}
    bar_format = "vision {percentage:3.0f}%|{bar}| {elapsed} {postfix}"
    with tqdm(total=1.0, bar_format=bar_format, mininterval=5) as bar:

        def show(done: float, measured: dict[str, float]) -> None:
            for key, value in measured.items():
                averages[key] = 0.95 * averages.get(key, value) + 0.05 * value
            shown = {key: f"{value:.2f}" for key, value in averages.items()}
            bar.set_postfix(images=trainer.images_seen, **shown, refresh=False)
            bar.update(min(done, 1.0) - bar.n)

        def checkpoint() -> None:
            bar.write(json.dumps(trainer.evaluate(150)))
            trainer.save(output)

        trainer.train_vision(show, checkpoint)
    results: dict[str, Any] = {
        **trainer.evaluate(),
        "images_seen": trainer.images_seen,
        "steps": trainer.steps,
        "vision_minutes": round((time.monotonic() - start) / 60, 2),
    }
    trainer.save(output, results)
    print(json.dumps(results, indent=2))
    return 0
