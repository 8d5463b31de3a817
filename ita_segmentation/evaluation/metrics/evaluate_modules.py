"""The metrics as modules of `evaluate` that count each batch when it is added and keep no predictions.

Construct them, `MeanIoU(num_classes=150)`, or load them by path,
`evaluate.load("ita_segmentation/evaluation/metrics/modules/mean_iou.py", num_classes=150)`; nothing is downloaded.
They write no cache file, so `keep_in_memory`, `cache_dir` and `experiment_id` have no effect. In a
`torch.distributed` group, `compute` adds up the states of all processes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import datasets
import evaluate

from ita_segmentation.evaluation.metrics.base import ArrayStateMetric
from ita_segmentation.evaluation.metrics.confusion_matrix import ConfusionMatrix
from ita_segmentation.evaluation.metrics.mask_ap import MaskAveragePrecision
from ita_segmentation.evaluation.metrics.panoptic_quality import PanopticQuality

_INTEGER, _IMAGE = datasets.Value("int32"), datasets.Image()
_INSTANCES = {"labels": datasets.List(_INTEGER), "masks": datasets.List(_IMAGE)}


class StreamingModule(evaluate.Metric):
    """A module of `evaluate` around a `torchmetrics` metric; `state` is what was counted since the last `compute`."""

    metric: ClassVar[Callable[..., ArrayStateMetric]]
    options: ClassVar[tuple[str, ...]] = ("num_classes",)
    description, inputs_description = "", ""
    features: Mapping[str, Any] = {}
    keys: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]] = ((), ())
    """Keys that each prediction and each reference must have; the metric's `update` takes their values in order."""
    optional_keys: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config_name: str | None = None, *, num_classes: int, **kwargs: Any) -> None:
        kwargs["num_classes"] = num_classes
        self._arguments = {name: kwargs.pop(name) for name in self.options if name in kwargs}
        self._start()
        super().__init__(config_name, **kwargs)

    def _start(self) -> None:
        self.state, self._num_examples = type(self).metric(**self._arguments), 0

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
        batch = type(self).metric(**self._arguments)
        for pair in zip(predictions, references, strict=True):
            batch.update(*self._values(*pair))
        self.state.merge_state(batch)
        self._num_examples += len(predictions)

    def _values(self, prediction: Any, reference: Any) -> list[Any]:
        """List the arguments of the metric's `update`."""
        if self.keys == ((), ()):
            return [prediction, reference]
        for example, names in zip((prediction, reference), self.keys, strict=True):
            if missing := [name for name in names if name not in example]:
                raise ValueError(
                    f"an example has no {', '.join(missing)}; it has {', '.join(sorted(example))}"
                )
        of_prediction, of_reference = (
            [e[k] for k in ks] for e, ks in zip((prediction, reference), self.keys, strict=True)
        )
        return [*of_prediction, *of_reference, *(reference.get(name) for name in self.optional_keys)]

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
        self._start()
        return scores


class MeanIoU(StreamingModule):
    """Semantic scores: mean IoU and others, with the arguments `num_classes`, `ignore_index` of `ConfusionMatrix`."""

    metric, options = ConfusionMatrix, ("num_classes", "ignore_index")
    description = "Mean intersection over union and related scores, from one confusion matrix."
    inputs_description = """
    predictions: (B, H, W) integer array or tensor of class indices, or a list of (H, W) ones of any sizes.
    references: like predictions, `ignore_index` at ignored pixels.
    """
    features = {"predictions": _IMAGE, "references": _IMAGE}


class PanopticQualityMetric(StreamingModule):
    """Panoptic quality and its parts, with the arguments `num_classes` and `is_thing` of `PanopticQuality`."""

    metric, options = PanopticQuality, ("num_classes", "is_thing")
    keys = ("segmentation", "segments_info"), ("segmentation", "segments_info")
    description = "Panoptic quality with COCO's rules for crowds and void."
    inputs_description = """
    predictions: a list of {"segmentation": (H, W) ids, 0 for none, "segments_info": [{"id", "label_id"}, ...]}, as
        `post_process_panoptic_segmentation` returns them.
    references: a list of {"segmentation": (H, W) ids, 0 for void, "segments_info": [{"id", "category_id",
        "iscrowd" (optional)}, ...]}.
    """
    features = {
        "predictions": {
            "segmentation": _IMAGE,
            "segments_info": datasets.List({"id": _INTEGER, "label_id": _INTEGER}),
        },
        "references": {
            "segmentation": _IMAGE,
            "segments_info": datasets.List(
                {"id": _INTEGER, "category_id": _INTEGER, "iscrowd": datasets.Value("bool")}
            ),
        },
    }


class MaskAP(StreamingModule):
    """COCO's average precision and recall of masks, with the argument `num_classes` of `MaskAveragePrecision`."""

    metric = MaskAveragePrecision
    keys = ("scores", "labels", "masks"), ("image_id", "labels", "masks")
    optional_keys = ("iscrowd", "areas")
    description = "COCO's average precision and recall of masks."
    inputs_description = """
    predictions: a list of {"scores": (n,), "labels": (n,), "masks": (n, H, W) bool}.
    references: a list of {"image_id": int, "labels": (m,), "masks": (m, H, W) bool, "iscrowd": (m,) (optional),
        "areas": (m,) (optional)}.
    """
    features = {
        "predictions": {"scores": datasets.List(datasets.Value("float64")), **_INSTANCES},
        "references": {"image_id": datasets.Value("int64"), **_INSTANCES},
    }

    def _values(self, prediction: Any, reference: Any) -> list[Any]:
        *detections, image_id, labels, masks, crowd, areas = super()._values(prediction, reference)
        return [image_id, *detections, labels, masks, crowd, areas]
