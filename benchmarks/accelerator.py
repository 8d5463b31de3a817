"""Images a second on an accelerator, eager and compiled, as a multiple of the frozen backbone's time.

    python benchmarks/accelerator.py --size 1024 --batches 1 8 --dtype bfloat16

The paper's model with random weights: network and semantic read-out, and with `--train` a step (forward with losses in
autocast, backward, AdamW) against the backbone's forward. Prints a Markdown table.
"""

import argparse
import datetime
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import build, made_up_vocabulary
from training_step import blobs

from modeling_ita.postprocessing import semantic_map

HEADS = ("work", "batch", "images a second", "x backbone", "GiB")


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device, warm: int, repeats: int) -> float:
    """The middle time of several calls, after `warm` ones that do not count."""
    times = []
    for number in range(warm + repeats):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        if number >= warm:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def peak_gib(device: torch.device) -> float:
    """The most that tensors took so far on a CUDA device; nan elsewhere."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clip", default="convnext_large_d_320", help="open_clip's name of the frozen CLIP")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--no_compile", action="store_true", help="eager only")
    parser.add_argument("--train", action="store_true", help="training steps, too")
    args = parser.parse_args()
    os.environ["ITA_TEXT_CACHE"] = "off"
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model: Any = build(args.clip)
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    vocabulary = made_up_vocabulary(args.classes)
    print(f"| {' | '.join(HEADS)} |\n|{' --- |' * len(HEADS)}")

    def row(work: str, batch: int, taken: float, backbone: float) -> None:
        cells = (f"{batch / taken:.2f}", f"{taken / backbone:.2f}", f"{peak_gib(device):.2f}")
        print(f"| {work} | {batch} | {' | '.join(cells)} |", flush=True)

    for batch in args.batches:
        pixels = torch.randn(batch, 3, args.size, args.size, device=device)
        labels = {
            "mask_labels": [blobs(12, args.size).to(device) for _ in range(batch)],
            "class_labels": [torch.randint(args.classes, (12,), device=device) for _ in range(batch)],
        }

        def backbone(pixels: torch.Tensor = pixels) -> None:
            with torch.no_grad(), torch.autocast(device.type, dtype, enabled=args.dtype != "float32"):
                model.clip_backbone(pixels)

        def segment(pixels: torch.Tensor = pixels) -> None:
            with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=args.dtype != "float32"):
                outputs = model(pixels, vocabulary=vocabulary)
                for image in zip(outputs.class_queries_logits, outputs.masks_queries_logits, strict=True):
                    semantic_map(*image)

        def step(pixels: torch.Tensor = pixels, labels: dict[str, Any] = labels) -> None:
            with torch.autocast(device.type, dtype, enabled=args.dtype != "float32"):
                loss = model(pixels, vocabulary=vocabulary, **labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        model.eval()
        alone = seconds(backbone, device, args.warm, args.repeats)
        row("backbone", batch, alone, alone)
        row("all, eager", batch, seconds(segment, device, args.warm, args.repeats), alone)
        if args.train:
            model.train()
            row("training step, eager", batch, seconds(step, device, args.warm, args.repeats), alone)
            model.eval()
        if not args.no_compile:
            model.compile()
            row("all, compiled", batch, seconds(segment, device, args.warm, args.repeats), alone)
            model._compiled_segment = None  # the next batch begins eager
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(
        f"\n*{args.clip}, {args.size} x {args.size}, {args.classes} classes, {args.dtype}; {name}, torch "
        f"{torch.__version__}, {datetime.date.today().isoformat()}.*"
    )


if __name__ == "__main__":
    main()
