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

from evaluation_ita.label_maps import as_integers, checked_state, class_flags, run_ends

CHUNK_PIXELS = 1 << 18  # so many pixels are counted at a time: their copies stay in the processor's cache
MAX_SHARE_OF_RUNS = 1 / 8  # maps with more runs than this share of their pixels are counted pixel by pixel


@dataclass(frozen=True)
class PixelPairs:
    """Pixels of (reference class, predicted class) in some maps of K classes: what one update adds.

    Attributes:
        cells: (n,) flat indices into the (K, K) matrix; one may come several times.
        pixels: (n,) int64, of each of these.
        table: (K, K) int64 further pixels, or None.
        num_without_reference: pixels whose reference label is no class.
        num_without_prediction: pixels whose reference label is a class and whose predicted label is none.
    """

    cells: np.ndarray
    pixels: np.ndarray
    table: np.ndarray | None
    num_without_reference: int
    num_without_prediction: int


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
            predicted, referred = as_integers(prediction, "prediction"), as_integers(reference, "reference")
            _check_shapes(predicted, referred)
            pairs = _count_pairs(predicted.reshape(-1), referred.reshape(-1), self.num_classes)
            num_ignored = int(np.count_nonzero(referred == self.ignore_index))
        else:
            predicted_on, referred_on = (
                _integer_tensor(labels, role).to(device)
                for labels, role in ((prediction, "prediction"), (reference, "reference"))
            )
            _check_shapes(predicted_on, referred_on)
            pairs = _count_pairs_on_device(predicted_on, referred_on, self.num_classes)
            num_ignored = int((referred_on == self.ignore_index).sum())
        if pairs.num_without_reference != num_ignored or pairs.num_without_prediction:
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


def _count_pairs(predicted: np.ndarray, referred: np.ndarray, num_classes: int) -> PixelPairs:
    """Counts (n,) labels: runs where the maps are flat, and single pixels where they are not."""
    width = max(num_classes + 1, 256)
    step = max(CHUNK_PIXELS, 4 * width**2)  # a table of all pairs is then cheap, compared with the pixels
    keys, pixels, table = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], None
    for start in range(0, len(referred), step):
        chunk = slice(start, start + step)
        found = _pair_keys(predicted[chunk], referred[chunk], num_classes, width)
        changed = found[1:] != found[:-1]
        if np.count_nonzero(changed) <= MAX_SHARE_OF_RUNS * len(found):
            ends, lengths = run_ends(changed)
            keys.append(found[ends])
            pixels.append(lengths)
        else:
            signed = found.astype(np.int32) if found.dtype == np.uint16 else found
            counts = torch.bincount(torch.from_numpy(signed), minlength=width**2).numpy()
            table = counts if table is None else table + counts
    return _checked_pairs(np.concatenate(keys), np.concatenate(pixels), table, num_classes, width)


def _pair_keys(predicted: np.ndarray, referred: np.ndarray, num_classes: int, width: int) -> np.ndarray:
    """(n,) reference code * width + predicted code, in the smallest dtype that is quick to count."""
    dtype = np.uint16 if width <= 256 else np.min_scalar_type(-(width**2))
    keys = np.multiply(_codes(referred, num_classes), width, dtype=dtype, casting="unsafe")
    return np.add(keys, _codes(predicted, num_classes), out=keys, casting="unsafe")


def _checked_pairs(
    keys: np.ndarray, pixels: np.ndarray, table: np.ndarray | None, num_classes: int, width: int
) -> PixelPairs:
    """Parts the pairs of two classes from those with a label that is none."""
    rows = keys // width
    columns = keys - rows * width
    referred, predicted = rows < num_classes, columns < num_classes
    both = referred & predicted
    num_without_reference = int(pixels[~referred].sum())
    num_without_prediction = int(pixels[referred & ~predicted].sum())
    if table is not None:
        table = table.reshape(width, width)
        num_without_reference += int(table[num_classes:].sum())
        num_without_prediction += int(table[:num_classes, num_classes:].sum())
        table = table[:num_classes, :num_classes]
    cells = rows[both] * num_classes + columns[both]
    return PixelPairs(cells, pixels[both], table, num_without_reference, num_without_prediction)


def _codes(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Labels as unsigned integers, all that are no class as something from `num_classes` on.

    8-bit labels are their own codes. Others are brought to 16 bits where that loses nothing, and cut at
    `num_classes`; a negative label is a huge one if its bits are read as an unsigned integer.
    """
    codes = labels.view(f"u{labels.itemsize}")
    if codes.dtype == np.uint8:
        return codes
    if codes.itemsize > 2 and codes.max() <= 0xFFFF:
        codes = codes.astype(np.uint16)
    return np.minimum(codes, np.full(codes.shape, min(num_classes, 0xFFFF), codes.dtype))


def _count_pairs_on_device(prediction: Tensor, reference: Tensor, num_classes: int) -> PixelPairs:
    """As `_count_pairs`, for tensors of any shape on one device, which does the counting."""
    codes = [
        torch.where((labels >= 0) & (labels < num_classes), labels.long(), num_classes).flatten()
        for labels in (reference, prediction)
    ]
    width = num_classes + 1
    table = torch.bincount(codes[0] * width + codes[1], minlength=width**2).cpu().numpy()
    nothing = np.zeros(0, np.int64)
    return _checked_pairs(nothing, nothing, table, num_classes, width)


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
