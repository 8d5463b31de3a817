"""The three scores as modules of `evaluate`, which count each batch as it comes and keep none of it.

They are used as any module: `add` or `add_batch` as often as needed and then `compute`, or `compute` alone with all
predictions and references; `compute` starts afresh. They are constructed, `MeanIoU(num_classes=150)`, or loaded by
path, `evaluate.load("ita_segmentation/evaluation/metrics/mean_iou.py", num_classes=150)`; nothing is downloaded. Nothing is written
either, so that of `evaluate`'s arguments `keep_in_memory`, `cache_dir` and `experiment_id` have no effect. With
`num_process` and `process_id`, `compute` adds up the states of all processes of the torch.distributed group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import evaluate
import torch.distributed as dist

from ita_segmentation.evaluation.metrics.instance import MaskAveragePrecision
from ita_segmentation.evaluation.metrics.panoptic import PanopticQuality
from ita_segmentation.evaluation.metrics.semantic import ConfusionMatrix


class StreamingMetric(evaluate.Metric, ABC):
    """A module of `evaluate` whose batches go straight into a state.

    Attributes:
        state: what was counted since the last `compute`; one of ita_segmentation.evaluation's states, which add up.

    Args:
        config_name: of no meaning here; `evaluate.load` gives it.
        num_process: processes whose states `compute` adds up.
        process_id: which of them this is; `compute` gives scores on process 0 and None on the others.
        **kwargs: as of `evaluate.Metric`.
    """

    def __init__(
        self, config_name: str | None = None, num_process: int = 1, process_id: int = 0, **kwargs: Any
    ):
        self.state = self._new_state()
        self._num_examples = 0
        super().__init__(config_name, num_process=num_process, process_id=process_id, **kwargs)

    @abstractmethod
    def _new_state(self) -> Any:
        """A state that has counted nothing."""

    @abstractmethod
    def _measure(self, predictions: Any, references: Any) -> list[Any]:
        """What the state is to accumulate of a batch, all of it checked."""

    def __len__(self) -> int:
        return self._num_examples

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Counts a batch.

        Raises:
            ValueError: if predictions and references are not as many as each other, or one of them is not as it
                should be. Nothing of the batch is counted then.
        """
        if kwargs:
            raise ValueError(f"{self.name} takes predictions and references, and no {', '.join(kwargs)}")
        if predictions is None or references is None:
            raise ValueError(f"{self.name} takes predictions and references, and got only one of them")
        if len(predictions) != len(references):
            raise ValueError(f"there are {len(predictions)} predictions and {len(references)} references")
        for measured in self._measure(predictions, references):
            self.state.accumulate(measured)
        self._num_examples += len(predictions)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Counts one image; errors as of `add_batch`."""
        prediction = kwargs.pop("predictions", prediction)  # what `evaluate.combine` calls them
        reference = kwargs.pop("references", reference)
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def compute(
        self, *, predictions: Any = None, references: Any = None, seen: Sequence[bool] | None = None
    ) -> dict[str, Any] | None:
        """The scores of all that was added, and of these predictions and references if given; then starts afresh.

        Args:
            seen: (K,) whether each class was seen in training; adds the means over both groups.

        Returns:
            what the state's `compute` gives; None on processes other than the first.

        Raises:
            ValueError: as of `add_batch`; if `seen` has not one entry for each class; if `num_process` is more than
                1 and not the size of an initialised torch.distributed group.
        """
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        state = self._of_all_processes() if self.num_process > 1 else self.state
        scores = state.compute(seen) if self.process_id == 0 else None
        self.state, self._num_examples = self._new_state(), 0
        return scores

    def _of_all_processes(self) -> Any:
        """The sum of all processes' states, on each of them."""
        ready = dist.is_available() and dist.is_initialized()
        if not ready or (dist.get_world_size(), dist.get_rank()) != (self.num_process, self.process_id):
            raise ValueError(
                f"num_process={self.num_process}, process_id={self.process_id} must be the size and rank of an "
                "initialised torch.distributed group; without one, add up the processes' states"
            )
        gathered: list[Any] = [None] * self.num_process
        dist.all_gather_object(gathered, self.state.state_dict())
        total = self._new_state()
        for arrays in gathered:
            part = self._new_state()
            part.load_state_dict(arrays)
            total = total + part
        return total


class MeanIoU(StreamingMetric):
    """Semantic scores: mean IoU, frequency-weighted IoU, mean and pixel accuracy (`ConfusionMatrix`).

    Args:
        num_classes: K.
        ignore_index: the label of reference pixels that are left out.
        **kwargs: as of `StreamingMetric`.
    """

    def __init__(
        self, config_name: str | None = None, *, num_classes: int, ignore_index: int = 255, **kwargs: Any
    ):
        self.num_classes, self.ignore_index = num_classes, ignore_index
        super().__init__(config_name, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean intersection over union and its relatives, from one confusion matrix.",
            citation="",
            inputs_description="""
            predictions: (B, H, W) integer array or tensor of class indices, or a list of (H, W) ones of any sizes.
            references: as predictions, with `ignore_index` where a pixel is left out.
            """,
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()}),
        )

    def _new_state(self) -> ConfusionMatrix:
        return ConfusionMatrix(self.num_classes, self.ignore_index)

    def _measure(self, predictions: Any, references: Any) -> list[Any]:
        if hasattr(predictions, "shape") and hasattr(references, "shape"):
            return [self.state.measure(predictions, references)]
        return [self.state.measure(*pair) for pair in zip(predictions, references, strict=True)]


class PanopticQualityMetric(StreamingMetric):
    """Panoptic, segmentation and recognition quality (`PanopticQuality`).

    Args:
        num_classes: K.
        is_thing: (K,) whether each class is a thing; None if that is not known.
        **kwargs: as of `StreamingMetric`.
    """

    def __init__(
        self,
        config_name: str | None = None,
        *,
        num_classes: int,
        is_thing: Sequence[bool] | None = None,
        **kwargs: Any,
    ):
        self.num_classes, self.is_thing = num_classes, is_thing
        super().__init__(config_name, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        def segments(**names: datasets.Value) -> dict[str, Any]:
            one = {"id": datasets.Value("int32"), **names}
            return {"segmentation": datasets.Image(), "segments_info": datasets.List(one)}

        features = {
            "predictions": segments(label_id=datasets.Value("int32")),
            "references": segments(category_id=datasets.Value("int32"), iscrowd=datasets.Value("bool")),
        }
        return evaluate.MetricInfo(
            description="Panoptic quality with COCO's rules for crowds and void.",
            citation="",
            inputs_description="""
            predictions: a list of {"segmentation": (H, W) ids, 0 where there is none, "segments_info": [{"id",
                "label_id"}, ...]}, as `post_process_panoptic_segmentation` gives them.
            references: a list of {"segmentation": (H, W) ids, 0 = void, "segments_info": [{"id", "category_id",
                "iscrowd" (optional)}, ...]}.
            """,
            features=datasets.Features(features),
        )

    def _new_state(self) -> PanopticQuality:
        return PanopticQuality(self.num_classes, self.is_thing)

    def _measure(self, predictions: Any, references: Any) -> list[Any]:
        return [
            self.state.measure(*_values(predicted, SEGMENTS), *_values(referred, SEGMENTS))
            for predicted, referred in zip(predictions, references, strict=True)
        ]


class MaskAP(StreamingMetric):
    """COCO's average precision and recall of masks (`MaskAveragePrecision`).

    Args:
        num_classes: K.
        **kwargs: as of `StreamingMetric`.
    """

    def __init__(self, config_name: str | None = None, *, num_classes: int, **kwargs: Any):
        self.num_classes = num_classes
        super().__init__(config_name, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        masks = {"labels": datasets.List(datasets.Value("int32")), "masks": datasets.List(datasets.Image())}
        features = {
            "predictions": {"scores": datasets.List(datasets.Value("float64")), **masks},
            "references": {"image_id": datasets.Value("string"), **masks},
        }
        return evaluate.MetricInfo(
            description="Average precision and recall of masks, as pycocotools computes them.",
            citation="",
            inputs_description="""
            predictions: a list of {"scores": (n,), "labels": (n,), "masks": (n, H, W) bool}.
            references: a list of {"image_id": int or str, "labels": (m,), "masks": (m, H, W) bool, "iscrowd": (m,)
                (optional), "areas": (m,) (optional)}.
            """,
            features=datasets.Features(features),
        )

    def _new_state(self) -> MaskAveragePrecision:
        return MaskAveragePrecision(self.num_classes)

    def _measure(self, predictions: Any, references: Any) -> list[Any]:
        ids = [_values(referred, ("image_id",))[0] for referred in references]
        twice = {image_id for image_id in ids if ids.count(image_id) > 1}
        if twice:
            raise ValueError(f"image {sorted(twice)[0]} comes several times in one batch")
        return [
            self.state.measure(
                image_id,
                *_values(predicted, ("scores", "labels", "masks")),
                *_values(referred, ("labels", "masks")),
                referred.get("iscrowd"),
                referred.get("areas"),
            )
            for image_id, predicted, referred in zip(ids, predictions, references, strict=True)
        ]


SEGMENTS = ("segmentation", "segments_info")


def _values(example: Mapping[str, Any], names: Iterable[str]) -> list[Any]:
    missing = [name for name in names if name not in example]
    if missing:
        raise ValueError(f"an example has no {', '.join(missing)}; it has {', '.join(sorted(example))}")
    return [example[name] for name in names]
