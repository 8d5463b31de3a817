"""What can be scored: anything that turns images into class maps, segments and instances."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

EVALUATION_TASKS = ("semantic", "panoptic", "instance")


@dataclass(frozen=True)
class Instances:
    """Instances of one image, which may overlap.

    Attributes:
        scores: (n,) float, best first.
        labels: (n,) int64 class indices.
        masks: (n, H, W) bool.
    """

    scores: np.ndarray
    labels: np.ndarray
    masks: np.ndarray


@dataclass(frozen=True)
class ImagePrediction:
    """The predictions for one image of (H, W) pixels; None for tasks that were not asked for.

    Attributes:
        semantic: (H, W) integer class indices.
        panoptic: (H, W) int32 segment ids, 0 where there is none.
        segments: of the panoptic map, each with "id" and "label_id" (class index).
        instances: the best 100.
    """

    semantic: np.ndarray | None = None
    panoptic: np.ndarray | None = None
    segments: Sequence[dict[str, Any]] = ()
    instances: Instances | None = None


class Predictor(Protocol):
    """A model with the classes of one benchmark.

    Attributes:
        tasks: those of `EVALUATION_TASKS` that it can do.
        seen: (K,) whether masks of each class were in training; None if that is not known.
        notes: what a reader of the scores should know, one line each.
    """

    tasks: frozenset[str]
    seen: list[bool] | None
    notes: tuple[str, ...]

    def __call__(
        self, images: Sequence[Image.Image], sizes: Sequence[tuple[int, int]], tasks: frozenset[str]
    ) -> list[ImagePrediction]:
        """Predict the `tasks` for RGB images; `sizes` are (height, width) of each prediction."""
