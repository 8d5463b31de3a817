"""What a model can be scored on: a name for each benchmark, and how its pictures and labels are loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SCENES_VALIDATION_IMAGES = 500


@dataclass(frozen=True)
class Benchmark:
    """Pictures with semantic labels.

    Attributes:
        classes: K classes, each a list of names; the labels are their indices.
        seen: (K,) whether masks of the class were in training.
        pictures: has a length, and at each index {"image": PIL picture, "label": PIL picture or array (H, W)}.
        ignore_index: the label of pixels that are left out.
    """

    classes: list[list[str]]
    seen: list[bool]
    pictures: Any
    ignore_index: int = 255


def load_scenes(limit: int | None) -> Benchmark:
    """Scenes' validation pictures, all classes, from a seed that no training uses.

    Args:
        limit: number of pictures; None for all of them.
    """
    from data_ita.scenes import scenes_dataset, scenes_vocabulary

    vocabulary = scenes_vocabulary()
    pictures = scenes_dataset(split="validation", num_images=limit or SCENES_VALIDATION_IMAGES)
    return Benchmark(classes=vocabulary.classes, seen=vocabulary.seen, pictures=pictures)


BENCHMARKS: dict[str, Callable[[int | None], Benchmark]] = {"scenes": load_scenes}
"""Name on the command line -> loader, which takes the number of pictures wanted (None: all)."""
