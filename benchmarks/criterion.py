"""Time and memory of the training losses, beside transformers' `Mask2FormerLoss` on the same predictions.

    python benchmarks/criterion.py

The work: 2 images, 250 queries, 133 classes, 12 masks of 1024 x 1024 for each image, 10 predictions with mask
logits of 256 x 256, 12,544 points. Three works: the losses alone; with gradients of the mask logits; with
gradients of what the mask logits are products of, as in a training step: mask embeddings and mask features of 256
channels. Each criterion does each work in a process of its own, with its own random points; the best of several
steps counts. A further process gives both the same points and compares values. Memory is what the first step needs
above its inputs, the predictions included in those, by the kernel's own peak (Linux).
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modeling_ita.batching import SegmentOutput, matched_mask_logits
from modeling_ita.set_criterion import SetCriterion

IMAGES, QUERIES, CLASSES, MASKS, LAYERS = 2, 250, 133, 12, 10
MASK_SIZE, LOGIT_SIZE, CHANNELS, POINTS = 1024, 256, 256, 12544
WEIGHTS = {"ce": 2.0, "mask": 5.0, "dice": 5.0}
PUBLISHED_NAMES = {"ce": "loss_cross_entropy", "mask": "loss_mask", "dice": "loss_dice"}
SETTINGS = {
    "class_weight": WEIGHTS["ce"],
    "mask_weight": WEIGHTS["mask"],
    "dice_weight": WEIGHTS["dice"],
    "no_object_weight": 0.1,
    "train_num_points": POINTS,
    "oversample_ratio": 3.0,
    "importance_sample_ratio": 0.75,
}
SIDES = ("published", "ours")
WORKS = {
    "forward": "losses",
    "logits": "losses, gradients of mask logits",
    "factors": "losses, gradients of mask embeddings and features",
}

Losses = dict[str, Tensor]


@dataclass
class Batch:
    """Predictions and labels of a step; float32 throughout.

    Attributes:
        embeddings: (B, Q, C) of each prediction. features: (B, C, h, w). mask_logits: (B, Q, h, w), their products.
        class_logits: (B, Q, K + 1) of each prediction.
        mask_labels: (n, H, W) of each image. class_labels: (n,) int64 of each image.
        leaves: what gets gradients.
    """

    embeddings: list[Tensor]
    features: Tensor
    mask_logits: list[Tensor]
    class_logits: list[Tensor]
    mask_labels: list[Tensor]
    class_labels: list[Tensor]
    leaves: list[Tensor]


def make_batch(work: str) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def blobs(*shape: int, size: int) -> Tensor:
        noise = torch.randn(*shape, 16, 16, generator=generator)
        return F.interpolate(noise, size=(size, size), mode="bilinear")

    class_logits = [torch.randn(IMAGES, QUERIES, CLASSES + 1, generator=generator) for _ in range(LAYERS)]
    features = blobs(IMAGES, CHANNELS, size=LOGIT_SIZE)
    scale = 4 / CHANNELS**0.5
    embeddings = [scale * torch.randn(IMAGES, QUERIES, CHANNELS, generator=generator) for _ in range(LAYERS)]
    factors = [features, *embeddings]
    for tensor in (*class_logits, *(factors if work == "factors" else ())):
        tensor.requires_grad_()
    mask_logits = [torch.einsum("bqc,bchw->bqhw", one, features) for one in embeddings]
    if work == "logits":
        mask_logits = [logits.requires_grad_() for logits in mask_logits]
    segments = blobs(IMAGES, MASKS, size=MASK_SIZE).argmax(1)
    mask_labels = [torch.stack([(image == i).float() for i in range(MASKS)]) for image in segments]
    class_labels = list(torch.randint(CLASSES, (IMAGES, MASKS), generator=generator))
    leaves = [*class_logits, *(factors if work == "factors" else mask_logits)]
    return Batch(embeddings, features, mask_logits, class_logits, mask_labels, class_labels, leaves)


def published_losses() -> Callable[[Batch], Losses]:
    """transformers' criterion, its losses under our names and times their weights."""
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

    criterion = Mask2FormerLoss(SimpleNamespace(num_labels=CLASSES, **SETTINGS), {})  # type: ignore[arg-type]

    def losses(batch: Batch) -> Losses:
        earlier = [
            {"masks_queries_logits": masks, "class_queries_logits": classes}
            for classes, masks in zip(batch.class_logits[:-1], batch.mask_logits[:-1], strict=True)
        ]
        values = criterion(
            batch.mask_logits[-1], batch.class_logits[-1], batch.mask_labels, batch.class_labels, earlier
        )
        return {
            f"loss_{part}{suffix}": WEIGHTS[part] * values[f"{name}{suffix}"]
            for suffix in ("", *(f"_{i}" for i in range(LAYERS - 1)))
            for part, name in PUBLISHED_NAMES.items()
        }

    return losses


def our_losses(work: str) -> Callable[[Batch], Losses]:
    """This package's criterion, called as the model calls it where gradients go to the factors."""
    criterion = SetCriterion(SimpleNamespace(**SETTINGS))

    def losses(batch: Batch) -> Losses:
        part = SegmentOutput(
            batch.class_logits,
            batch.mask_logits,
            mask_embeds=batch.embeddings,
            mask_features=batch.features,
        )
        group: Any = SimpleNamespace(indices=[*range(IMAGES)])
        matched_masks = matched_mask_logits([part], [group], (4 * LOGIT_SIZE, 4 * LOGIT_SIZE))
        return criterion(
            batch.class_logits,
            batch.mask_logits,
            batch.mask_labels,
            batch.class_labels,
            matched_masks if work == "factors" else None,
        )

    return losses


def losses_of(side: str, work: str) -> Callable[[Batch], Losses]:
    return our_losses(work) if side == "ours" else published_losses()


def kernel_memory(field: str) -> float:
    """A field of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def run_step(losses: Callable[[Batch], Losses], batch: Batch, work: str) -> float:
    """One step on `batch`, whose gradients it leaves. Returns seconds."""
    for leaf in batch.leaves:
        leaf.grad = None
    started = time.perf_counter()
    with torch.set_grad_enabled(work != "forward"):
        total = torch.stack(list(losses(batch).values())).sum()
    if work != "forward":
        total.backward(retain_graph=True)  # the next step needs the products that make the mask logits
    return time.perf_counter() - started


def measure(side: str, work: str, repeats: int) -> dict[str, float]:
    """Best seconds of `repeats` steps, and the first step's peak memory above its inputs in MiB."""
    import scipy.optimize  # noqa: F401

    losses, batch = losses_of(side, work), make_batch(work)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = kernel_memory("VmRSS")
    run_step(losses, batch, work)
    memory = kernel_memory("VmHWM") - before
    return {"seconds": min(run_step(losses, batch, work) for _ in range(repeats)), "memory": memory}


def compare(work: str) -> dict[str, float]:
    """Largest differences of losses and gradients with the same points, as shares of the published ones."""
    table = torch.rand(3 * POINTS, 2, generator=torch.Generator().manual_seed(1))
    batch = make_batch(work)
    torch.rand = lambda masks, count, *_, **__: table[:count].expand(masks, -1, -1).clone()  # type: ignore
    values, gradients = {}, {}
    for side in SIDES:
        losses = losses_of(side, work)
        run_step(losses, batch, work)
        gradients[side] = [leaf.grad for leaf in batch.leaves if leaf.grad is not None]
        with torch.no_grad():
            values[side] = losses(batch)
    loss = max(abs(values["ours"][name] / value - 1).item() for name, value in values["published"].items())
    gradient = max(
        ((ours - theirs).norm() / theirs.norm()).item()
        for ours, theirs in zip(gradients["ours"], gradients["published"], strict=True)
    )
    return {"loss": loss, "gradient": gradient}


def child(*arguments: str) -> dict[str, float]:
    """This file's answer in a process of its own."""
    command = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed steps, the best of which counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", choices=WORKS, help="this work alone")
    parser.add_argument("--side", choices=(*SIDES, "both"), help="with --work: as JSON; both: compare values")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.side:
        both = arguments.side == "both"
        result = (
            compare(arguments.work) if both else measure(arguments.side, arguments.work, arguments.repeats)
        )
        sys.stdout.write(json.dumps(result))
        return
    common = ["--threads", str(arguments.threads), "--repeats", str(arguments.repeats)]
    lines = ["| work | criterion | seconds | memory (MiB) |", "| --- | --- | --- | --- |"]
    for work in [arguments.work] if arguments.work else WORKS:
        rows = {side: child("--work", work, "--side", side, *common) for side in SIDES}
        for side, row in rows.items():
            lines.append(f"| {WORKS[work]} | {side} | {row['seconds']:.2f} | {row['memory']:.0f} |")
        speed, memory = (rows["published"][key] / rows["ours"][key] for key in ("seconds", "memory"))
        lines.append(f"| | published / ours | {speed:.1f} | {memory:.1f} |")
    lines.append("")
    for work in ("logits", "factors"):
        difference = child("--work", work, "--side", "both", *common)
        lines.append(
            f"Same points ({WORKS[work]}): losses differ by at most {difference['loss']:.1e}, "
            f"gradients by at most {difference['gradient']:.1e} of the published ones."
        )
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
