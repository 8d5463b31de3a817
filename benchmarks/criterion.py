"""Time and memory of the training losses, beside transformers' `Mask2FormerLoss` on the same predictions.

    python benchmarks/criterion.py

The work: 2 images, 250 queries, 133 classes, 12 masks of 1024 x 1024 for each image, 10 predictions with mask
logits of 256 x 256, 12,544 points. Each criterion runs in a process of its own, first forward alone, then forward
and backward, with its own random points. A further process gives both the same points and compares values.
Memory is what the first step needs above its inputs, by the kernel's own peak (Linux).
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modeling_ita.set_criterion import SetCriterion

IMAGES, QUERIES, CLASSES, MASKS, LAYERS = 2, 250, 133, 12, 10
MASK_SIZE, LOGIT_SIZE, POINTS = 1024, 256, 12544
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

Losses = dict[str, Tensor]
Batch = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def make_batch() -> Batch:
    """Class logits and mask logits of each prediction, float32 mask labels and class labels of each image."""
    generator = torch.Generator().manual_seed(0)

    def blobs(*shape: int, size: int) -> Tensor:
        noise = torch.randn(*shape, 16, 16, generator=generator)
        return F.interpolate(noise, size=(size, size), mode="bilinear")

    class_logits = [
        torch.randn(IMAGES, QUERIES, CLASSES + 1, generator=generator).requires_grad_() for _ in range(LAYERS)
    ]
    mask_logits = [blobs(IMAGES, QUERIES, size=LOGIT_SIZE).mul_(4).requires_grad_() for _ in range(LAYERS)]
    segments = blobs(IMAGES, MASKS, size=MASK_SIZE).argmax(1)
    mask_labels = [torch.stack([(image == i).float() for i in range(MASKS)]) for image in segments]
    class_labels = list(torch.randint(CLASSES, (IMAGES, MASKS), generator=generator))
    return class_logits, mask_logits, mask_labels, class_labels


def published_losses() -> Callable[..., Losses]:
    """transformers' criterion, its losses under our names and times their weights."""
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

    criterion = Mask2FormerLoss(SimpleNamespace(num_labels=CLASSES, **SETTINGS), {})  # type: ignore[arg-type]

    def losses(class_logits, mask_logits, mask_labels, class_labels) -> Losses:
        earlier = [
            {"masks_queries_logits": masks, "class_queries_logits": classes}
            for classes, masks in zip(class_logits[:-1], mask_logits[:-1], strict=True)
        ]
        values = criterion(mask_logits[-1], class_logits[-1], mask_labels, class_labels, earlier)
        return {
            f"loss_{part}{suffix}": WEIGHTS[part] * values[f"{name}{suffix}"]
            for suffix in ("", *(f"_{i}" for i in range(LAYERS - 1)))
            for part, name in PUBLISHED_NAMES.items()
        }

    return losses


def criterion_of(side: str) -> Callable[..., Losses]:
    return SetCriterion(SimpleNamespace(**SETTINGS)) if side == "ours" else published_losses()


def kernel_memory(field: str) -> float:
    """A field of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def run_step(losses: Callable[..., Losses], batch: Batch, backward: bool) -> float:
    """One step on `batch`; the gradients are dropped afterwards. Returns seconds."""
    started = time.perf_counter()
    with torch.set_grad_enabled(backward):
        total = torch.stack(list(losses(*batch).values())).sum()
    if backward:
        total.backward()
    seconds = time.perf_counter() - started
    for logits in (*batch[0], *batch[1]):
        logits.grad = None
    return seconds


def measure(side: str, backward: bool, repeats: int) -> dict[str, float]:
    """Best seconds of `repeats` steps, and the first step's peak memory above its inputs in MiB."""
    import scipy.optimize  # noqa: F401

    losses, batch = criterion_of(side), make_batch()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = kernel_memory("VmRSS")
    run_step(losses, batch, backward)
    memory = kernel_memory("VmHWM") - before
    return {"seconds": min(run_step(losses, batch, backward) for _ in range(repeats)), "memory": memory}


def compare() -> dict[str, float]:
    """Largest differences of losses and gradients with the same points, as shares of the published ones."""
    table = torch.rand(3 * POINTS, 2, generator=torch.Generator().manual_seed(1))
    torch.rand = lambda masks, count, *_, **__: table[:count].expand(masks, -1, -1).clone()  # type: ignore
    batch = make_batch()
    values, gradients = {}, {}
    for side in SIDES:
        values[side] = criterion_of(side)(*batch)
        torch.stack(list(values[side].values())).sum().backward()
        gradients[side] = [logits.grad for logits in (*batch[0], *batch[1]) if logits.grad is not None]
        for logits in (*batch[0], *batch[1]):
            logits.grad = None
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
    parser.add_argument("--side", choices=SIDES, help="measure this side alone and print JSON")
    parser.add_argument("--backward", action="store_true", help="with --side: forward and backward")
    parser.add_argument("--compare", action="store_true", help="compare values alone and print JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.compare:
        sys.stdout.write(json.dumps(compare()))
        return
    if arguments.side:
        sys.stdout.write(json.dumps(measure(arguments.side, arguments.backward, arguments.repeats)))
        return
    common = ["--threads", str(arguments.threads), "--repeats", str(arguments.repeats)]
    lines = ["| work | criterion | seconds | memory (MiB) |", "| --- | --- | --- | --- |"]
    for work, options in (("forward", []), ("forward + backward", ["--backward"])):
        rows = {side: child("--side", side, *options, *common) for side in SIDES}
        for side, row in rows.items():
            lines.append(f"| {work} | {side} | {row['seconds']:.2f} | {row['memory']:.0f} |")
        speed, memory = (rows["published"][key] / rows["ours"][key] for key in ("seconds", "memory"))
        lines.append(f"| {work} | published / ours | {speed:.1f} | {memory:.1f} |")
    difference = child("--compare", "--threads", str(arguments.threads))
    lines += [
        "",
        f"Same points: losses differ by at most {difference['loss']:.1e}, gradients by at most "
        f"{difference['gradient']:.1e} of the published ones.",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
