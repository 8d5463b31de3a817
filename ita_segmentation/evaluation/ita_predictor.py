"""ITA as a `Predictor`: semantic maps, segments and instances for the classes of a benchmark."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any

import numpy as np
import torch
from PIL import Image

from ita_segmentation.evaluation.predictors import EVALUATION_TASKS, ImagePrediction, Instances
from ita_segmentation.evaluation.tta import Crop, CropOutput, TestTimeAugmentation, merge_crops
from modeling_ita.text import normalize_vocabulary

PANOPTIC_THRESHOLD = 0.0
"""Least score of a panoptic segment: FC-CLIP's evaluation (arXiv 2308.02487) keeps every query that is not void."""


class ITAPredictor:
    """A `Predictor` for one vocabulary; ValueError if a class has no name, or a template no place for it.

    Args:
        model: in eval mode.
        processor: its image processor.
        classes: K classes, each a list of names.
        is_thing: (K,) which classes have instances; None for what the checkpoint says (`config.stuff_names`).
        templates: prompt templates; None for the checkpoint's.
        augmentation: test-time augmentation; anything but the identity allows semantic maps only.
        panoptic_threshold: least score of a panoptic segment, 0 to 1.
        crops_at_once: crops of an image that go through the network together.
        autocast: makes the context in which the network runs; None for the weights' own precision.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        model: Any,
        processor: Any,
        classes: Sequence[Sequence[str]],
        is_thing: Sequence[bool] | None = None,
        templates: Sequence[str] | None = None,
        augmentation: TestTimeAugmentation | None = None,
        panoptic_threshold: float = PANOPTIC_THRESHOLD,
        crops_at_once: int = 1,
        autocast: Callable[[], AbstractContextManager] | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self.vocabulary = normalize_vocabulary(classes)
        self.stuff = None if is_thing is None else {i for i, thing in enumerate(is_thing) if not thing}
        self.templates = templates
        self.augmentation = augmentation or TestTimeAugmentation()
        self.panoptic_threshold = panoptic_threshold
        self.crops_at_once = crops_at_once
        self.autocast = autocast or nullcontext
        self.tasks = frozenset(EVALUATION_TASKS if self.augmentation.is_identity else ("semantic",))
        trained = model.config.train_vocabulary
        self.seen = self.vocabulary.shares_name_with(normalize_vocabulary(trained).names) if trained else None

    @torch.inference_mode()
    def __call__(
        self, images: Sequence[Image.Image], sizes: Sequence[tuple[int, int]], tasks: frozenset[str]
    ) -> list[ImagePrediction]:
        """Predict; see `Predictor`. Raises ValueError if the model's output is NaN."""
        if not self.augmentation.is_identity:
            return [self._predict_crops(image, size) for image, size in zip(images, sizes, strict=True)]
        outputs = self._run(self.processor(images=list(images), return_tensors="pt"))
        post, target = self.processor, {"target_sizes": list(sizes)}
        semantic: Sequence[Any] = [None] * len(images)
        panoptic, instance = semantic, semantic
        if "semantic" in tasks:
            semantic = post.post_process_semantic_segmentation(outputs, **target)
        if "panoptic" in tasks:
            panoptic = post.post_process_panoptic_segmentation(
                outputs, threshold=self.panoptic_threshold, label_ids_to_fuse=self.stuff, **target
            )
        if "instance" in tasks:
            instance = post.post_process_instance_segmentation(
                outputs, threshold=0.0, return_binary_maps=True, label_ids_to_fuse=self.stuff, **target
            )
        return [_prediction(*parts) for parts in zip(semantic, panoptic, instance, strict=True)]

    def _run(self, inputs: Any) -> Any:
        with self.autocast():
            outputs = self.model(
                **inputs.to(self.model.device), vocabulary=self.vocabulary, templates=self.templates
            )
        for logits in (outputs.class_queries_logits, outputs.masks_queries_logits):
            if logits.sum(dtype=torch.float32).isnan():
                raise ValueError("the model's output is NaN: its weights or the image are not finite")
        return outputs

    def _predict_crops(self, image: Image.Image, size: tuple[int, int]) -> ImagePrediction:
        if (image.height, image.width) != tuple(size):
            image = image.resize(size[::-1], Image.Resampling.BILINEAR)
        processor_size = self.processor.size if self.processor.do_resize else None
        crops = self.augmentation.crops((image.height, image.width), processor_size)
        outputs: list[CropOutput] = []
        for _, group in groupby(crops, key=lambda crop: crop.size):
            same_size = list(group)
            for start in range(0, len(same_size), self.crops_at_once):
                outputs += self._run_crops(image, same_size[start : start + self.crops_at_once])
        return ImagePrediction(semantic=merge_crops(outputs, size).cpu().numpy())

    def _run_crops(self, image: Image.Image, crops: list[Crop]) -> list[CropOutput]:
        """Run the network on crops of one size."""
        height, width = crops[0].size
        inputs = self.processor(
            images=[crop.cut(image) for crop in crops],
            size={"height": height, "width": width},
            do_resize=True,
            return_tensors="pt",
        )
        result = self._run(inputs)
        logits = zip(crops, result.class_queries_logits, result.masks_queries_logits, strict=True)
        return [CropOutput(crop, classes, masks) for crop, classes, masks in logits]


def _prediction(semantic: Any, panoptic: Any, instance: Any) -> ImagePrediction:
    """Convert the processor's results for one image; None for what was not asked for."""
    instances = None
    if instance is not None:
        found = instance["segments_info"]
        instances = Instances(
            scores=np.array([one["score"] for one in found], dtype=np.float64),
            labels=np.array([one["label_id"] for one in found], dtype=np.int64),
            masks=instance["segmentation"].cpu().numpy(),
        )
    return ImagePrediction(
        semantic=None if semantic is None else semantic.cpu().numpy(),
        panoptic=None if panoptic is None else panoptic["segmentation"].cpu().numpy(),
        segments=() if panoptic is None else panoptic["segments_info"],
        instances=instances,
    )
