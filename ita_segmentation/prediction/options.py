"""The arguments of `run_predict.py`, checked."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ita_segmentation.class_names import read_vocabulary
from ita_segmentation.cli.parser import ConfigArgumentParser, fraction, positive_int
from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.prediction.segmenter import TASKS

FORMATS = ("overlay", "labels", "segments", "coco")


def build_parser() -> ConfigArgumentParser:
    parser = ConfigArgumentParser(
        description="Segments images, videos and data sets by the words of a vocabulary."
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--images",
        type=Path,
        nargs="+",
        metavar="FILE_OR_DIR",
        help='images, folders of them, patterns such as "photos/**/*.jpg" (quoted), or videos',
    )
    source.add_argument(
        "--dataset",
        metavar="PATH_OR_NAME",
        help="folder of images at any depth, or a data set; the results are parquet files, and a run that was "
        "interrupted goes on; with `accelerate launch` processes share the work",
    )
    words = parser.add_mutually_exclusive_group()
    words.add_argument(
        "--classes", help='such as "cat, sofa|couch, wall"; without, the checkpoint\'s own classes'
    )
    words.add_argument(
        "--vocabulary", type=Path, metavar="FILE", help="JSON list of classes, or lines id:name,synonym,..."
    )
    parser.add_argument("--task", choices=TASKS, default="semantic")
    parser.add_argument(
        "--threshold",
        type=fraction,
        help="least score of a segment, panoptic (default 0.8) and instance (0.5)",
    )
    parser.add_argument(
        "--size", type=positive_int, help="shortest side fed to the network (the checkpoint's own)"
    )
    parser.add_argument("--batch_size", type=positive_int, default=1, help="images in one pass (1)")
    parser.add_argument(
        "--format",
        nargs="+",
        choices=FORMATS,
        metavar="FORMAT",
        help="what is written: overlay, labels, segments, coco (run lengths; default: overlay labels segments; "
        "without labels for videos, without overlay for --dataset)",
    )
    parser.add_argument("--every", type=positive_int, help="of a video only every N-th frame (1)")
    parser.add_argument(
        "--resume", action="store_true", help="pass over images and videos whose results are there"
    )
    parser.add_argument("--split", help="of --dataset; may be left out where there is only one")
    parser.add_argument("--image_column", help="of --dataset (image)")
    parser.add_argument("--id_column", help="of --dataset: names the rows of the results (the image's path)")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    return parser


def read_options(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[list[str]] | None]:
    """The arguments and their vocabulary (None: the checkpoint's own).

    Raises:
        ITAError: if one of them does not fit.
    """
    arguments = build_parser().parse_command_line(argv)
    vocabulary = _vocabulary(arguments)
    if arguments.threshold is not None and arguments.task == "semantic":
        raise ITAError("--threshold is for the tasks panoptic and instance")
    if arguments.dataset is None:
        for name in ("split", "image_column", "id_column"):
            if getattr(arguments, name) is not None:
                raise ITAError(f"--{name} is for --dataset")
        return arguments, vocabulary
    if arguments.every is not None:
        raise ITAError("--every is for videos, which --images takes")
    if "overlay" in (arguments.format or ()):
        raise ITAError("--dataset writes labels, segments and coco, not overlay")
    return arguments, vocabulary


def _vocabulary(arguments: Any) -> list[list[str]] | None:
    if arguments.vocabulary is not None:
        return read_vocabulary(arguments.vocabulary)
    if arguments.classes is None:
        return None
    from modeling_ita.vocabulary import parse_classes

    try:
        return parse_classes(arguments.classes)
    except ValueError as error:
        raise ITAError(f"--classes: {one_line(error)}") from error
