"""The arguments of `ita predict`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from ita_segmentation.cli.options import (
    add_classes,
    add_device,
    add_dtype,
    add_model,
    add_output,
    chosen_classes,
    fraction,
    parse_names,
    positive_int,
    refuse_any,
)
from ita_segmentation.cli.parser import ConfigArgumentParser
from ita_segmentation.errors import UsageError, one_line

FORMATS = ("overlay", "labels", "segments", "coco", "coco-polygons", "label-studio", "label-studio-polygons")
DATASET_FORMATS = ("labels", "segments", "coco")
EXAMPLES_HELP = (
    'JSON of images that show classes: {"cat": [{"image": PATH, "box": [LEFT, TOP, RIGHT, BOTTOM]}, '
    '{"image": PATH, "mask": PATH}]}'
)


def build_parser() -> ConfigArgumentParser:
    """Build the parser of `ita predict`."""
    parser = ConfigArgumentParser(
        description="Segment images, videos or a dataset by the names of classes.",
        epilog='example: ita predict --model models/ita-tiny --images photos --classes "cat, sofa|couch" --output out',
    )
    group = parser.add_argument_group("input and output")
    add_model(group)
    source = group.add_mutually_exclusive_group(required=True)
    text = 'images, videos, folders of images, or patterns such as "photos/**/*.jpg" (quoted)'
    source.add_argument("--images", type=Path, nargs="+", metavar="FILE_OR_DIR", help=text)
    text = "folder of images at any depth, or a dataset -> parquet files"
    source.add_argument("--dataset", metavar="PATH_OR_NAME", help=text)
    add_output(group)
    text = (
        f"what is written: {', '.join(FORMATS)} (default: overlay labels segments; videos without labels, --dataset "
        "without overlay)"
    )
    group.add_argument("--format", nargs="+", choices=FORMATS, metavar="FORMAT", help=text)
    group.add_argument("--resume", action="store_true", help="skip images and videos whose results are there")

    group = parser.add_argument_group("what is segmented")
    add_classes(group)
    text = 'which of the classes are not countable, such as "sky, wall" ("": none)'
    group.add_argument("--stuff", metavar="NAMES", help=text)
    add, tasks = group.add_argument, ("semantic", "panoptic", "instance")
    add("--task", choices=tasks, default="semantic", help="(default: %(default)s)")
    text = "minimum score, 0 to 1, of a segment or of a pixel's class (default: 0.5; panoptic 0.8)"
    add("--threshold", type=fraction, help=text)
    text = (
        "do not let the checkpoint's own classes compete with those given (for names such as animal, of which it has "
        "kinds)"
    )
    add("--no_distractors", action="store_true", help=text)
    add("--examples", type=Path, metavar="FILE", help=EXAMPLES_HELP)
    text = (
        "of a class's N examples beside its names, 0 to 1 (default: N / (N + 4); at 1 the names say nothing)"
    )
    add("--example_weight", type=fraction, help=text)

    group = parser.add_argument_group("how it runs")
    add = group.add_argument
    add("--size", type=positive_int, help="shortest side fed to the network, in pixels")
    add("--batch_size", type=positive_int, default=1, help="images in one pass (default: 1)")
    text = (
        "cut larger images into tiles of this side, each of which the network sees by itself, at --size; --batch_size "
        "counts tiles then"
    )
    add("--tiles", type=positive_int, metavar="PIXELS", help=text)
    text = "that neighboring tiles share, at least as large as most objects (default: a quarter of --tiles)"
    add("--tile_overlap", type=int, metavar="PIXELS", help=text)
    add_device(group)
    add_dtype(group)
    add("--every", type=positive_int, help="segment only every N-th frame of a video (default: 1)")

    add = parser.add_argument_group("columns of --dataset").add_argument
    add("--split", help="may be left out where there is only one")
    add("--image_column", help="(default: image)")
    add("--id_column", help="names the rows of the results (default: the image's path)")

    add = parser.add_argument_group("what runs --dataset").add_argument
    text = "processes, one or those of accelerate or torchrun, or a Ray cluster (default: processes)"
    add("--engine", choices=("processes", "ray"), help=text)
    add("--address", help="of the Ray cluster, such as auto (default: Ray is started on this machine)")
    text = "processes with a model on the cluster (default: one for each GPU, or CPU where there is none)"
    add("--actors", type=positive_int, metavar="N", help=text)
    add("--cpus_per_actor", type=positive_int, metavar="N", help="(default: 1)")
    return parser


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line, and read what it names.

    Beside the options themselves, the result has `vocabulary` (classes, or None for the checkpoint's own), `stuff`
    (names, or None for the checkpoint's), `examples` and `tiling`.
    """
    arguments = build_parser().parse_command_line(argv)
    _check_combinations(arguments)
    arguments.tiling = None
    if arguments.tiles is not None or arguments.tile_overlap is not None:
        from modeling_ita.tiling import tiling_of

        try:
            arguments.tiling = tiling_of(arguments.tiles, arguments.tile_overlap)
        except ValueError as error:
            raise UsageError(f"--tiles, --tile_overlap: {one_line(error)}") from error
    arguments.vocabulary = chosen_classes(arguments)
    if arguments.stuff is not None:
        stuff = parse_names(arguments.stuff, "--stuff") if arguments.stuff.strip() else []
        arguments.stuff = [name for names in stuff for name in names]
    if arguments.examples is not None:
        from ita_segmentation.prediction.examples import read_examples

        arguments.examples = read_examples(arguments.examples)
    return arguments


def _check_combinations(arguments: argparse.Namespace) -> None:
    on_ray, is_dataset = arguments.engine == "ray", arguments.dataset is not None
    unknown = next((one for one in arguments.format or () if one not in DATASET_FORMATS), None)
    dataset_only = () if is_dataset else ("split", "image_column", "id_column", "engine")
    ray_only = () if on_ray else ("address", "actors", "cpus_per_actor")
    for other, names in (("--dataset", dataset_only), ("--engine ray", ray_only)):
        for name in names:
            if getattr(arguments, name) is not None:
                raise UsageError(f"--{name} is for {other}")
    problems = {
        "--every is for videos, which --images takes": is_dataset and arguments.every is not None,
        f"--dataset writes {', '.join(DATASET_FORMATS)}, not {unknown}": is_dataset and unknown,
        "--example_weight is for --examples": arguments.example_weight is not None
        and arguments.examples is None,
        "--engine ray chooses the devices: leave out --device": on_ray and arguments.device is not None,
        "--engine ray starts its own processes: run it as one": on_ray
        and int(os.environ.get("WORLD_SIZE", "1")) > 1,
    }
    refuse_any(problems)
