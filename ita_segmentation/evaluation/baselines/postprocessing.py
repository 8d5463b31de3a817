"""What the baselines share: the network's outputs, and the best class of each pixel for some classes at a time.

transformers' `post_process_*` functions decide what a model's outputs mean, and they are what is called here. They
make scores of every class in every pixel, (L, H, W), which is 3.4 GiB for 847 classes and 1024 x 1024 pixels; so they
are called with some of the classes at a time, and the best so far is kept. Each class is scored independently, so
that changes nothing.

Symbols: L labels of the model, Q queries, (H, W) the image.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ita_segmentation.evaluation.predictors import ImagePrediction

SCORE_BYTES = 256 * 2**20  # memory for the scores of the labels that are scored at a time


class Network:
    """A model in eval mode with its processor: images in, float32 outputs out, computed by autocast in `dtype`."""

    def __init__(self, model: Any, processor: Any, dtype: torch.dtype | None = None) -> None:
        self.model, self.processor = model, processor
        self.dtype = None if dtype in (None, torch.float32) else dtype

    def inputs(self, image: Any, **prompt: Any) -> dict[str, Any]:
        """Return the model's inputs for one image, on its device."""
        made = self.processor(images=[image], return_tensors="pt", **prompt)
        return {name: to_device(value, self.model.device) for name, value in made.items()}

    def precision(self) -> Any:
        """Return the context in which the network runs."""
        return torch.autocast(self.model.device.type, self.dtype, enabled=self.dtype is not None)

    def __call__(self, image: Any, **prompt: Any) -> SimpleNamespace:
        """Return the outputs for one image: the model's fields by their names, floats as float32."""
        with self.precision():
            outputs = self.model(**self.inputs(image, **prompt))
        return SimpleNamespace(**{name: to_float32(value) for name, value in outputs.items()})


class BaselinePredictor:
    """A `Predictor` that runs one image at a time.

    The processors of these models pad the images of a batch to one size and their post-processing never removes the
    padding, so an image's result would depend on its neighbors; alone, nothing is padded, and any batch size and any
    number of processes give the same numbers.
    """

    tasks = frozenset({"semantic"})
    seen: list[bool] | None = None
    notes: tuple[str, ...] = ()

    @torch.inference_mode()
    def __call__(
        self, images: Sequence[Image.Image], sizes: Sequence[tuple[int, int]], tasks: frozenset[str]
    ) -> list[ImagePrediction]:
        """Predict; see `Predictor`. Raises ValueError for a task that the model cannot do, or NaN."""
        if not tasks <= self.tasks:
            raise ValueError(f"this model cannot do {', '.join(sorted(tasks - self.tasks))} segmentation")
        return [self._predict(image, size, tasks) for image, size in zip(images, sizes, strict=True)]

    def _predict(self, image: Image.Image, size: tuple[int, int], tasks: frozenset[str]) -> ImagePrediction:
        raise NotImplementedError


def to_device(value: Any, device: torch.device | str) -> Any:
    """Move a tensor to `device`; return anything else unchanged."""
    return value.to(device) if isinstance(value, Tensor) else value


def to_float32(value: Any) -> Any:
    """Convert a tensor of floats to float32, ValueError if it holds NaN; return anything else unchanged."""
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    if value.isnan().any():
        raise ValueError("the model's output is NaN: its weights or the image are not finite")
    return value.float()


def replace_fields(outputs: SimpleNamespace, **fields: Any) -> SimpleNamespace:
    """Return the outputs with other values in some fields."""
    return SimpleNamespace(**{**vars(outputs), **fields})


def logits_of_labels(class_logits: Tensor, labels: Sequence[int]) -> Tensor:
    """Keep the class logits (..., L + 1), void last, of n labels and assign all others to void: (..., n + 1).

    The softmax of the result gives the chosen labels the same probabilities.
    """
    num_labels = class_logits.shape[-1] - 1
    if list(labels) == list(range(num_labels)):
        return class_logits
    chosen = torch.tensor(labels, device=class_logits.device)
    is_void = torch.ones(num_labels + 1, dtype=torch.bool, device=class_logits.device)
    is_void[chosen] = False
    void = class_logits[..., is_void].logsumexp(-1, keepdim=True)
    return torch.cat([class_logits[..., chosen], void], dim=-1)


def best_labels(
    scores_of: Callable[[Sequence[int]], Tensor],
    labels: Sequence[int],
    size: tuple[int, int],
    device: torch.device | str,
    intermediate_pixels: int = 0,
) -> tuple[Tensor, Tensor]:
    """Find the best label of each pixel, the first of equals, without the scores of all labels at once.

    `scores_of` gives some labels' scores (n, H, W), for which it needs `intermediate_pixels` values per label, if that
    is more than H * W. Returns positions in `labels` (H, W) int64, and their scores (H, W), -inf if there are no
    labels.
    """
    best = torch.full(size, -torch.inf, device=device)
    positions = torch.zeros(size, dtype=torch.int64, device=device)
    step = max(1, SCORE_BYTES // (4 * max(size[0] * size[1], intermediate_pixels)))
    for start in range(0, len(labels), step):
        scores, found = scores_of(labels[start : start + step]).max(0)
        better = scores > best
        best = torch.where(better, scores, best)
        positions = torch.where(better, found + start, positions)
    return positions, best


def fuse_stuff(
    segmentation: Any, segments_info: Sequence[dict[str, Any]], class_of: Sequence[int], stuff: frozenset[int]
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Fuse all segments of one stuff class in a panoptic result; `class_of` maps labels to classes.

    transformers' own fusing gives a new segment the id of an older one whenever something was fused before (the count
    continues from the fused id), so separate segments are asked for and fused here. Returns (H, W) int32 ids from 1 in
    the order of the segments, 0 for none; and each segment's "id", "label_id" (a class), "score" (the best of those
    fused).
    """
    ids = np.asarray(to_device(segmentation, "cpu"))
    panoptic = np.zeros(ids.shape, dtype=np.int32)
    segments: list[dict[str, Any]] = []
    of_stuff: dict[int, dict[str, Any]] = {}
    for info in segments_info:
        class_index = class_of[info["label_id"]]
        segment = of_stuff.get(class_index)
        if segment is None:
            segment = {"id": len(segments) + 1, "label_id": class_index, "score": info["score"]}
            segments.append(segment)
            if class_index in stuff:
                of_stuff[class_index] = segment
        segment["score"] = max(segment["score"], info["score"])
        panoptic[ids == info["id"]] = segment["id"]
    return panoptic, segments
