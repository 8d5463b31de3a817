"""What every baseline's read-out has in common: the network's outputs, and the best class of each pixel in pieces.

transformers' `post_process_*` functions decide what a model's outputs mean, and they are what is called here. They
make scores of every class in every pixel, (L, H, W), which is 3.4 GiB for 847 classes and 1024 x 1024 pixels; so they
are called with some of the classes at a time, and the best so far is kept. Each class is scored for itself, so that
changes nothing.

Symbols: L labels of the model, Q queries, (H, W) the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

SCORE_BYTES = 256 * 2**20  # what the scores of one piece of the labels may take, in bytes


class Network:
    """A model with its processor: images in, float32 outputs out.

    Args:
        model: in eval mode, on its device.
        processor: whatever makes the model's inputs of images.
        dtype: of mixed precision (`torch.autocast`); None or float32 for none.
    """

    def __init__(self, model: Any, processor: Any, dtype: torch.dtype | None = None):
        self.model, self.processor = model, processor
        self.dtype = None if dtype in (None, torch.float32) else dtype

    def inputs(self, image: Any, **prompt: Any) -> dict[str, Any]:
        """The processor's answer to one image, on the model's device."""
        made = self.processor(images=[image], return_tensors="pt", **prompt)
        return {name: on_device(value, self.model.device) for name, value in made.items()}

    def precision(self) -> Any:
        """The context in which the network runs."""
        return torch.autocast(self.model.device.type, self.dtype, enabled=self.dtype is not None)

    def __call__(self, image: Any, **prompt: Any) -> SimpleNamespace:
        """Outputs for one image: the model's fields by their names, floats as float32."""
        with self.precision():
            outputs = self.model(**self.inputs(image, **prompt))
        return SimpleNamespace(**{name: as_float32(value) for name, value in outputs.items()})


def on_device(value: Any, device: torch.device | str) -> Any:
    """A tensor on `device`; anything else as it is."""
    return value.to(device) if isinstance(value, Tensor) else value


def as_float32(value: Any) -> Any:
    """A tensor of floats in float32; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def replaced(outputs: SimpleNamespace, **fields: Any) -> SimpleNamespace:
    """The outputs with other values in some fields."""
    return SimpleNamespace(**{**vars(outputs), **fields})


def logits_of_labels(class_logits: Tensor, labels: Sequence[int]) -> Tensor:
    """Class logits (..., L + 1), void last -> (..., n + 1) of some labels, everything else being void.

    The softmax of both gives the chosen labels the same probabilities. All labels: the tensor itself.
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
    pixels_at_once: int = 0,
) -> tuple[Tensor, Tensor]:
    """The best label of each pixel, the first of equals, without the scores of all labels at once.

    Args:
        scores_of: some labels -> their scores (n, H, W).
        labels: those to choose from.
        size: (H, W).
        device: where the scores are.
        pixels_at_once: numbers that one label's scores take on their way, if that is more than H * W.

    Returns:
        positions in `labels` (H, W) int64, and their scores (H, W) float32, -inf if there are no labels.
    """
    best = torch.full(size, -torch.inf, device=device)
    where = torch.zeros(size, dtype=torch.int64, device=device)
    step = max(1, SCORE_BYTES // (4 * max(size[0] * size[1], pixels_at_once)))
    for start in range(0, len(labels), step):
        scores, positions = scores_of(labels[start : start + step]).max(0)
        better = scores > best
        best = torch.where(better, scores, best)
        where = torch.where(better, positions + start, where)
    return where, best


def fused_segments(
    segmentation: Any,
    segments_info: Sequence[dict[str, Any]],
    class_of: Sequence[int],
    stuff: frozenset[int],
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """A panoptic read-out without fusing -> with all segments of one stuff class made one.

    transformers' own fusing gives a new segment the id of an older one whenever something was fused before
    (the count goes on from the fused id), so the read-out is asked for separate segments, which are joined here.

    Args:
        segmentation: (H, W) segment ids, tensor or array.
        segments_info: each with "id", "label_id" and "score".
        class_of: label -> class.
        stuff: classes whose segments are one.

    Returns:
        (H, W) int32 ids from 1 in the order of the segments, 0 for none; and each segment's "id", "label_id" (a
        class), "score" (the best of those joined).
    """
    ids = np.asarray(on_device(segmentation, "cpu"))
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
