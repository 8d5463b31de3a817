"""Mean intersection over union from one confusion matrix over a whole data set.

The score of the field (Everingham et al., PASCAL VOC 2010, section 4.3; Long et al., arXiv 1411.4038, section 5):
pixels of all images are counted into one K x K matrix, and every score is read off that matrix at the end. The
matrix is a sum of integers, so images may come in any order, batches of any size, and several processes add theirs
up. Scores are computed in the order of operations of detectron2's evaluator, so that they are the same floats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ita_segmentation.evaluation.metrics.label_maps import as_integers, checked_state, class_flags, run_ends

CHUNK_PIXELS = 1 << 18  # so many pixels are counted at a time: their copies stay in the processor's cache
SAMPLE_PIXELS = 1 << 14  # of which tell whether the rest is flat
MAX_SHARE_OF_RUNS = 1 / 8  # maps with more runs than this share of their pixels are counted pixel by pixel


@dataclass(frozen=True)
class PixelPairs:
    """Pixels of (reference class, predicted class) in some maps of K classes: what one update adds.

    Attributes:
        cells: (n,) flat indices into the (K, K) matrix; one may come several times.
        pixels: (n,) int64, of each of these.
        table: (K, K) int64 further pixels, or None.
        num_wrong: pixels that are not ignored and whose reference or predicted label is no class.
    """

    cells: np.ndarray
    pixels: np.ndarray
    table: np.ndarray | None
    num_wrong: int


class ConfusionMatrix:
    """Pixel counts of (reference class, predicted class), and the scores that follow from them.

    Attributes:
        matrix: (K, K) int64; row = reference class, column = predicted class, entry = number of pixels.

    Args:
        num_classes: K, at least 1.
        ignore_index: the reference label of pixels that are left out; not a class index.

    Raises:
        ValueError: if `num_classes` is below 1 or `ignore_index` is one of the classes.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255):
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if 0 <= ignore_index < num_classes:
            raise ValueError(f"ignore_index {ignore_index} is the index of a class (there are {num_classes})")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.matrix = np.zeros((num_classes, num_classes), dtype=np.int64)

    def update(self, prediction: Any, reference: Any) -> None:
        """Counts the pixels of one image, or of a batch.

        Args:
            prediction: class indices, any integer dtype and shape (array or tensor, on any device); what it says
                on ignored pixels does not matter. If it or the reference is on an accelerator, that counts.
            reference: class indices or `ignore_index`, same shape.

        Raises:
            ValueError: if shapes differ, a dtype is not integer, or a label on a counted pixel is not in
                [0, num_classes). Nothing is counted then.
        """
        self.accumulate(self.measure(prediction, reference))

    def measure(self, prediction: Any, reference: Any) -> PixelPairs:
        """What `update` would add, checked: arguments and errors as there."""
        device = _accelerator(prediction, reference)
        if device is None:
            labels = [as_integers(prediction, "prediction"), as_integers(reference, "reference")]
            _check_shapes(*labels)
            pairs = _count_pairs(
                labels[0].reshape(-1), labels[1].reshape(-1), self.num_classes, self.ignore_index
            )
        else:
            tensors = [_integer_tensor(prediction, "prediction"), _integer_tensor(reference, "reference")]
            _check_shapes(*tensors)
            moved = [tensor.to(device) for tensor in tensors]
            pairs = _count_pairs_on_device(moved[0], moved[1], self.num_classes, self.ignore_index)
        if pairs.num_wrong:
            self._refuse(as_integers(prediction, "prediction"), as_integers(reference, "reference"))
        return pairs

    def accumulate(self, pairs: PixelPairs) -> None:
        """Adds what `measure` found."""
        self.matrix = np.ascontiguousarray(self.matrix)
        np.add.at(self.matrix.reshape(-1), pairs.cells, pairs.pixels)
        if pairs.table is not None:
            self.matrix += pairs.table

    def _refuse(self, prediction: np.ndarray, reference: np.ndarray) -> None:
        """Raises the error that names the label which is no class."""
        counted = reference != self.ignore_index
        for role, labels in (("prediction", prediction[counted]), ("reference", reference[counted])):
            lowest, highest = int(labels.min()), int(labels.max())
            if lowest < 0 or highest >= self.num_classes:
                raise ValueError(
                    f"{role} holds label {lowest if lowest < 0 else highest}, outside the {self.num_classes} "
                    f"classes 0..{self.num_classes - 1} (ignore_index is {self.ignore_index})"
                )

    def state_dict(self) -> dict[str, np.ndarray]:
        """{"matrix": (K, K) int64}; the states of several processes add up entry by entry."""
        return {"matrix": self.matrix.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave.

        Raises:
            ValueError: if it is of another number of classes, or no such state.
        """
        arrays = checked_state(state, {"matrix": self.matrix.shape})
        self.matrix = arrays["matrix"].astype(np.int64)

    def __add__(self, other: ConfusionMatrix) -> ConfusionMatrix:
        if (self.num_classes, self.ignore_index) != (other.num_classes, other.ignore_index):
            raise ValueError("confusion matrices of different classes or ignore indices do not add up")
        total = ConfusionMatrix(self.num_classes, self.ignore_index)
        total.matrix = self.matrix + other.matrix
        return total

    def compute(self, seen: Sequence[bool] | None = None) -> dict[str, Any]:
        """All scores, each in [0, 1]; nan where no pixel speaks for one.

        Classes with neither ground truth nor prediction are left out of the means of IoU; classes without ground
        truth are left out of the mean accuracy, and of `miou_present`.

        Args:
            seen: (K,) whether each class's masks were seen in training; adds the means over both groups.

        Returns:
            `miou`, `fwiou` (IoU weighted by each class's share of the reference pixels), `macc`, `pacc`,
            `miou_present` (over classes with ground truth): float; `num_classes_counted`, `num_classes_present`:
            int; `per_class_iou`, `per_class_acc`: (K,) float64 arrays, nan for classes left out; and with `seen`:
            `miou_seen`, `miou_unseen`, `num_seen_counted`, `num_unseen_counted`.

        Raises:
            ValueError: if `seen` has not one entry for each class.
        """
        hits = np.diag(self.matrix).astype(np.float64)
        referred = self.matrix.sum(axis=1).astype(np.float64)
        union = referred + self.matrix.sum(axis=0).astype(np.float64) - hits
        counted, present = union > 0, referred > 0
        iou, accuracy = _ratio(hits, union), _ratio(hits, referred)
        share = referred / referred.sum() if present.any() else referred
        scores: dict[str, Any] = {
            "miou": _mean(iou[present], counted),
            "miou_present": _mean(iou[present], present),
            "fwiou": float((iou[present] * share[present]).sum()) if present.any() else float("nan"),
            "macc": _mean(accuracy[present], present),
            "pacc": float(hits.sum() / referred.sum()) if present.any() else float("nan"),
            "per_class_iou": iou,
            "per_class_acc": accuracy,
            "num_classes_counted": int(counted.sum()),
            "num_classes_present": int(present.sum()),
        }
        if seen is not None:
            is_seen = class_flags(seen, self.num_classes, "seen")
            for name, group in (("seen", is_seen), ("unseen", ~is_seen)):
                scores[f"miou_{name}"] = _mean(iou[group & present], group & counted)
                scores[f"num_{name}_counted"] = int((group & counted).sum())
        return scores


# ------------------------------------------------------------------------------------------------------ counting


def _count_pairs(
    predicted: np.ndarray, referred: np.ndarray, num_classes: int, ignore_index: int
) -> PixelPairs:
    """Counts (n,) labels: runs where the maps are flat, and single pixels where they are not."""
    step = max(
        CHUNK_PIXELS, 4 * (num_classes + 1) ** 2
    )  # a table of all pairs is then cheap beside the pixels
    runs, table, num_wrong = [], None, 0
    for start in range(0, len(referred), step):
        chunk = predicted[start : start + step], referred[start : start + step]
        sample = _changes(*(labels[:SAMPLE_PIXELS] for labels in chunk))
        if np.count_nonzero(sample) <= MAX_SHARE_OF_RUNS * len(sample):
            ends, lengths = run_ends(_changes(*chunk))
            runs.append((chunk[0][ends], chunk[1][ends], lengths))
        else:
            counts = _count_pixels(*chunk, num_classes)
            num_wrong -= int(np.count_nonzero(chunk[1] == ignore_index))
            table = counts if table is None else table + counts
    cells, pixels, num_wrong_in_runs = _count_runs(runs, num_classes, ignore_index)
    if table is not None:
        num_wrong += int(table[num_classes].sum() + table[:num_classes, num_classes].sum())
        table = table[:num_classes, :num_classes]
    return PixelPairs(cells, pixels, table, num_wrong + num_wrong_in_runs)


def _changes(predicted: np.ndarray, referred: np.ndarray) -> np.ndarray:
    """(n - 1,) bool, whether the next pixel has another label in either map."""
    return (predicted[1:] != predicted[:-1]) | (referred[1:] != referred[:-1])


def _count_runs(
    runs: list[tuple[np.ndarray, np.ndarray, np.ndarray]], num_classes: int, ignore_index: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """`cells`, `pixels` and `num_wrong` of `PixelPairs` from runs' predicted and reference labels and lengths."""
    columns, rows, lengths = (
        np.concatenate([np.zeros(0, np.int64), *(part.astype(np.int64) for part in parts)])
        for parts in (zip(*runs, strict=True) if runs else ((), (), ()))
    )
    counted = np.flatnonzero(rows != ignore_index)
    columns, rows, lengths = columns[counted], rows[counted], lengths[counted]
    wrong = (rows < 0) | (rows >= num_classes) | (columns < 0) | (columns >= num_classes)
    return rows * num_classes + columns, lengths, int(lengths[wrong].sum())


def _count_pixels(predicted: np.ndarray, referred: np.ndarray, num_classes: int) -> np.ndarray:
    """(K + 1, K + 1) int64 pixels of each pair of labels; all that are no class count as K."""
    width = num_classes + 1
    dtype = np.min_scalar_type(-(width**2))  # the smallest that is signed, which is what torch counts
    keys = _codes(referred, num_classes, dtype)
    keys *= dtype.type(width)
    keys += _codes(predicted, num_classes, dtype)
    return torch.bincount(torch.from_numpy(keys), minlength=width**2).numpy().reshape(width, width)


def _codes(labels: np.ndarray, num_classes: int, dtype: np.dtype) -> np.ndarray:
    """A copy of labels in which all that are no class are `num_classes`.

    A negative label is a huge one if its bits are read as an unsigned integer.
    """
    codes = labels.view(f"u{labels.itemsize}")
    highest = codes.max()
    if highest > num_classes:
        if codes.itemsize > 2 and highest <= 0xFFFF:
            codes = codes.astype(np.uint16)
        codes = np.minimum(codes, np.full(codes.shape, num_classes, codes.dtype))
    return codes.astype(dtype)


def _count_pairs_on_device(
    prediction: Tensor, reference: Tensor, num_classes: int, ignore_index: int
) -> PixelPairs:
    """As `_count_pairs`, for tensors of any shape on one device, which does the counting."""
    width = num_classes + 1
    rows, columns = (
        torch.where((labels >= 0) & (labels < num_classes), labels.long(), num_classes).flatten()
        for labels in (reference, prediction)
    )
    table = torch.bincount(rows * width + columns, minlength=width**2).cpu().numpy().reshape(width, width)
    num_without_class = table[num_classes].sum() + table[:num_classes, num_classes].sum()
    num_wrong = int(num_without_class) - int((reference == ignore_index).sum())
    nothing = np.zeros(0, np.int64)
    return PixelPairs(nothing, nothing, table[:num_classes, :num_classes], num_wrong)


def _accelerator(*labels: Any) -> torch.device | None:
    """The first device that is not the processor's, if a tensor is on one."""
    devices = (item.device for item in labels if isinstance(item, Tensor))
    return next((device for device in devices if device.type != "cpu"), None)


def _integer_tensor(labels: Any, role: str) -> Tensor:
    if not isinstance(labels, Tensor):
        return torch.from_numpy(as_integers(labels, role).astype(np.int64))
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{role} must hold integer labels, got {labels.dtype}")
    return labels.detach()


def _check_shapes(prediction: Any, reference: Any) -> None:
    if prediction.shape != reference.shape:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)}, reference {tuple(reference.shape)}"
        )


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Elementwise numerator / denominator, nan where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0)


def _mean(values: np.ndarray, counted: np.ndarray) -> float:
    """The sum over as many classes as are counted; a class that is counted and has no value adds 0."""
    number = int(counted.sum())
    return float(values.sum() / number) if number else float("nan")
