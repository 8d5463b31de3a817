"""One image network in several engines, side by side: eager PyTorch, torch.compile, onnxruntime and OpenVINO.

    python benchmarks/engines.py --model models/ita-photo --images data/val/*.jpg --only PyTorch
    python benchmarks/engines.py --clip convnext_large_d_320 --size 512

In float32 and bfloat16. With --clip the network has random weights and gets noise: only times mean anything. With
--model it says how many pixels of the images have the class that eager float32 gives. Prints a Markdown table; engines
that are not installed are left out, with a line on the standard error. Seconds are the network's, without
post-processing, and the fastest of a few calls; the set-up is exporting, compiling or loading, and the first call.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import at_least, build, fastest, made_up_vocabulary

from ita_segmentation.checkpoints import load_checkpoint
from ita_segmentation.errors import ITAError
from ita_segmentation.export.network import INPUTS, to_onnx
from ita_segmentation.images import read_image
from modeling_ita import TextEmbeddings
from modeling_ita.postprocessing import semantic_map

Inputs = dict[str, torch.Tensor]
Engine = Callable[[Inputs], tuple[torch.Tensor, torch.Tensor]]
"""Gives class logits (1, Q, K + 1) and mask logits (1, Q, h, w)."""


def network_inputs(text: TextEmbeddings, pixel_values: torch.Tensor) -> Inputs:
    """Give the inputs of an exported network for one image without padding."""
    valid = torch.ones_like(pixel_values[:, 0], dtype=torch.bool)
    return {"pixel_values": pixel_values, "valid": valid} | vars(text)


def pytorch(model: Any, dtype: torch.dtype, compiled: bool) -> Engine:
    """Run the model's `segment`, with `compiled` by torch.compile and its weights frozen into the graph."""
    model = model.to(dtype)
    segment = model.segment
    if compiled:
        torch._dynamo.reset()
        segment = torch.compile(segment, fullgraph=True, options={"freezing": True})

    def run(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        cast = {name: one.to(dtype) if one.is_floating_point() else one for name, one in inputs.items()}
        text = TextEmbeddings(**{name: cast[name] for name in INPUTS[2:]})
        with torch.no_grad():
            found = segment(cast["pixel_values"], text, cast["valid"])
        return found.log_probs, found.mask_logits[-1]

    return run


def onnxruntime(model: Any, file: Path, threads: int) -> Engine:
    """Run the network by onnxruntime."""
    import onnxruntime

    export(model, file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    outputs = ["class_log_probabilities", "mask_logits"]

    def run(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        arrays = session.run(outputs, {name: inputs[name].numpy() for name in names})
        return torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1])

    return run


def openvino(model: Any, file: Path, threads: int, precision: str) -> Engine:
    """Run the network by OpenVINO in "f32" or "bf16"."""
    import openvino

    export(model, file)
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(file, "CPU", settings | {"PERFORMANCE_HINT": "LATENCY"})
    names = [one.get_any_name() for one in compiled.inputs]

    def run(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        found = compiled({name: inputs[name].numpy() for name in names})
        logits, masks = (torch.from_numpy(found[output].copy()) for output in compiled.outputs[:2])
        return logits, masks

    return run


def engines(model: Any, folder: Path, threads: int) -> Iterator[tuple[str, Callable[[], Engine]]]:
    """Give names of engines, and what sets each up: float32 first, before the model's weights change."""
    file = folder / "model.onnx"
    yield "PyTorch, float32", partial(pytorch, model, torch.float32, compiled=False)
    yield "torch.compile, float32", partial(pytorch, model, torch.float32, compiled=True)
    yield "onnxruntime, float32", partial(onnxruntime, model, file, threads)
    yield "OpenVINO, float32", partial(openvino, model, file, threads, "f32")
    yield "OpenVINO, bfloat16", partial(openvino, model, file, threads, "bf16")
    yield "PyTorch, bfloat16", partial(pytorch, model, torch.bfloat16, compiled=False)
    yield "torch.compile, bfloat16", partial(pytorch, model, torch.bfloat16, compiled=True)


def export(model: Any, file: Path) -> None:
    """Write the float32 network as ONNX, once."""
    if not file.exists():
        to_onnx(model, file)


def backbone_seconds(model: Any, pixel_values: torch.Tensor, repeats: int) -> float:
    """Time the frozen image tower in eager float32."""
    with torch.no_grad():
        return fastest(partial(model.clip_backbone, pixel_values), repeats + 1)


def label_maps(engine: Engine, images: list[Inputs]) -> list[torch.Tensor]:
    """Segment images at the network's input size."""
    found = []
    for inputs in images:
        logits, masks = engine(inputs)
        found.append(semantic_map(logits[0].float(), masks[0].float(), target_size=inputs["valid"].shape[1:]))
    return found


def image_side(text: str) -> int:
    """Read a multiple of 32."""
    side = at_least(32)(text)
    if side % 32:
        raise argparse.ArgumentTypeError(f"must be a multiple of 32, got {text!r}")
    return side


def load(arguments: argparse.Namespace) -> tuple[Any, list[Inputs]]:
    """Build or load the model in float32, and prepare the images."""
    if arguments.model:
        model, processor = load_checkpoint(arguments.model, "cpu")
        text = model.encode_vocabulary()
        images = [
            processor(read_image(path), return_tensors="pt")["pixel_values"] for path in arguments.images
        ]
        return model, [network_inputs(text, image) for image in images]
    os.environ["ITA_TEXT_CACHE"] = "off"  # made-up embeddings are nothing to keep
    model = build(arguments.clip)
    text = model.encode_vocabulary(made_up_vocabulary(arguments.classes))
    return model, [network_inputs(text, torch.randn(1, 3, arguments.size, arguments.size))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a checkpoint; needs --images")
    source.add_argument("--clip", help="open_clip's name of a CLIP, random weights")
    parser.add_argument("--images", nargs="+", type=Path, default=[])
    parser.add_argument(
        "--size", type=image_side, default=512, help="side of the image with --clip, a multiple of 32"
    )
    parser.add_argument("--classes", type=at_least(1), default=150, help="with --clip")
    parser.add_argument("--only", default="", help="engines with this in their name, such as PyTorch")
    parser.add_argument("--repeats", type=at_least(1), default=5)
    parser.add_argument("--threads", type=at_least(1), default=torch.get_num_threads())
    arguments = parser.parse_args()
    if bool(arguments.model) != bool(arguments.images):
        parser.error("--model and --images go together")
    torch.set_num_threads(arguments.threads)
    try:
        with torch.no_grad():
            model, images = load(arguments)
    except (ITAError, ValueError) as error:
        parser.error(str(error))
    names = [name for name, _ in engines(model, Path(), arguments.threads)]
    if not any(arguments.only in name for name in names):
        parser.error(f"--only {arguments.only!r} is in none of {'; '.join(names)}")
    reference = label_maps(pytorch(model, torch.float32, compiled=False), images)
    print(
        "| engine | set-up | seconds | x eager float32 backbone | equal pixels |\n|" + " --- |" * 5,
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        backbone = backbone_seconds(model, images[0]["pixel_values"], arguments.repeats)
        print(f"| image tower alone, PyTorch, float32 | | {backbone:.3f} | 1.00 | |", flush=True)
        for name, set_up in engines(model, Path(folder), arguments.threads):
            if arguments.only not in name:
                continue
            start = time.perf_counter()
            try:
                engine = set_up()
            except ImportError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                continue
            engine(images[0])
            ready = time.perf_counter() - start
            seconds = fastest(partial(engine, images[0]), arguments.repeats)
            maps = label_maps(engine, images)
            equal = np.mean(
                [float((one == other).float().mean()) for one, other in zip(maps, reference, strict=True)]
            )
            share = f"{equal:.2%}" if arguments.model else ""
            print(
                f"| {name} | {ready:.1f} | {seconds:.3f} | {seconds / backbone:.2f} | {share} |", flush=True
            )


if __name__ == "__main__":
    main()
