"""The arguments of `ita predict`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ita_segmentation.checkpoints import DTYPE_HELP, DTYPES, MODEL_HELP
from ita_segmentation.class_names import read_vocabulary
from ita_segmentation.cli.parser import ConfigArgumentParser, fraction, positive_int
from ita_segmentation.errors import UsageError, one_line

TASKS = ("semantic", "panoptic", "instance")
FORMATS = ("overlay", "labels", "segments", "coco", "coco-polygons", "label-studio", "label-studio-polygons")
DATASET_FORMATS = ("labels", "segments", "coco")
DATASET_OPTIONS = ("split", "image_column", "id_column", "engine")
ENGINES = ("processes", "ray")
RAY_OPTIONS = ("address", "actors", "cpus_per_actor")


def build_parser() -> ConfigArgumentParser:
    """Build the parser of `ita predict`."""
    parser = ConfigArgumentParser(
        description="Segment images, videos or a dataset by the names of classes.",
        epilog='example: ita predict --model models/ita-tiny --images photos --classes "cat, sofa|couch" --output out',
    )
    basic = parser.add_argument_group("input and output")
    basic.add_argument("--model", required=True, metavar="DIR_OR_ID", help=MODEL_HELP)
    source = basic.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--images",
        type=Path,
        nargs="+",
        metavar="FILE_OR_DIR",
        help='images, videos, folders of images, or patterns such as "photos/**/*.jpg" (quoted)',
    )
    source.add_argument(
        "--dataset",
        metavar="PATH_OR_NAME",
        help="folder of images at any depth, or a dataset -> parquet files",
    )
    basic.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    basic.add_argument(
        "--format",
        nargs="+",
        choices=FORMATS,
        metavar="FORMAT",
        help=f"what is written: {', '.join(FORMATS)} (default: overlay labels segments; videos without labels, "
        "--dataset without overlay)",
    )
    basic.add_argument("--resume", action="store_true", help="skip images and videos whose results are there")

    what = parser.add_argument_group("what is segmented")
    names = what.add_mutually_exclusive_group()
    names.add_argument(
        "--classes", help='such as "cat, sofa|couch, wall" (default: the checkpoint\'s own classes)'
    )
    names.add_argument(
        "--vocabulary", type=Path, metavar="FILE", help="JSON list of classes, or lines id:name,synonym,..."
    )
    what.add_argument(
        "--stuff", metavar="NAMES", help='which of the classes are not countable, such as "sky, wall"'
    )
    what.add_argument("--task", choices=TASKS, default="semantic", help="(default: %(default)s)")
    what.add_argument(
        "--threshold",
        type=fraction,
        help="minimum score, 0 to 1, of a segment or of a pixel's class (default: semantic and instance 0.5, "
        "panoptic 0.8)",
    )
    what.add_argument(
        "--no_distractors",
        action="store_true",
        help="do not let the checkpoint's own classes compete with those given (for names such as animal, of which "
        "it has kinds)",
    )

    what.add_argument(
        "--examples",
        type=Path,
        metavar="FILE",
        help='JSON of images that show classes: {"cat": [{"image": PATH, "box": [LEFT, TOP, RIGHT, BOTTOM]}, '
        '{"image": PATH, "mask": PATH}]}',
    )
    what.add_argument(
        "--example_weight",
        type=fraction,
        help="of a class's N examples beside its names, 0 to 1 (default: N / (N + 4); at 1 the names say nothing)",
    )

    how = parser.add_argument_group("how it runs")
    how.add_argument("--size", type=positive_int, help="shortest side fed to the network, in pixels")
    how.add_argument("--batch_size", type=positive_int, default=1, help="images in one pass (default: 1)")
    how.add_argument(
        "--tiles",
        type=positive_int,
        metavar="PIXELS",
        help="cut larger images into tiles of this side, each of which the network sees by itself, at --size; "
        "--batch_size counts tiles then",
    )
    how.add_argument(
        "--tile_overlap",
        type=int,
        metavar="PIXELS",
        help="that neighboring tiles share, at least as large as most objects (default: a quarter of --tiles)",
    )
    how.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    how.add_argument("--dtype", choices=DTYPES, default="float32", metavar="DTYPE", help=DTYPE_HELP)
    how.add_argument(
        "--every", type=positive_int, help="segment only every N-th frame of a video (default: 1)"
    )

    dataset = parser.add_argument_group("columns of --dataset")
    dataset.add_argument("--split", help="may be left out where there is only one")
    dataset.add_argument("--image_column", help="(default: image)")
    dataset.add_argument("--id_column", help="names the rows of the results (default: the image's path)")

    engine = parser.add_argument_group("what runs --dataset")
    engine.add_argument(
        "--engine",
        choices=ENGINES,
        help="processes, one or those of accelerate or torchrun, or a Ray cluster (default: processes)",
    )
    engine.add_argument(
        "--address", help="of the Ray cluster, such as auto (default: Ray is started on this machine)"
    )
    engine.add_argument(
        "--actors",
        type=positive_int,
        metavar="N",
        help="processes with a model on the cluster (default: one for each GPU, or CPU where there is none)",
    )
    engine.add_argument("--cpus_per_actor", type=positive_int, metavar="N", help="(default: 1)")
    return parser


def read_options(
    argv: Sequence[str] | None,
) -> tuple[argparse.Namespace, list[list[str]] | None, list[str] | None]:
    """Parse and check the command line."""
    arguments = build_parser().parse_command_line(argv)
    formats = arguments.format or ()
    if arguments.dataset is None:
        for name in DATASET_OPTIONS:
            if getattr(arguments, name) is not None:
                raise UsageError(f"--{name} is for --dataset")
    elif arguments.every is not None:
        raise UsageError("--every is for videos, which --images takes")
    elif any(one not in DATASET_FORMATS for one in formats):
        unknown = next(one for one in formats if one not in DATASET_FORMATS)
        raise UsageError(f"--dataset writes {', '.join(DATASET_FORMATS)}, not {unknown}")
    if arguments.example_weight is not None and arguments.examples is None:
        raise UsageError("--example_weight is for --examples")
    _check_engine(arguments)
    arguments.tiling = _tiling(arguments)
    vocabulary = None if arguments.classes is None else parse_names(arguments.classes, "--classes")
    if arguments.vocabulary is not None:
        vocabulary = read_vocabulary(arguments.vocabulary)
    stuff = None
    if arguments.stuff is not None:
        stuff = [name for names in parse_names(arguments.stuff, "--stuff") for name in names]
    if arguments.examples is not None:
        from ita_segmentation.prediction.examples import read_examples

        arguments.examples = read_examples(arguments.examples)
    return arguments, vocabulary, stuff


def _check_engine(arguments: argparse.Namespace) -> None:
    if arguments.engine != "ray":
        for name in RAY_OPTIONS:
            if getattr(arguments, name) is not None:
                raise UsageError(f"--{name} is for --engine ray")
    elif arguments.device is not None:
        raise UsageError("--engine ray chooses the devices: leave out --device")
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("--engine ray starts its own processes: run it as one")


def _tiling(arguments: argparse.Namespace) -> Any:
    if arguments.tiles is None and arguments.tile_overlap is None:
        return None
    from modeling_ita.tiling import tiling_of

    try:
        return tiling_of(arguments.tiles, arguments.tile_overlap)
    except ValueError as error:
        raise UsageError(f"--tiles, --tile_overlap: {one_line(error)}") from error


def parse_names(text: str, option: str) -> list[list[str]]:
    """Parse "cat, sofa|couch"."""
    from modeling_ita.vocabulary import parse_classes

    try:
        return parse_classes(text)
    except ValueError as error:
        raise UsageError(f"{option}: {one_line(error)}") from error
