"""A checkpoint as a FiftyOne model: `dataset.apply_model(ITAFiftyOneModel(...), label_field="ita")`.

Importing this module imports fiftyone; `ita_segmentation.integrations` itself does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ita_segmentation.integrations.fiftyone_labels import (
    mask_targets,
    to_fiftyone_detections,
    to_fiftyone_segmentation,
)

try:
    from fiftyone.core.models import Model
except ImportError as error:
    raise ImportError("ITAFiftyOneModel needs fiftyone: pip install fiftyone") from error

TASKS = ("semantic", "panoptic", "instance")


@dataclass
class ITAFiftyOneConfig:
    """What `apply_model` may change for a run: its `confidence_thresh` and `classes` arguments land here.

    Attributes:
        confidence_thresh: least score of a segment; None: 0.8 panoptic, 0.5 instance, as `run_predict.py`.
        filter_classes: names of the classes to keep; None keeps all. Without effect on semantic maps.
    """

    confidence_thresh: float | None = None
    filter_classes: set[str] | None = field(default=None)


class ITAFiftyOneModel(Model):
    """Segments FiftyOne's images by the words of a vocabulary.

    Args:
        model: `ITAForOpenVocabSegmentation`, on the device that it is to run on.
        processor: its `ITAImageProcessor`.
        vocabulary: classes, each a name or a list of synonyms; None: the checkpoint's own.
        task: "semantic" gives `Segmentation` (see `mask_targets`), "panoptic" and "instance" give `Detections`.

    Raises:
        ValueError: unknown task, a vocabulary that is none, or no vocabulary at all.
    """

    def __init__(
        self, model: Any, processor: Any, vocabulary: Sequence[Any] | None = None, task: str = "panoptic"
    ):
        from modeling_ita.vocabulary import normalize_vocabulary

        if task not in TASKS:
            raise ValueError(f"task is one of {', '.join(TASKS)}, got {task!r}")
        classes = model.default_vocabulary if vocabulary is None else vocabulary
        if classes is None:
            raise ValueError("the checkpoint has no classes of its own: give a vocabulary")
        self.model, self.processor, self.task = model.eval(), processor, task
        self.vocabulary = normalize_vocabulary(classes)
        self.config = ITAFiftyOneConfig()
        self._preprocess = True

    @property
    def media_type(self) -> str:
        return "image"

    @property
    def ragged_batches(self) -> bool:
        """False: a batch may hold images of any sizes."""
        return False

    @property
    def transforms(self) -> None:
        """The processor is part of the prediction."""
        return None

    @property
    def preprocess(self) -> bool:
        return self._preprocess

    @preprocess.setter
    def preprocess(self, value: bool) -> None:
        self._preprocess = value

    @property
    def mask_targets(self) -> dict[int, str]:
        """Names of the values of the semantic masks, for `dataset.mask_targets[label_field]`."""
        return mask_targets(self.vocabulary)

    def predict(self, arg: Any) -> Any:
        """One image, (H, W, 3) uint8 or PIL -> its label."""
        return self.predict_all([arg])[0]

    def predict_all(self, args: Iterable[Any]) -> list[Any]:
        """Images of any sizes -> their labels, in one pass through the network."""
        import torch

        images = [
            one.convert("RGB") if isinstance(one, Image.Image) else Image.fromarray(one).convert("RGB")
            for one in args
        ]
        if not images:
            return []
        sizes = [(image.height, image.width) for image in images]
        with torch.inference_mode():
            inputs = self.processor(images=images, return_tensors="pt").to(self.model.device)
            outputs = self.model(**inputs, vocabulary=self.vocabulary)
            if self.task == "semantic":
                maps = self.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
                return [to_fiftyone_segmentation(one) for one in maps]
            results = self._segments(outputs, sizes)
        return [to_fiftyone_detections(self._filtered(one), self.vocabulary) for one in results]

    def _segments(self, outputs: Any, sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
        threshold = self.config.confidence_thresh
        if self.task == "panoptic":
            least = 0.8 if threshold is None else threshold
            return self.processor.post_process_panoptic_segmentation(
                outputs, threshold=least, target_sizes=sizes
            )
        least = 0.5 if threshold is None else threshold
        return self.processor.post_process_instance_segmentation(
            outputs, threshold=least, target_sizes=sizes, return_binary_maps=True
        )

    def _filtered(self, result: dict[str, Any]) -> dict[str, Any]:
        """The segments of `filter_classes` only."""
        wanted = self.config.filter_classes
        if wanted is None:
            return result
        keep = [
            index
            for index, entry in enumerate(result["segments_info"])
            if self.vocabulary[entry["label_id"]][0] in wanted
        ]
        maps = result["segmentation"]
        return {
            "segmentation": maps[keep] if maps.ndim == 3 else maps,
            "segments_info": [result["segments_info"][index] for index in keep],
        }
