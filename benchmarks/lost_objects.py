"""Where ground-truth things get lost: for a checkpoint on any prepared benchmark, seen and unseen classes apart.

    python benchmarks/lost_objects.py --model models/ita-tiny --limit 200

A thing is found if a panoptic segment of its class overlaps it by an IoU over 0.5. Of the things for which some query
has a mask that good (IoU over 0.5), the rest are lost because all these queries are void, because the score is not
above the threshold, to a wrong class, or to another query that won the pixels. Prints a Markdown table.
"""

from collections import Counter
from typing import Any

import numpy as np
import torch
from dominant_categories import benchmark_parser, load
from torch import Tensor
from torch.nn import functional as F

from ita_segmentation.evaluation.evaluator import decode_sample

OUTCOMES = ("found", "void", "threshold", "wrong class", "overlap")


def mask_ious(masks: Tensor, truth: Tensor) -> Tensor:
    """IoU of each of (Q, H, W) masks with each of (n, H, W): (Q, n)."""
    masks, truth = masks.flatten(1).float(), truth.flatten(1).float()
    overlap = masks @ truth.T
    return overlap / (masks.sum(1, keepdim=True) + truth.sum(1) - overlap).clamp(min=1)


def outcome(
    log_probs: Tensor, good: Tensor, category: int, overlaps: Tensor, labels: list[int], threshold: float
) -> str:
    """Say what became of a thing.

    Args:
        log_probs: (Q, K + 1) of the queries, void last.
        good: (Q,) bool, queries whose mask is good; at least one.
        category: the thing's class.
        overlaps: (S,) IoU of each predicted segment with the thing.
        labels: (S,) the segments' classes.
        threshold: least score of a segment.
    """
    if any(float(iou) > 0.5 and label == category for iou, label in zip(overlaps, labels, strict=True)):
        return "found"
    scores, classes = log_probs[good].exp().max(dim=-1)
    kept = classes != log_probs.shape[-1] - 1
    if not kept.any():
        return "void"
    kept &= scores > threshold
    if not kept.any():
        return "threshold"
    return "overlap" if (classes[kept] == category).any() else "wrong class"


def count_image(
    model: Any, processor: Any, sample: dict[str, Any], benchmark: Any, threshold: float, counts: Counter
) -> None:
    """Count what became of an image's things, by (is seen, outcome), and of those under 32 x 32 pixels apart."""
    seen = benchmark.seen or [True] * len(benchmark.classes)
    stuff = {index for index, is_thing in enumerate(benchmark.is_thing) if not is_thing}
    things = [one for one in sample["segments"] if one["category_id"] not in stuff]
    if not things:
        return
    size = sample["panoptic"].shape
    outputs = model(**processor(images=[sample["image"]], return_tensors="pt"), vocabulary=benchmark.classes)
    height, width = (int(side) for side in outputs.image_sizes[0])
    logits = F.interpolate(
        outputs.masks_queries_logits, scale_factor=4, mode="bilinear", align_corners=False
    )[:, :, :height, :width]
    masks = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0] > 0
    truth = torch.stack([torch.from_numpy(np.asarray(sample["panoptic"] == one["id"])) for one in things])
    [found] = processor.post_process_panoptic_segmentation(
        outputs, threshold=threshold, label_ids_to_fuse=stuff, target_sizes=[size]
    )
    segments = found["segments_info"]
    predicted = [found["segmentation"] == one["id"] for one in segments]
    overlaps = mask_ious(torch.stack(predicted), truth) if predicted else truth.new_zeros(0, len(truth))
    labels = [one["label_id"] for one in segments]
    good = mask_ious(masks, truth) > 0.5
    for index, thing in enumerate(things):
        category = thing["category_id"]
        groups = [("all", seen[category])]
        if int(truth[index].sum()) < 32 * 32:
            groups.append(("small", seen[category]))
        own = good[:, index]
        result = "no good mask"
        if own.any():
            result = outcome(
                outputs.class_queries_logits[0], own, category, overlaps[:, index], labels, threshold
            )
        counts.update((*group, result) for group in groups)


def main() -> None:
    parser = benchmark_parser(__doc__ or "", limit=200)
    parser.add_argument("--threshold", type=float, default=0.0, help="least score of a panoptic segment")
    arguments = parser.parse_args()
    model, processor, benchmark = load(parser, arguments)
    if "panoptic" not in benchmark.tasks or benchmark.is_thing is None:
        parser.error("this benchmark has no panoptic ground truth")
    counts = Counter[Any]()
    with torch.inference_mode():
        for _, row in zip(range(arguments.limit), benchmark.rows(), strict=False):
            sample = decode_sample(benchmark, row)
            count_image(model, processor, sample, benchmark, arguments.threshold, counts)
    print(
        f"| things | number | with a good mask | {' | '.join(OUTCOMES)} |\n|{' --- |' * (3 + len(OUTCOMES))}"
    )
    for size in ("all", "small"):
        for group in (True, False):
            own = {result: counts[size, group, result] for result in (*OUTCOMES, "no good mask")}
            total = sum(own.values())
            good = total - own["no good mask"]
            shares = " | ".join(f"{own[name] / max(good, 1):.1%}" for name in OUTCOMES)
            name = f"{'seen' if group else 'unseen'}{', under 32 x 32 px' if size == 'small' else ''}"
            if total:
                print(f"| {name} | {total} | {good / total:.1%} | {shares} |")


if __name__ == "__main__":
    main()
