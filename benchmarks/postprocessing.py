"""Seconds of post-processing at the size of a photograph, beside the network's, which sees it reduced.

    python benchmarks/postprocessing.py --model models/ita-photo --image street.jpg

The image is resized to each of `--sizes` first. "Every pixel" is the semantic map and the panoptic segments without the
bounds on blocks of pixels that leave most of them out (`modeling_ita.mask_tiles`). Prints a Markdown table of the
fastest of a few calls.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measure import at_least, fastest
from speed import image_size

from ita_segmentation.checkpoints import load_checkpoint
from ita_segmentation.class_names import read_vocabulary
from ita_segmentation.errors import ITAError
from ita_segmentation.images import read_image
from modeling_ita.mask_tiles import MaskTiles

TASKS = ("semantic", "panoptic", "instance")


@torch.inference_mode()
def measure(
    model: Any, processor: Any, image: Any, vocabulary: list[list[str]] | None, repeats: int
) -> dict[str, float]:
    """Seconds of the network, of each task's post-processing, and of two of them pixel by pixel."""
    inputs = processor(images=image, return_tensors="pt")
    run = partial(model, **inputs, vocabulary=vocabulary)
    outputs = run()
    seconds = {"network": fastest(run, repeats)}
    for task in TASKS:
        process = getattr(processor, f"post_process_{task}_segmentation")
        process = partial(process, outputs, target_sizes=[(image.height, image.width)])
        seconds[task] = fastest(process, repeats)
        if task != "instance":
            with mock.patch.object(MaskTiles, "block_side", 0):
                seconds[f"{task}, every pixel"] = fastest(process, repeats)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="a checkpoint")
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--vocabulary", type=Path, help="file of class names in the place of the model's own")
    parser.add_argument(
        "--sizes", nargs="+", type=image_size, default=[(480, 640), (1536, 2048), (3000, 4000)]
    )
    parser.add_argument("--repeats", type=at_least(1), default=3)
    parser.add_argument("--threads", type=at_least(1), default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        model, processor = load_checkpoint(arguments.model, "cpu")
        vocabulary = None if arguments.vocabulary is None else read_vocabulary(arguments.vocabulary)
        image = read_image(arguments.image)
    except (ITAError, ValueError, OSError) as error:
        parser.error(str(error))
    for index, (height, width) in enumerate(arguments.sizes):
        seconds = measure(model, processor, image.resize((width, height)), vocabulary, arguments.repeats)
        if not index:
            print(f"| size | {' | '.join(seconds)} |\n|" + " --- |" * (len(seconds) + 1))
        print(f"| {height} x {width} | {' | '.join(f'{one:.3f}' for one in seconds.values())} |", flush=True)


if __name__ == "__main__":
    main()
