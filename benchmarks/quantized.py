"""int8 towers beside float32 ones: agreement and mIoU on scenes, bytes on disk, seconds of the image tower.

    python benchmarks/quantized.py --limit 40 --clip convnext_large_d_320

Needs torchao. The first line is of a trained model, the second of a CLIP with random weights.
"""

import argparse
import io
import time
from typing import Any

import torch
from measure import build

from ita_segmentation.data.scenes import scene, scenes_vocabulary
from ita_segmentation.data.scenes.dataset import SPLITS
from ita_segmentation.evaluation import ConfusionMatrix
from ita_segmentation.export.quantize import quantize_towers
from modeling_ita import ITAForOpenVocabSegmentation, ITAImageProcessor


def saved_mib(model: torch.nn.Module) -> float:
    """What the weights take on disk."""
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    return stream.tell() / 2**20


@torch.no_grad()
def agreement(path: str, limit: int) -> str:
    """The same pixels and both mIoU of a model and its quantised copy, in words."""
    models = [ITAForOpenVocabSegmentation.from_pretrained(path).eval() for _ in range(2)]
    layers = quantize_towers(models[1])
    processor: Any = ITAImageProcessor.from_pretrained(path)
    vocabulary, size = scenes_vocabulary().classes, processor.size["shortest_edge"]
    scores, same = [ConfusionMatrix(len(vocabulary)) for _ in models], 0.0
    for index in range(limit):
        drawn = scene(SPLITS["validation"].seed, index, size, classes="all")
        inputs = processor(images=drawn.image, return_tensors="pt")
        maps = []
        for model, score in zip(models, scores, strict=True):
            outputs = model(**inputs, vocabulary=vocabulary)
            sizes = [drawn.semantic.shape]
            maps += processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
            score.update(maps[-1], drawn.semantic)
        same += maps[0].eq(maps[1]).float().mean().item() / limit
    before, after = (100 * score.compute()["miou"] for score in scores)
    return f"{path}: {len(layers)} layers, mIoU {before:.1f} -> {after:.1f}, same pixels {100 * same:.1f} %"


@torch.inference_mode()
def cost(clip: str, size: int) -> str:
    """Bytes on disk and seconds of the image tower at a size, before and after, in words."""
    model = build(clip)
    pixels, figures = torch.randn(1, 3, size, size), []
    for quantised in (False, True):
        layers = quantize_towers(model) if quantised else []
        model.clip_backbone(pixels)
        start = time.perf_counter()
        model.clip_backbone(pixels)
        figures.append((saved_mib(model), time.perf_counter() - start))
    (mib, seconds), (small, slow) = figures
    return (
        f"{clip}: {len(layers)} layers, {mib:.0f} -> {small:.0f} MiB, {seconds:.1f} -> {slow:.1f} s at {size}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="models/ita-tiny")
    parser.add_argument("--limit", type=int, default=40, help="scenes")
    parser.add_argument("--clip", default="convnext_large_d_320", help="open_clip's name of the larger CLIP")
    parser.add_argument("--size", type=int, default=256)
    args = parser.parse_args()
    print(agreement(args.model, args.limit), flush=True)
    print(cost(args.clip, args.size))


if __name__ == "__main__":
    main()
