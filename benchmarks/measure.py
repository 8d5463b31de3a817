"""One measurement of speed and memory, in a process of its own: prints a line of JSON.

The network has random weights and names have made-up embeddings: a vocabulary is encoded once, whatever comes after,
and what is measured here is what every picture costs.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from image_processing_ita import semantic_map
from modeling_ita import ITAConfig, ITAForOpenVocabSegmentation, Vocabulary, normalize_vocabulary

NAMES_PER_CLASS = 403 / 150  # ADE20K's 150 classes have 403 names
ROOMS = ("backbone", "dcu", "dem", "ita", "classification", "read-out")
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def build(clip_model_name: str) -> ITAForOpenVocabSegmentation:
    """A model with random weights, whose text tower is replaced by random embeddings."""
    torch.manual_seed(0)
    model = ITAForOpenVocabSegmentation(ITAConfig(clip_model_name=clip_model_name)).eval()
    for layer in model.detail_enhancement.layers:  # zero at first: every cell would look the same way
        torch.nn.init.normal_(layer.attention.sampling_offsets.weight, std=0.02)  # type: ignore[union-attr]
    width = model.clip_backbone.embed_dim
    model.clip_backbone.encode_text = lambda prompts: torch.randn(len(prompts), width)  # type: ignore[assignment]
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
    """Seconds spent in each room since `reset`; a room within a room is not counted twice."""

    def __init__(self, model: ITAForOpenVocabSegmentation) -> None:
        self.seconds: dict[str, float] = {}
        self._inside = False
        for room, owner, method in (
            ("backbone", model.clip_backbone, "forward"),
            ("dcu", model, "_unearth"),
            ("dem", model.detail_enhancement, "forward"),
            ("ita", model.image_text_aggregation, "forward"),
            ("classification", model, "_classify"),
        ):
            setattr(owner, method, self.timed(room, getattr(owner, method)))

    def timed(self, room: str, function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.time(room):
                return function(*args, **kwargs)

        return run

    @contextmanager
    def time(self, room: str) -> Iterator[None]:
        if self._inside:
            yield
            return
        self._inside, start = True, time.perf_counter()
        try:
            yield
        finally:
            self._inside = False
            self.seconds[room] = self.seconds.get(room, 0.0) + time.perf_counter() - start


def memory(field: str) -> int:
    """A field of this process's memory, such as VmRSS or VmHWM (its highest value so far), in bytes (Linux)."""
    lines = STATUS.read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def measure(
    model: ITAForOpenVocabSegmentation, height: int, width: int, classes: int, repeats: int
) -> dict[str, Any]:
    """Times of the first call and of the middle one (by ratio) of `repeats` warm ones, on one picture.

    Returns: seconds of each room, `rest` and `total` (network and semantic read-out at the picture's own size);
    `ratio`, its total as a multiple of the backbone in the same call; the first call's total; and the
    highest memory above the loaded model's in bytes.
    """
    padded = [math.ceil(side / 32) * 32 for side in (height, width)]
    pixels = torch.randn(1, 3, *padded)
    mask = torch.zeros(1, *padded, dtype=torch.int64)
    mask[:, :height, :width] = 1
    vocabulary = made_up_vocabulary(classes)
    stopwatch = Stopwatch(model)
    loaded = memory("VmRSS")
    CLEAR_REFS.write_text("5")  # the highest value starts anew
    calls = []
    for _ in range(repeats + 1):
        stopwatch.seconds = {}
        start = time.perf_counter()
        _segment(model, stopwatch, pixels, mask, vocabulary, (height, width))
        total = time.perf_counter() - start
        rest = total - sum(stopwatch.seconds.values())
        calls.append(stopwatch.seconds | {"rest": rest, "total": total})
    first, warm = calls[0], calls[1:]
    warm.sort(key=lambda call: call["total"] / call["backbone"])
    middle = warm[(len(warm) - 1) // 2]
    return {
        "height": height,
        "width": width,
        "classes": classes,
        "names": len(vocabulary.names),
        "seconds": middle,
        "ratio": middle["total"] / middle["backbone"],
        "ratios": [call["total"] / call["backbone"] for call in warm],
        "first_call_seconds": first["total"],
        "peak_bytes": memory("VmHWM") - loaded,
    }


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
    with stopwatch.time("read-out"):
        semantic_map(outputs.class_queries_logits[0], outputs.masks_queries_logits[0], size, size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clip", required=True, help="open_clip's name of the frozen CLIP")
    parser.add_argument("--height", type=int, required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--classes", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(measure(build(args.clip), args.height, args.width, args.classes, args.repeats)))


if __name__ == "__main__":
    main()
