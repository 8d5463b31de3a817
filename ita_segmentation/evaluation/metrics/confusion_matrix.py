"""Mean intersection over union from one confusion matrix over a whole dataset.

The score of the field (PASCAL VOC 2010, section 4.3; Long et al., arXiv 1411.4038, section 5). Pixels of all images are
counted in one K x K matrix; all scores follow from it. Two means of IoU are in use, and published tables rarely say
which one they report:

- over the classes that have ground truth (detectron2's main branch): `miou`, the headline here;
- over these and the classes that are only predicted, whose IoU is 0 (detectron2 0.6): `miou_with_predicted`.

Scores are computed in the order of operations of detectron2's evaluator, so they are the same floats.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ita_segmentation.evaluation.metrics.base import ArrayStateMetric, as_integers, check_labels, class_groups


class ConfusionMatrix(ArrayStateMetric):
    """Pixel counts of (reference class, predicted class), and the scores that follow from them.

    Attributes:
        matrix: (K, K) int64 tensor of pixels; rows are reference classes, columns predicted ones.

    Args:
        num_classes: K, at least 1.
        ignore_index: the reference label of ignored pixels; not a class index (ValueError).
        **kwargs: as for `torchmetrics.Metric`.
    """

    matrix: Tensor

    def __init__(self, num_classes: int, ignore_index: int = 255, **kwargs: Any) -> None:
        super().__init__(num_classes, **kwargs)
        if 0 <= ignore_index < num_classes:
            raise ValueError(f"ignore_index {ignore_index} is the index of a class (there are {num_classes})")
        self.ignore_index = ignore_index
        self.add_sum("matrix", num_classes, num_classes)

    def update(self, prediction: Any, reference: Any) -> None:
        """Count the pixels of one image or of a batch; see `count_pixels`."""
        self.matrix = self.matrix + count_pixels(
            prediction, reference, self.num_classes, self.ignore_index, self.device
        )

    def compute(self, seen: Sequence[bool] | None = None) -> dict[str, Any]:
        """Return all scores; see `iou_scores`."""
        return iou_scores(self.matrix.cpu().numpy(), seen)


def count_pixels(
    prediction: Any,
    reference: Any,
    num_classes: int,
    ignore_index: int = 255,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Count the pixels of each pair of classes: (K, K) int64 on `device`; rows are reference classes.

    Prediction and reference are class indices of any integer dtype and one shape, as array, tensor, image or nested
    lists; predictions are not read where the reference is `ignore_index`. Raises ValueError if shapes differ, a dtype
    is not an integer, or a label outside [0, K) is not ignored.
    """
    predicted, referred = (
        _integer_tensor(labels, role, device)
        for labels, role in ((prediction, "prediction"), (reference, "reference"))
    )
    if predicted.shape != referred.shape:
        raise ValueError(f"prediction has shape {tuple(predicted.shape)}, reference {tuple(referred.shape)}")
    counted = referred != ignore_index
    for labels, role in ((predicted, "prediction"), (referred, "reference")):
        if (counted & ((labels < 0) | (labels >= num_classes))).any():
            check_labels(labels[counted], num_classes, role, f" (ignore_index is {ignore_index})")
    ignored = num_classes**2
    pairs = torch.where(counted, referred * num_classes + predicted, ignored).flatten()
    return torch.bincount(pairs, minlength=ignored + 1)[:-1].view(num_classes, num_classes)


def iou_scores(matrix: np.ndarray, seen: Sequence[bool] | None = None) -> dict[str, Any]:
    """Compute the semantic scores of a confusion matrix (K, K), in [0, 1], NaN where no pixel decides one.

    `miou` (over classes with ground truth), `miou_with_predicted` (over these and classes that are only predicted),
    `fwiou` (weighted by each class's share of the reference pixels), `macc` and `pacc` (mean class accuracy, pixel
    accuracy); `num_classes_counted` and `num_classes_with_predicted`, how many classes the two means are over;
    `per_class_iou` and `per_class_acc`, (K,) float64. With `seen` (K,), whether masks of each class were in training,
    the two means and numbers again as `miou_seen`, `miou_unseen`, `num_seen_counted`, ...
    """
    true_positives = np.diag(matrix).astype(np.float64)
    referred = matrix.sum(axis=1).astype(np.float64)
    union = referred + matrix.sum(axis=0).astype(np.float64) - true_positives
    present, counted = referred > 0, union > 0
    iou, accuracy = _ratio(true_positives, union), _ratio(true_positives, referred)
    share = referred[present] / referred.sum()
    scores: dict[str, Any] = {}
    for group, members in {"": np.ones_like(present), **class_groups(seen, len(matrix))}.items():
        suffix = f"_{group}" if group else ""
        total = iou[members & present].sum()
        num_present, num_counted = int((members & present).sum()), int((members & counted).sum())
        scores[f"miou{suffix}"] = _mean(total, num_present)
        scores[f"miou{suffix}_with_predicted"] = _mean(total, num_counted)
        scores[f"num_{group or 'classes'}_counted"] = num_present
        scores[f"num_{group or 'classes'}_with_predicted"] = num_counted
    return scores | {
        "fwiou": float((iou[present] * share).sum()) if present.any() else float("nan"),
        "macc": _mean(accuracy[present].sum(), int(present.sum())),
        "pacc": float(true_positives.sum() / referred.sum()) if present.any() else float("nan"),
        "per_class_iou": iou,
        "per_class_acc": accuracy,
    }


def _integer_tensor(labels: Any, role: str, device: torch.device | str) -> Tensor:
    if not isinstance(labels, Tensor):
        return torch.from_numpy(as_integers(labels, role).astype(np.int64)).to(device)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{role} must hold integer labels, got {labels.dtype}")
    return labels.detach().to(device, torch.int64)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide elementwise; NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0)


def _mean(total: float, number: int) -> float:
    return float(total / number) if number else float("nan")
