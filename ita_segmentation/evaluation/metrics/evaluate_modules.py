"""The metrics as modules of `evaluate` that count each batch when it is added and keep no predictions.

Construct them, `MeanIoU(num_classes=150)`, or load them by path,
`evaluate.load("ita_segmentation/evaluation/metrics/modules/mean_iou.py", num_classes=150)`; nothing is downloaded.
They write no cache file, so `keep_in_memory`, `cache_dir` and `experiment_id` have no effect. In a
`torch.distributed` group, `compute` adds up the states of all processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate

from ita_segmentation.evaluation.metrics.base import ArrayStateMetric
from ita_segmentation.evaluation.metrics.confusion_matrix import ConfusionMatrix
from ita_segmentation.evaluation.metrics.mask_ap import MaskAveragePrecision
from ita_segmentation.evaluation.metrics.panoptic_quality import PanopticQuality

_LABELS = datasets.List(datasets.Value("int32"))
_MASKS = datasets.List(datasets.Image())


class StreamingModule(evaluate.Metric, ABC):
    """A module of `evaluate` around a `torchmetrics` metric; `state` is what was counted since the last `compute`."""

    description, inputs_description = "", ""
    features: Mapping[str, Any] = {}

    def __init__(self, config_name: str | None = None, **kwargs: Any) -> None:
        self.state = self._new_state()
        self._num_examples = 0
        super().__init__(config_name, **kwargs)

    @abstractmethod
    def _new_state(self) -> ArrayStateMetric:
        """Return an empty metric."""

    @abstractmethod
    def _update(self, state: Any, prediction: Any, reference: Any) -> None:
        """Count one example."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description=self.inputs_description,
            features=datasets.Features(self.features),
        )

    def __len__(self) -> int:
        return self._num_examples

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Count a batch; if one example of it is invalid, raise ValueError and count nothing of it."""
        if kwargs:
            raise ValueError(f"{self.name} takes predictions and references, and no {', '.join(kwargs)}")
        if predictions is None or references is None:
            raise ValueError(f"{self.name} takes predictions and references, and got only one of them")
        if len(predictions) != len(references):
            raise ValueError(f"there are {len(predictions)} predictions and {len(references)} references")
        batch = self._new_state()
        for prediction, reference in zip(predictions, references, strict=True):
            self._update(batch, prediction, reference)
        self.state.merge_state(batch)
        self._num_examples += len(predictions)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Count one image; raises as `add_batch`."""
        prediction = kwargs.pop("predictions", prediction)  # the names that `evaluate.combine` uses
        reference = kwargs.pop("references", reference)
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def compute(
        self, *, predictions: Any = None, references: Any = None, seen: Sequence[bool] | None = None
    ) -> dict[str, Any]:
        """Return the scores of everything added, and of these predictions and references; then start over.

        With `seen` (K,), whether each class was seen in training, also the means over both groups.
        """
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        scores = self.state.compute(seen)
        self.state, self._num_examples = self._new_state(), 0
        return scores


class MeanIoU(StreamingModule):
    """Semantic scores: mean, frequency-weighted IoU, mean and pixel accuracy, with arguments of `ConfusionMatrix`."""

    description = "Mean intersection over union and related scores, from one confusion matrix."
    inputs_description = """
    predictions: (B, H, W) integer array or tensor of class indices, or a list of (H, W) ones of any sizes.
    references: like predictions, `ignore_index` at ignored pixels.
    """
    features = {"predictions": datasets.Image(), "references": datasets.Image()}

    def __init__(
        self, config_name: str | None = None, *, num_classes: int, ignore_index: int = 255, **kwargs: Any
    ) -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        super().__init__(config_name, **kwargs)

    def _new_state(self) -> ConfusionMatrix:
        return ConfusionMatrix(self.num_classes, self.ignore_index)

    def _update(self, state: ConfusionMatrix, prediction: Any, reference: Any) -> None:
        state.update(prediction, reference)


class PanopticQualityMetric(StreamingModule):
    """Panoptic, segmentation and recognition quality, with arguments of `PanopticQuality`."""

    description = "Panoptic quality with COCO's rules for crowds and void."
    inputs_description = """
    predictions: a list of {"segmentation": (H, W) ids, 0 for none, "segments_info": [{"id", "label_id"}, ...]}, as
        `post_process_panoptic_segmentation` returns them.
    references: a list of {"segmentation": (H, W) ids, 0 for void, "segments_info": [{"id", "category_id",
        "iscrowd" (optional)}, ...]}.
    """
    features = {
        "predictions": {
            "segmentation": datasets.Image(),
            "segments_info": datasets.List(
                {"id": datasets.Value("int32"), "label_id": datasets.Value("int32")}
            ),
        },
        "references": {
            "segmentation": datasets.Image(),
            "segments_info": datasets.List(
                {
                    "id": datasets.Value("int32"),
                    "category_id": datasets.Value("int32"),
                    "iscrowd": datasets.Value("bool"),
                }
            ),
        },
    }

    def __init__(
        self,
        config_name: str | None = None,
        *,
        num_classes: int,
        is_thing: Sequence[bool] | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_classes, self.is_thing = num_classes, is_thing
        super().__init__(config_name, **kwargs)

    def _new_state(self) -> PanopticQuality:
        return PanopticQuality(self.num_classes, self.is_thing)

    def _update(self, state: PanopticQuality, prediction: Any, reference: Any) -> None:
        _check_keys(prediction, "segmentation", "segments_info")
        _check_keys(reference, "segmentation", "segments_info")
        state.update(
            prediction["segmentation"],
            prediction["segments_info"],
            reference["segmentation"],
            reference["segments_info"],
        )


class MaskAP(StreamingModule):
    """COCO's average precision and recall of masks, with arguments of `MaskAveragePrecision`."""

    description = "COCO's average precision and recall of masks."
    inputs_description = """
    predictions: a list of {"scores": (n,), "labels": (n,), "masks": (n, H, W) bool}.
    references: a list of {"image_id": int, "labels": (m,), "masks": (m, H, W) bool, "iscrowd": (m,) (optional),
        "areas": (m,) (optional)}.
    """
    features = {
        "predictions": {
            "scores": datasets.List(datasets.Value("float64")),
            "labels": _LABELS,
            "masks": _MASKS,
        },
        "references": {"image_id": datasets.Value("int64"), "labels": _LABELS, "masks": _MASKS},
    }

    def __init__(self, config_name: str | None = None, *, num_classes: int, **kwargs: Any) -> None:
        self.num_classes = num_classes
        super().__init__(config_name, **kwargs)

    def _new_state(self) -> MaskAveragePrecision:
        return MaskAveragePrecision(self.num_classes)

    def _update(self, state: MaskAveragePrecision, prediction: Any, reference: Any) -> None:
        _check_keys(prediction, "scores", "labels", "masks")
        _check_keys(reference, "image_id", "labels", "masks")
        state.update(
            reference["image_id"],
            prediction["scores"],
            prediction["labels"],
            prediction["masks"],
            reference["labels"],
            reference["masks"],
            reference.get("iscrowd"),
            reference.get("areas"),
        )


def _check_keys(example: Mapping[str, Any], *names: str) -> None:
    missing = [name for name in names if name not in example]
    if missing:
        raise ValueError(f"an example has no {', '.join(missing)}; it has {', '.join(sorted(example))}")
