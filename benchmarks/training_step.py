"""Time and memory of one training step, as a multiple of the frozen backbone's forward in the same process.

    python benchmarks/training_step.py --size 1024

The paper's model with random weights, one image, `--masks` random masks of COCO's 133 classes, float32. The step is
forward, losses, backward, gradient clipping and AdamW, as `run_train.py` does it; memory is the process's peak (Linux).
"""

import argparse
import datetime
import json
import os
import time

import torch
from measure import CLEAR_REFS, build, memory
from speed import machine


def blobs(masks: int, size: int) -> torch.Tensor:
    """(masks, size, size) bool: discs of random places and radii."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    centres = torch.rand(masks, 2) * size
    radii = (0.05 + 0.2 * torch.rand(masks)) * size
    distance = (rows - centres[:, 0, None, None]) ** 2 + (columns - centres[:, 1, None, None]) ** 2
    return distance < radii[:, None, None] ** 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clip", default="convnext_large_d_320", help="open_clip's name of the frozen CLIP")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--masks", type=int, default=12)
    parser.add_argument(
        "--repeats", type=int, default=2, help="warm steps, of which the fastest by ratio counts"
    )
    parser.add_argument("--activation_checkpointing", action="store_true")
    args = parser.parse_args()
    os.environ["ITA_TEXT_CACHE"] = "off"
    model = build(args.clip).train()
    if args.activation_checkpointing:
        model.activation_checkpointing_enable()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.05)
    pixels = torch.randn(args.batch, 3, args.size, args.size)
    vocabulary = [f"class {index}" for index in range(133)]
    labels = {
        "mask_labels": [blobs(args.masks, args.size) for _ in range(args.batch)],
        "class_labels": [torch.randint(133, (args.masks,)) for _ in range(args.batch)],
    }
    loaded = memory("VmRSS")
    CLEAR_REFS.write_text("5")
    steps = []
    for _ in range(args.repeats + 1):
        with torch.no_grad():
            start = time.perf_counter()
            model.clip_backbone(pixels)
            backbone = time.perf_counter() - start
        start = time.perf_counter()
        outputs = model(pixels, vocabulary=vocabulary, **labels)
        forward = time.perf_counter() - start
        outputs.loss.backward()
        backward = time.perf_counter() - start - forward
        torch.nn.utils.clip_grad_norm_(trainable, 0.01)
        optimizer.step()
        optimizer.zero_grad()
        total = time.perf_counter() - start
        del outputs
        steps.append({"backbone": backbone, "forward": forward, "backward": backward, "step": total})
    best = min(steps[1:], key=lambda step: step["step"] / step["backbone"])
    result = {
        "size": args.size,
        "batch": args.batch,
        "activation_checkpointing": args.activation_checkpointing,
        "seconds": {name: round(value, 2) for name, value in best.items()},
        "ratio": round(best["step"] / best["backbone"], 2),
        "all_ratios": [round(step["step"] / step["backbone"], 2) for step in steps],
        "loaded_gib": round(loaded / 2**30, 2),
        "peak_gib": round(memory("VmHWM") / 2**30, 2),
        "trainable_parameters": sum(parameter.numel() for parameter in trainable),
        "frozen_parameters": sum(p.numel() for p in model.parameters() if not p.requires_grad),
        "machine": machine(torch.get_num_threads()),
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
