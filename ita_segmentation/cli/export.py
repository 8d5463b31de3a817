"""Export a checkpoint: the network as ONNX or as a torch.export graph, a vocabulary's embeddings, and the processor.

    ita export --model models/ita-tiny --output exported --check examples/scene_1.png

The output folder gets model.onnx (or model.pt2), vocabulary.safetensors and vocabulary.json (the text embeddings of
the classes, which are inputs of the graph), and preprocessor_config.json. Another vocabulary for the same network,
without exporting it again: --vocabulary_only.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ita_segmentation.checkpoints import MODEL_HELP, load_checkpoint
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
    parser.add_argument("--format", choices=("onnx", "torch"), default="onnx", help="(default: %(default)s)")
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
    """Run the command.

    Args:
        argv: arguments; None takes the process's own.

    Raises:
        ITAError: what stops it.
    """
    arguments = build_parser().parse_command_line(argv)
    if arguments.check and arguments.format != "onnx":
        raise UsageError("--check is for --format onnx")
    image = read_image(arguments.check) if arguments.check else None
    vocabulary = _vocabulary(arguments)
    folder = output_folder(arguments.output)
    model, processor = load_checkpoint(arguments.model, "cpu")

    from ita_segmentation.export.onnx_predictor import write_vocabulary

    try:
        if not arguments.vocabulary_only:
            _write_network(model, folder, arguments.format)
        write_vocabulary(model, folder, vocabulary)
        processor.save_pretrained(folder)
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        raise ITAError(f"{arguments.model} cannot be exported: {one_line(error)}") from error
    print(f"exported: see {folder}")
    if image is not None:
        _check(model, processor, folder, image, vocabulary)
    return 0


def _write_network(model: Any, folder: Path, kind: str) -> None:
    import torch

    from ita_segmentation.export.network import export_network, to_onnx

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".exporting-") as temporary:
        if kind == "onnx":
            to_onnx(model, Path(temporary) / "model.onnx")
        else:
            torch.export.save(export_network(model), Path(temporary) / "model.pt2")
        for file in sorted(
            Path(temporary).iterdir(), reverse=True
        ):  # model.onnx.data of large models comes first
            file.replace(folder / file.name)


def _check(model: Any, processor: Any, folder: Path, image: Any, vocabulary: Any | None) -> None:
    """Print how far the exported network is from the checkpoint on an image."""
    import torch

    from ita_segmentation.export.onnx_predictor import OnnxPredictor

    predictor = OnnxPredictor(folder)
    inputs = processor(images=image, return_tensors="pt")
    with torch.inference_mode():
        expected = model(**inputs, vocabulary=vocabulary)
    found = predictor.outputs(inputs["pixel_values"], inputs["pixel_mask"])
    size = [(image.height, image.width)]
    maps = [
        processor.post_process_semantic_segmentation(one, target_sizes=size)[0] for one in (found, expected)
    ]
    for name in ("class_queries_logits", "masks_queries_logits"):
        largest = (found[name] - expected[name]).abs().max().item()
        print(
            f"{name}: largest difference {largest:.2g}, of values up to {expected[name].abs().max().item():.3g}"
        )
    print(f"pixels of the same class: {100 * (maps[0] == maps[1]).double().mean().item():.2f} %")


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
