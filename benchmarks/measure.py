"""One measurement of speed and memory, in a process of its own: prints a line of JSON.

The network has random weights and names have made-up embeddings: a vocabulary is encoded once, whatever comes after,
and what is measured here is what every image costs.
"""

import argparse
import copy
import json
import math
import os
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling_ita import ITAConfig, ITAForOpenVocabSegmentation, Vocabulary, normalize_vocabulary
from modeling_ita import modeling_ita as model_module
from modeling_ita.postprocessing import semantic_map

NAMES_PER_CLASS = 403 / 150  # ADE20K's 150 classes have 403 names
STAGES = ("backbone", "dcu", "dem", "ita", "classification", "post-processing")
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def build(clip_model_name: str, queries: int = 200) -> ITAForOpenVocabSegmentation:
    """A model with random weights, 20 of its queries text queries, its text tower replaced by random embeddings."""
    torch.manual_seed(0)
    config = ITAConfig(clip_model_name=clip_model_name, num_learned_queries=queries - 20)
    model = ITAForOpenVocabSegmentation(config).eval()
    for layer in model.detail_enhancement.layers:  # zero at first: every cell would look the same way
        torch.nn.init.normal_(layer.attention.sampling_offsets.weight, std=0.02)  # type: ignore[union-attr]
    width = model.clip_backbone.embed_dim
    backbone: Any = model.clip_backbone
    backbone.tokenize = lambda prompts: (torch.zeros(len(prompts), 1, dtype=torch.int64), 0)
    backbone.encode_tokens = lambda tokens, prefixes: torch.randn(len(tokens), width)
    return model


def made_up_vocabulary(classes: int) -> Vocabulary:
    """Some classes with as many synonyms as ADE20K's have on average."""
    ends = [round(index * NAMES_PER_CLASS) for index in range(classes + 1)]
    return normalize_vocabulary(
        [
            [f"class {index} name {number}" for number in range(stop - start)]
            for index, (start, stop) in enumerate(zip(ends[:-1], ends[1:], strict=True))
        ]
    )


class Stopwatch:
    """Seconds spent in each stage of a call; a stage within a stage is not counted twice."""

    def __init__(self, model: ITAForOpenVocabSegmentation) -> None:
        self.seconds: dict[str, float] = {}
        self._inside = False
        for stage, owner, method in (
            ("backbone", model.clip_backbone, "forward"),
            ("dcu", model.dominant_categories, "forward"),
            ("dem", model.detail_enhancement, "forward"),
            ("ita", model.image_text_aggregation, "forward"),
            ("classification", model.mask_classifier, "forward"),
            ("classification", model_module, "class_logits"),
            ("classification", model_module, "ensemble_log_probs"),
        ):
            setattr(owner, method, self.timed(stage, getattr(owner, method)))

    def timed(self, stage: str, function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.time(stage):
                return function(*args, **kwargs)

        return run

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        if self._inside:
            yield
            return
        self._inside, start = True, time.perf_counter()
        try:
            yield
        finally:
            self._inside = False
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def memory(field: str) -> int:
    """A field of this process's memory, such as VmRSS or VmHWM (its highest value so far), in bytes (Linux)."""
    lines = STATUS.read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def measure(
    model: ITAForOpenVocabSegmentation,
    height: int,
    width: int,
    classes: int,
    repeats: int,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Times of the first call and of the middle one (by ratio) of `repeats` warm ones, on `batch` images of a size.

    Returns: seconds of each stage, `rest` and `total` (network and semantic post-processing at the image's own size);
    `ratio`, its total as a multiple of the float32 backbone: that of the same call, or one run before it where the
    network has another dtype; the first call's total; and the highest memory above the loaded model's in bytes.
    """
    float32_backbone = copy.deepcopy(model.clip_backbone) if dtype != torch.float32 else None
    model.to(dtype=dtype)  # type: ignore[call-arg]
    padded = [math.ceil(side / 32) * 32 for side in (height, width)]
    pixels = torch.randn(batch, 3, *padded)
    mask = torch.zeros(batch, *padded, dtype=torch.int64)
    mask[:, :height, :width] = 1
    vocabulary = made_up_vocabulary(classes)
    stopwatch = Stopwatch(model)
    loaded, peak = memory("VmRSS"), 0
    calls = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        if float32_backbone is not None:
            with torch.inference_mode():
                float32_backbone(pixels)
        reference = time.perf_counter() - start
        stopwatch.seconds = {}
        CLEAR_REFS.write_text("5")  # resets the peak
        start = time.perf_counter()
        _segment(model, stopwatch, pixels, mask, vocabulary, (height, width))
        total = time.perf_counter() - start
        peak = max(peak, memory("VmHWM") - loaded)
        rest = total - sum(stopwatch.seconds.values())
        reference = stopwatch.seconds["backbone"] if float32_backbone is None else reference
        calls.append(stopwatch.seconds | {"rest": rest, "total": total, "float32 backbone": reference})
    first, warm = calls[0], calls[1:]
    warm.sort(key=_ratio)
    middle = warm[(len(warm) - 1) // 2]
    return {
        "height": height,
        "width": width,
        "classes": classes,
        "names": len(vocabulary.names),
        "batch": batch,
        "queries": model.config.num_learned_queries + model.config.num_dominant_categories,
        "seconds": middle,
        "dtype": str(dtype).removeprefix("torch."),
        "ratio": _ratio(middle),
        "ratios": list(map(_ratio, warm)),
        "first_call_seconds": first["total"],
        "peak_bytes": peak,
    }


def _ratio(call: dict[str, float]) -> float:
    return call["total"] / call["float32 backbone"]


@torch.inference_mode()
def _segment(
    model: ITAForOpenVocabSegmentation,
    stopwatch: Stopwatch,
    pixels: Tensor,
    mask: Tensor,
    vocabulary: Vocabulary,
    size: tuple[int, int],
) -> None:
    outputs = model(pixels, pixel_mask=mask, vocabulary=vocabulary)
    with stopwatch.time("post-processing"):
        for image in zip(outputs.class_queries_logits, outputs.masks_queries_logits, strict=True):
            semantic_map(*image, size, size)


def fastest(function: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of a few calls."""
    return min(timeit.repeat(function, number=1, repeat=repeats))


def at_least(least: int) -> Callable[[str], int]:
    """Give a type of arguments: integers from `least` on."""

    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text!r}")
        return int(text)

    return integer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clip", required=True, help="open_clip's name of the frozen CLIP")
    parser.add_argument("--height", type=int, required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--classes", type=int, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ["ITA_TEXT_CACHE"] = "off"  # made-up embeddings are nothing to keep
    model = build(args.clip, args.queries)
    size = (args.height, args.width)
    print(
        json.dumps(measure(model, *size, args.classes, args.repeats, args.batch, getattr(torch, args.dtype)))
    )


if __name__ == "__main__":
    main()
