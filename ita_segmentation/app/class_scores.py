"""How sure a semantic segmentation is of each class it found.

The read-out gives every pixel its best class and no score. Here a class's score is the mean, over the pixels given to
it, of its share in the scores of all classes, from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ita_segmentation.visualization import resize_labels
from modeling_ita.image_processing_ita import class_probabilities, semantic_scores

SCORED_SIDE = 256  # pixels of the longest side at which scores are compared


class RecordingModel:
    """Passes calls on to a model and keeps the outputs of the last one in `outputs`."""

    def __init__(self, model: Any):
        self.model = model
        self.outputs: Any = None

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def default_vocabulary(self) -> Any:
        return self.model.default_vocabulary

    def __call__(self, **inputs: Any) -> Any:
        self.outputs = self.model(**inputs)
        return self.outputs


@torch.inference_mode()
def mean_class_scores(outputs: Any, label_map: np.ndarray, classes: Sequence[int]) -> dict[int, float]:
    """The score of each of `classes` in a semantic segmentation.

    Args:
        outputs: the model's, for one image.
        label_map: (H, W), the index of the class in each pixel.
        classes: indices of the classes in the map.

    Returns:
        class index -> score; a class without a pixel at the size of comparison is left out.
    """
    height, width = label_map.shape
    factor = min(1.0, SCORED_SIDE / max(height, width))
    size = (math.ceil(height * factor), math.ceil(width * factor))
    labels = torch.from_numpy(resize_labels(label_map, size).astype(np.int64))
    probabilities = class_probabilities(outputs.class_queries_logits[0].cpu())
    chosen = probabilities[:, list(classes)]
    void = probabilities[:, -1:]
    others = (1 - chosen.sum(-1, keepdim=True) - void).clamp(min=0)
    reduced = torch.cat([chosen, others, void], dim=-1).log()  # all classes that are not in the map as one
    image_sizes = getattr(outputs, "image_sizes", None)
    image_size = None if image_sizes is None else [int(side) for side in image_sizes[0]]
    scores = semantic_scores(reduced, outputs.masks_queries_logits[0].cpu(), image_size, size)
    shares = scores / scores.sum(0).clamp(min=torch.finfo(scores.dtype).tiny)
    found = {}
    for place, index in enumerate(classes):
        inside = labels == index
        if inside.any():
            found[index] = float(shares[place][inside].mean())
    return found
