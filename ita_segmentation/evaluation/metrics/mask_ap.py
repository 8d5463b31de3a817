"""Average precision of masks as COCO defines it (Lin et al., arXiv 1405.0312), computed by `pycocotools`.

Masks are kept run-length encoded, so many processes can gather them, and each class is evaluated by itself, so the
memory of the evaluation does not grow with the number of classes. IoU and area do not depend on the scan order: masks
are encoded row by row (as images of W x H), which avoids transposing them.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from ita_segmentation.evaluation.metrics.base import ArrayStateMetric, as_integers, check_labels, class_groups

MAX_DETECTIONS = (1, 10, 100)  # of each class in an image
NUM_THRESHOLDS, NUM_RECALLS = 10, 101  # IoU 0.50:0.95, and where precision is read
ALL, SMALL, MEDIUM, LARGE = range(4)  # ranges of area
COLUMNS = ("image", "is_reference", "label", "score", "area", "crowd", "height", "width", "length")


class MaskAveragePrecision(ArrayStateMetric):
    """Detected and reference masks of many images, and COCO's scores.

    Args:
        num_classes: K, at least 1.
        **kwargs: as for `torchmetrics.Metric`.
    """

    image_ids: list[Tensor]
    records: list[Tensor]
    encodings: list[Tensor]

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(num_classes, **kwargs)
        self.add_rows("image_ids", torch.int64)
        self.add_rows("records", torch.float64, len(COLUMNS))
        self.add_rows("encodings", torch.uint8)

    def update(
        self,
        image_id: int,
        scores: Any,
        labels: Any,
        masks: Any,
        reference_labels: Any,
        reference_masks: Any,
        reference_crowd: Any = None,
        reference_areas: Any = None,
    ) -> None:
        """Count the detections of one image.

        Args:
            image_id: decides the order of detections with equal scores; each image has its own.
            scores: (n,) finite floats, in any order.
            labels: (n,) class indices.
            masks: (n, H, W) bool or integer array or tensor, or a list of (H, W) ones or of COCO run-length encodings.
            reference_labels: (m,) class indices.
            reference_masks: m masks, like `masks`.
            reference_crowd: (m,) whether each is a crowd; None: none is.
            reference_areas: (m,) areas in pixels that decide the area range; None: the masks' own.

        Raises:
            ValueError: something does not fit; nothing is counted then.
        """
        found, size = encode_masks(masks, "prediction")
        known, known_size = encode_masks(reference_masks, "reference")
        if found and known and size != known_size:
            raise ValueError(f"prediction masks have size {size}, reference masks {known_size}")
        score = _per_mask(scores, len(found), "scores", 0.0)
        if not np.isfinite(score).all():
            raise ValueError(f"prediction holds the score {score[~np.isfinite(score)][0]}")
        rows = np.zeros((len(found) + len(known), len(COLUMNS)))
        columns = dict(zip(COLUMNS, rows.T, strict=True))
        detections, references = slice(0, len(found)), slice(len(found), None)
        columns["image"][:] = image_id
        columns["is_reference"][references] = 1
        columns["label"][detections] = self._labels(labels, len(found), "prediction")
        columns["label"][references] = self._labels(reference_labels, len(known), "reference")
        columns["score"][detections] = score
        areas = coco_mask.area(found + known) if len(rows) else np.zeros(0)
        columns["area"][:] = areas
        columns["area"][references] = _per_mask(
            reference_areas, len(known), "reference_areas", areas[references]
        )
        columns["crowd"][references] = _per_mask(reference_crowd, len(known), "reference_crowd", False)
        columns["height"][:], columns["width"][:] = size if found else known_size
        columns["length"][:] = [len(one["counts"]) for one in found + known]
        counts = b"".join(one["counts"] for one in found + known)
        self.append_rows("image_ids", np.array([image_id], dtype=np.int64))
        self.append_rows("records", rows)
        self.append_rows("encodings", np.frombuffer(counts, dtype=np.uint8).copy())

    def compute(self, seen: Sequence[bool] | None = None) -> dict[str, Any]:
        """Return all scores in [0, 1], NaN where no reference decides one (COCO's -1).

        `ap`, `ap50`, `ap75`, `aps`, `apm`, `apl` (small, medium and large masks), `ar1`, `ar10`, `ar100`, `ars`, `arm`,
        `arl`: means over the classes that have a reference; `num_classes_counted`, how many these are; `per_class_ap`,
        (K,) float64. With `seen` (K,), whether masks of each class were in training, also `ap_seen`, `ap_unseen`,
        `num_seen_counted`, `num_unseen_counted`. Raises ValueError if an image was counted twice.
        """
        groups = class_groups(seen, self.num_classes)
        precision, recall = self._curves()
        best = precision[..., ALL, -1]  # (T, R, K), at 100 detections
        counted = (best > -1).any(axis=(0, 1))
        scores: dict[str, Any] = {
            "ap": _mean(best),
            "ap50": _mean(best[0]),
            "ap75": _mean(best[5]),
            "aps": _mean(precision[..., SMALL, -1]),
            "apm": _mean(precision[..., MEDIUM, -1]),
            "apl": _mean(precision[..., LARGE, -1]),
            "ar1": _mean(recall[..., ALL, 0]),
            "ar10": _mean(recall[..., ALL, 1]),
            "ar100": _mean(recall[..., ALL, 2]),
            "ars": _mean(recall[..., SMALL, -1]),
            "arm": _mean(recall[..., MEDIUM, -1]),
            "arl": _mean(recall[..., LARGE, -1]),
            "num_classes_counted": int(counted.sum()),
        }
        for name, group in groups.items():
            scores[f"ap_{name}"] = _mean(best[..., group])
            scores[f"num_{name}_counted"] = int((counted & group).sum())
        scores["per_class_ap"] = np.array([_mean(best[..., label]) for label in range(self.num_classes)])
        return scores

    def _curves(self) -> tuple[np.ndarray, np.ndarray]:
        """Evaluate each class: precision (T, R, K, A, M) and recall (T, K, A, M), -1 without a reference."""
        state = self.arrays()
        ids, times = np.unique(state["image_ids"], return_counts=True)
        if (times > 1).any():
            raise ValueError(f"image {ids[times > 1][0]} was counted more than once")
        records = state["records"]
        ends = np.cumsum(records[:, COLUMNS.index("length")].astype(np.int64))
        label = records[:, COLUMNS.index("label")]
        is_reference = records[:, COLUMNS.index("is_reference")] == 1
        shape = self.num_classes, 4, len(MAX_DETECTIONS)
        precision = -np.ones((NUM_THRESHOLDS, NUM_RECALLS, *shape))
        recall = -np.ones((NUM_THRESHOLDS, *shape))
        for k in np.unique(label[is_reference]).astype(int):
            rows = np.flatnonzero(label == k)
            annotations = [_annotation(records[row], ends[row], state["encodings"], row + 1) for row in rows]
            precision[:, :, k], recall[:, k] = _evaluate_class(annotations, is_reference[rows])
        return precision, recall

    def _labels(self, labels: Any, number: int, role: str) -> np.ndarray:
        array = as_integers(labels, role) if len(labels) else np.zeros(0, np.int64)
        if array.shape != (number,):
            raise ValueError(f"{role} has {number} masks and labels of shape {array.shape}")
        check_labels(array, self.num_classes, role)
        return array


def _annotation(record: np.ndarray, end: int, encodings: np.ndarray, number: int) -> dict[str, Any]:
    """Return a record as COCO writes it."""
    one = dict(zip(COLUMNS, record.tolist(), strict=True))
    counts = encodings[end - int(one["length"]) : end].tobytes()
    size = [int(one["width"]), int(one["height"])]
    return {
        "id": number,
        "image_id": int(one["image"]),
        "category_id": 1,
        "score": one["score"],
        "area": one["area"],
        "iscrowd": int(one["crowd"]),
        "bbox": [0, 0, 1, 1],
        "segmentation": {"size": size, "counts": counts},
    }


def _evaluate_class(
    annotations: list[dict[str, Any]], is_reference: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return precision (T, R, A, M) and recall (T, A, M) of the annotations of one class."""
    sizes = {one["image_id"]: one["segmentation"]["size"] for one in annotations}
    images = [{"id": image, "height": size[0], "width": size[1]} for image, size in sorted(sizes.items())]
    cocos = []
    for wanted in (True, False):
        coco = COCO()
        chosen = [annotations[i] for i in np.flatnonzero(is_reference == wanted)]
        coco.dataset = {"images": images, "categories": [{"id": 1}], "annotations": chosen}
        cocos.append(coco)
    with contextlib.redirect_stdout(None):  # pycocotools prints
        for coco in cocos:
            coco.createIndex()
        evaluation = COCOeval(*cocos, iouType="segm")
        evaluation.params.maxDets = list(MAX_DETECTIONS)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][:, :, 0], evaluation.eval["recall"][:, 0]


def encode_masks(masks: Any, role: str) -> tuple[list[dict[str, Any]], tuple[int, int]]:
    """Run-length encode the masks of one image, row by row.

    Masks are (n, H, W) bool or integer (anything but 0 is inside), or a sequence of (H, W) ones or of COCO run-length
    encodings. Returns n encodings {"size": [W, H], "counts": bytes}, and (H, W), (0, 0) without masks.
    """
    if len(masks) == 0:
        return [], (0, 0)
    if not hasattr(masks, "shape"):
        masks = [_decode(mask) for mask in masks]
        sizes = sorted({mask.shape for mask in masks})
        if len(sizes) > 1:
            raise ValueError(f"{role} masks have different sizes: {', '.join(map(str, sizes))}")
        masks = np.stack(masks)
    array = masks.detach().cpu().numpy() if hasattr(masks, "detach") else masks
    if array.ndim != 3:
        raise ValueError(f"each of the {role} masks must be (height, width), got shape {array.shape[1:]}")
    if array.dtype != np.bool_ and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{role} masks must be bool or integer, got {array.dtype}")
    inside = np.ascontiguousarray(array if array.dtype == np.bool_ else array != 0).view(np.uint8)
    return coco_mask.encode(inside.transpose(2, 1, 0)), array.shape[1:]


def _decode(mask: Any) -> np.ndarray:
    if not isinstance(mask, Mapping):
        return mask.detach().cpu().numpy() if hasattr(mask, "detach") else np.asarray(mask)
    if isinstance(mask["counts"], (list, tuple)):
        mask = coco_mask.frPyObjects(dict(mask), *mask["size"])
    return coco_mask.decode(mask)


def _per_mask(values: Any, number: int, role: str, default: Any) -> np.ndarray:
    """Return (number,) values, or the default for each mask."""
    if values is None:
        return np.broadcast_to(default, (number,))
    array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=np.float64)
    if array.shape != (number,):
        raise ValueError(f"{role} has shape {array.shape} for {number} masks")
    return array


def _mean(values: np.ndarray) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else float("nan")
