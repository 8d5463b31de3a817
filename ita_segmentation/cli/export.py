"""Export a checkpoint: as ONNX for onnxruntime without torch, or as a torch.export graph.

    ita export --model models/ita-tiny --output exported --check examples/scene_1.png

The output folder gets the image network (model.onnx or model.pt2), the text network and its tokenizer, the names that
are encoded already, the processor's settings, and `ita_onnx`, the package that runs them. --target web adds a page that
runs them in a browser, --target triton arranges them for Triton Inference Server. Other default classes, without
exporting the networks again: --vocabulary_only.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ita_segmentation.checkpoints import load_checkpoint, resolve_checkpoint
from ita_segmentation.cli.options import add_classes, add_model, add_output, chosen_classes, refuse_any
from ita_segmentation.cli.parser import ConfigArgumentParser
from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.files import output_folder
from ita_segmentation.images import read_image


def build_parser() -> ConfigArgumentParser:
    """Build the parser of `ita export`."""
    parser = ConfigArgumentParser(
        description="Export a checkpoint to ONNX or to a torch.export graph.",
        renamed={"--format": "--target"},
    )
    add_model(parser)
    add_output(parser)
    add = parser.add_argument
    text = (
        "onnx: two networks and what runs them without torch; web: also a page for browsers; triton: a model "
        "repository; torch: a torch.export graph (default: %(default)s)"
    )
    add("--target", choices=("onnx", "web", "triton", "torch"), default="onnx", help=text)
    text = "folder of the npm package, copied beside the page (default: the page loads it from jsDelivr)"
    add("--onnxruntime_web", type=Path, metavar="DIR", help=text)
    add_classes(parser)
    add("--vocabulary_only", action="store_true", help="write a vocabulary, not the network")
    add("--check", type=Path, metavar="IMAGE", help="compare the ONNX network with the checkpoint")
    return parser


def export(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = build_parser().parse_command_line(argv)
    refuse_any(
        {
            "--check is for --target onnx and web": arguments.check
            and arguments.target not in ("onnx", "web"),
            "--onnxruntime_web is for --target web": arguments.onnxruntime_web and arguments.target != "web",
        }
    )
    image = read_image(arguments.check) if arguments.check else None
    vocabulary = chosen_classes(arguments)
    folder = output_folder(arguments.output)
    model, processor = load_checkpoint(arguments.model, "cpu")

    try:
        _write(arguments, model, processor, folder, vocabulary)
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        raise ITAError(f"{arguments.model} cannot be exported: {one_line(error)}") from error
    print(f"exported: see {folder}")
    if image is not None:
        _check(model, processor, folder, image)
    return 0


def _write(
    arguments: argparse.Namespace, model: Any, processor: Any, folder: Path, vocabulary: Any | None
) -> None:
    import torch

    from ita_segmentation.export.folder import (
        write_docker_files,
        write_graph,
        write_onnx_folder,
        write_vocabulary,
    )
    from ita_segmentation.export.network import export_network
    from ita_segmentation.export.triton import arrange_for_triton
    from ita_segmentation.export.web_page import write_web_page

    if arguments.vocabulary_only:
        write_vocabulary(model, folder, vocabulary)
    elif arguments.target == "torch":
        write_graph(folder, "model.pt2", lambda path: torch.export.save(export_network(model), path))
        write_vocabulary(model, folder, vocabulary)
        processor.save_pretrained(folder)
    else:
        write_onnx_folder(model, processor, folder, vocabulary)
        if arguments.target == "onnx":
            write_docker_files(folder)
        elif arguments.target == "web":
            write_web_page(folder, resolve_checkpoint(arguments.model), arguments.onnxruntime_web)
        elif arguments.target == "triton":
            arrange_for_triton(folder)


def _check(model: Any, processor: Any, folder: Path, image: Any) -> None:
    """Print how far onnxruntime without torch is from the checkpoint on an image."""
    import torch

    from ita_segmentation.export.ita_onnx import OnnxPredictor, semantic_map

    predictor = OnnxPredictor(folder)
    with torch.inference_mode():
        inputs = processor(images=image, return_tensors="pt")
        expected = model(**inputs, vocabulary=predictor.vocabulary)
        labels = processor.post_process_semantic_segmentation(
            expected, target_sizes=[(image.height, image.width)]
        )[0].numpy()
    [found] = predictor.outputs([image])
    pairs = {
        "class_queries_logits": (found.class_logits, expected.class_queries_logits[0].numpy()),
        "masks_queries_logits": (found.mask_logits, expected.masks_queries_logits[0].numpy()),
    }
    for name, (one, other) in pairs.items():
        difference, largest = abs(one - other).max(), abs(other).max()
        print(f"{name}: largest difference {difference:.2g}, of values up to {largest:.3g}")
    print(f"pixels of the same class: {100 * (semantic_map(found) == labels).mean():.2f} %")
