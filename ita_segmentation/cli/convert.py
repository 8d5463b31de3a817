"""Convert a published checkpoint of ITA, FC-CLIP, MAFT+ or Mask-Adapter into one that transformers loads.

    ita convert fc-clip-convnext-large --output models/fc-clip
    ita convert --checkpoint model.pth --clip_model convnext_large_d_320 --vocabulary classes.txt --output models/mine

The first form downloads a checkpoint that `ita models` lists; with --checkpoint it takes a file that is there already.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ita_segmentation.class_names import read_vocabulary
from ita_segmentation.cli.options import add_output, add_vocabulary
from ita_segmentation.cli.parser import ConfigArgumentParser
from ita_segmentation.errors import ITAError, UsageError
from ita_segmentation.files import atomic_path, output_folder, parse_mapping, read_mapping
from ita_segmentation.hub.registry import PublishedCheckpoint, published_checkpoint

CLIP_HELP = (
    "weights of its CLIP, for a checkpoint without them: a folder, MODEL:TAG of open_clip's list, or hf-hub:OWNER/NAME "
    "(default with NAME: the one it was trained with)"
)

MASK_ADAPTER_SIZE = {"shortest_edge": 896, "longest_edge": 896}
"""The size at which all published checkpoints with a mask adapter are tested."""


def build_parser() -> ConfigArgumentParser:
    """Build the parser of the command."""
    parser = ConfigArgumentParser(
        description="Convert a published checkpoint of ITA, FC-CLIP, MAFT+ or Mask-Adapter."
    )
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="published checkpoint, see `ita models`")
    text = "original checkpoint: .pth, .pkl or .safetensors"
    add("--checkpoint", type=Path, metavar="FILE", help=text)
    text = (
        "open_clip's name of its CLIP (convnext_large_d_320, RN50-quickgelu, ...), or a JSON file with its "
        "configuration"
    )
    add("--clip_model", metavar="NAME_OR_JSON", help=text)
    add("--clip", metavar="SOURCE", help=CLIP_HELP)
    add_vocabulary(parser, "its default classes")
    text = "classes seen in training (default: --vocabulary)"
    add("--train_vocabulary", type=Path, metavar="FILE", help=text)
    text = "fields of ITAConfig that no tensor shows, as JSON or YAML, such as '{text_transfer: post_norm}'"
    add("--model_config", metavar="MAPPING", help=text)
    add("--sha256", metavar="HEX", help="checksum that the downloaded file must have")
    add_output(parser, "folder of the converted checkpoint")
    return parser


def convert(argv: Sequence[str] | None = None) -> int:
    """Convert a checkpoint; the output folder is complete or not there."""
    arguments = build_parser().parse_command_line(argv)
    published = published_checkpoint(arguments.name) if arguments.name else None
    if published is None and not (arguments.checkpoint and arguments.clip_model and arguments.vocabulary):
        raise UsageError(
            "give the NAME of a published checkpoint, or --checkpoint, --clip_model and --vocabulary"
        )
    output = output_folder(arguments.output)
    if output.exists() and any(output.iterdir()):
        raise ITAError(f"{output} exists and is not empty")
    vocabulary, train_vocabulary, overrides = _classes(arguments, published)
    overrides |= parse_mapping(arguments.model_config or "", "--model_config")
    clip_model = _clip_model(arguments, published)

    from ita_segmentation.conversion import convert_checkpoint, lacks_clip, load_original, system_name
    from ita_segmentation.hub.download import download

    file = arguments.checkpoint
    if file is None and published is not None:
        file = download(published.url, f"{published.name}.pth", arguments.sha256 or published.sha256)
    tensors = load_original(file)
    clip_weights = None
    source = arguments.clip or (published.clip if published and lacks_clip(tensors) else None)
    if source:
        from ita_segmentation.training import read_clip

        description, clip_weights = read_clip(source)
        if arguments.clip_model is None:
            clip_model, overrides["clip_model_name"] = description["model_cfg"], description["name"]
    model = convert_checkpoint(tensors, clip_model, vocabulary, train_vocabulary, clip_weights, **overrides)
    kind = system_name(tensors)
    del tensors, clip_weights
    _save(model, output, published)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{output}: {kind}, {millions:.1f} M parameters, {len(vocabulary)} classes")
    return 0


def _classes(
    arguments: argparse.Namespace, published: PublishedCheckpoint | None
) -> tuple[list[list[str]], list[list[str]] | None, dict[str, Any]]:
    """Default vocabulary, training vocabulary, and fields of the configuration that no tensor shows."""
    overrides: dict[str, Any] = {}
    trained = read_vocabulary(arguments.train_vocabulary) if arguments.train_vocabulary else None
    if published is not None:
        from ita_segmentation.data.categories import load_categories

        categories = load_categories(published.train_vocabulary)
        names = [[name.strip() for name in category.name.split(",")] for category in categories]
        trained = trained or names
        stuff = [
            row[0] for row, category in zip(names, categories, strict=True) if category.is_thing is False
        ]
        overrides = {**published.config, "stuff_names": stuff, "domain": published.domain}
    vocabulary = read_vocabulary(arguments.vocabulary) if arguments.vocabulary else trained
    assert vocabulary is not None
    return vocabulary, trained, overrides


def _clip_model(arguments: argparse.Namespace, published: PublishedCheckpoint | None) -> str | dict[str, Any]:
    """The name of the CLIP, or its configuration from a JSON file."""
    name = arguments.clip_model
    if name is None:
        assert published is not None
        return published.clip.partition(":")[0]
    if not name.endswith(".json"):
        return name
    content = read_mapping(Path(name))
    return content.get("model_cfg", content)


def _save(model: Any, output: Path, published: PublishedCheckpoint | None) -> None:
    from modeling_ita.checkpoint_code import write_model_card
    from modeling_ita.image_processing_ita import ITAImageProcessor

    metadata = {"license": published.license} if published else None
    size = published.size if published else None
    if published is None and model.config.mask_pooling == "adapter":
        size = MASK_ADAPTER_SIZE
    with atomic_path(output) as folder:
        try:
            model.save_pretrained(folder)
            ITAImageProcessor(**{"size": dict(size)} if size else {}).save_pretrained(folder)
            write_model_card(folder, model.config.to_dict(), output.name, metadata=metadata)
        except OSError as error:
            raise ITAError(f"cannot write {output}: {error.strerror or error}") from error
