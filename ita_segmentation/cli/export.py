"""Export a checkpoint: as ONNX for onnxruntime without torch, or as a torch.export graph.

    ita export --model models/ita-tiny --output exported --check examples/scene_1.png

The output folder gets the image network (model.onnx or model.pt2), the text network and its tokenizer, the names that
are encoded already, the processor's settings, and `ita_onnx`, the package that runs them. --format web adds a page that
runs them in a browser, --format triton arranges them for Triton Inference Server. Other default classes, without
exporting the networks again: --vocabulary_only.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ita_segmentation.checkpoints import MODEL_HELP, load_checkpoint, resolve_checkpoint
from ita_segmentation.class_names import read_vocabulary
from ita_segmentation.cli.parser import ConfigArgumentParser
from ita_segmentation.errors import ITAError, UsageError, one_line
from ita_segmentation.files import output_folder
from ita_segmentation.images import read_image


def build_parser() -> ConfigArgumentParser:
    """Build the parser of `ita export`."""
    parser = ConfigArgumentParser(description="Export a checkpoint to ONNX or to a torch.export graph.")
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID", help=MODEL_HELP)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--format",
        choices=("onnx", "web", "triton", "torch"),
        default="onnx",
        help="onnx: two networks and what runs them without torch; web: also a page for browsers; triton: a model "
        "repository; torch: a torch.export graph (default: %(default)s)",
    )
    parser.add_argument(
        "--onnxruntime_web",
        type=Path,
        metavar="DIR",
        help="folder of the npm package, copied beside the page (default: the page loads it from jsDelivr)",
    )
    classes = parser.add_mutually_exclusive_group()
    classes.add_argument("--classes", help='such as "cat, sofa|couch" (default: the checkpoint\'s own)')
    classes.add_argument(
        "--vocabulary", type=Path, metavar="FILE", help="classes as JSON, or lines 'id:name,synonym'"
    )
    parser.add_argument("--vocabulary_only", action="store_true", help="write a vocabulary, not the network")
    parser.add_argument(
        "--check", type=Path, metavar="IMAGE", help="compare the ONNX network with the checkpoint"
    )
    return parser


def export(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = build_parser().parse_command_line(argv)
    if arguments.check and arguments.format not in ("onnx", "web"):
        raise UsageError("--check is for --format onnx and web")
    if arguments.onnxruntime_web and arguments.format != "web":
        raise UsageError("--onnxruntime_web is for --format web")
    image = read_image(arguments.check) if arguments.check else None
    vocabulary = _vocabulary(arguments)
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
    elif arguments.format == "torch":
        write_graph(folder, "model.pt2", lambda path: torch.export.save(export_network(model), path))
        write_vocabulary(model, folder, vocabulary)
        processor.save_pretrained(folder)
    else:
        write_onnx_folder(model, processor, folder, vocabulary)
        if arguments.format == "onnx":
            write_docker_files(folder)
        elif arguments.format == "web":
            write_web_page(folder, resolve_checkpoint(arguments.model), arguments.onnxruntime_web)
        elif arguments.format == "triton":
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


def _vocabulary(arguments: argparse.Namespace) -> list[list[str]] | None:
    if arguments.vocabulary is not None:
        return read_vocabulary(arguments.vocabulary)
    if arguments.classes is None:
        return None
    from modeling_ita.vocabulary import parse_classes

    try:
        return parse_classes(arguments.classes)
    except ValueError as error:
        raise ITAError(f"--classes: {one_line(error)}") from error
