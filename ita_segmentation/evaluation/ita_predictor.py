"""ITA as something that can be scored: its semantic maps, segments and instances for the classes of a benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any

import numpy as np
import torch
from PIL import Image

from ita_segmentation.evaluation.predictors import TASKS, Instances, Prediction
from ita_segmentation.evaluation.tta import View, ViewOutput, ViewPlan, semantic_map_of_views
from modeling_ita.vocabulary import normalize_vocabulary

PANOPTIC_THRESHOLD = 0.0
"""Least score of a panoptic segment: FC-CLIP's evaluation (arXiv 2308.02487) keeps every query that is not void."""


class ITAPredictor:
    """A `Predictor` (see `predictors.py`) for one vocabulary.

    Args:
        model: in eval mode.
        processor: its image processor.
        classes: K classes, each a list of names.
        is_thing: (K,) which classes have instances; None for what the checkpoint says (`config.stuff_names`).
        templates: prompt templates; None for the checkpoint's.
        plan: views of each image; with more than one, semantic maps only.
        panoptic_threshold: least score of a panoptic segment, 0 to 1.
        views_at_once: how many views go through the network together.
        autocast: makes the context in which the network runs; None for the weights' own precision.

    Raises:
        ValueError: a class has no name, or a template no place for it.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        classes: Sequence[Sequence[str]],
        is_thing: Sequence[bool] | None = None,
        templates: Sequence[str] | None = None,
        plan: ViewPlan | None = None,
        panoptic_threshold: float = PANOPTIC_THRESHOLD,
        views_at_once: int = 1,
        autocast: Callable[[], AbstractContextManager] | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self.vocabulary = normalize_vocabulary(classes)
        self.stuff = None if is_thing is None else {i for i, thing in enumerate(is_thing) if not thing}
        self.templates = templates
        self.plan = plan or ViewPlan()
        self.panoptic_threshold = panoptic_threshold
        self.views_at_once = views_at_once
        self.autocast = autocast or nullcontext
        self.tasks = frozenset(TASKS) if self.plan.is_plain else frozenset({"semantic"})
        trained = model.config.train_vocabulary
        self.seen = self.vocabulary.shares_name_with(normalize_vocabulary(trained).names) if trained else None

    @torch.inference_mode()
    def __call__(
        self, images: Sequence[Image.Image], sizes: Sequence[tuple[int, int]], tasks: frozenset[str]
    ) -> list[Prediction]:
        """See `Predictor`."""
        if not self.plan.is_plain:
            return [self._by_views(image, size) for image, size in zip(images, sizes, strict=True)]
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.model.device)
        outputs = self._run(inputs)
        semantic: Sequence[Any] = [None] * len(images)
        panoptic: Sequence[Any] = [None] * len(images)
        instance: Sequence[Any] = [None] * len(images)
        read, where = self.processor, {"target_sizes": list(sizes)}
        if "semantic" in tasks:
            semantic = read.post_process_semantic_segmentation(outputs, **where)
        if "panoptic" in tasks:
            panoptic = read.post_process_panoptic_segmentation(
                outputs, threshold=self.panoptic_threshold, label_ids_to_fuse=self.stuff, **where
            )
        if "instance" in tasks:
            instance = read.post_process_instance_segmentation(
                outputs, threshold=0.0, return_binary_maps=True, label_ids_to_fuse=self.stuff, **where
            )
        return [_prediction(*parts) for parts in zip(semantic, panoptic, instance, strict=True)]

    def _run(self, inputs: Any) -> Any:
        with self.autocast():
            return self.model(**inputs, vocabulary=self.vocabulary, templates=self.templates)

    def _by_views(self, image: Image.Image, size: tuple[int, int]) -> Prediction:
        if (image.height, image.width) != tuple(size):
            image = image.resize(size[::-1], Image.Resampling.BILINEAR)
        views = self.plan.views((image.height, image.width), self.processor.size, self.processor.do_resize)
        outputs: list[ViewOutput] = []
        for (height, width), alike in groupby(views, key=lambda view: view.size):
            waiting = list(alike)
            for start in range(0, len(waiting), self.views_at_once):
                outputs += self._look(image, waiting[start : start + self.views_at_once], height, width)
        return Prediction(semantic=semantic_map_of_views(outputs, size).cpu().numpy())

    def _look(self, image: Image.Image, views: list[View], height: int, width: int) -> list[ViewOutput]:
        """What the network says of views that are all brought to one size."""
        size = {"height": height, "width": width}
        cuts = [view.cut(image) for view in views]
        inputs = self.processor(images=cuts, size=size, do_resize=True, return_tensors="pt")
        result = self._run(inputs.to(self.model.device))
        logits = zip(views, result.class_queries_logits, result.masks_queries_logits, strict=True)
        return [ViewOutput(view, classes, masks, (height, width)) for view, classes, masks in logits]


def _prediction(semantic: Any, panoptic: Any, instance: Any) -> Prediction:
    """The processor's read-outs of one image as a `Prediction`; None for what was not asked for."""
    instances = None
    if instance is not None:
        found = instance["segments_info"]
        instances = Instances(
            scores=np.array([one["score"] for one in found], dtype=np.float64),
            labels=np.array([one["label_id"] for one in found], dtype=np.int64),
            masks=instance["segmentation"].cpu().numpy(),
        )
    return Prediction(
        semantic=None if semantic is None else semantic.cpu().numpy(),
        panoptic=None if panoptic is None else panoptic["segmentation"].cpu().numpy(),
        segments=() if panoptic is None else panoptic["segments_info"],
        instances=instances,
    )
