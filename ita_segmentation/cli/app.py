"""Serve a web page that segments images by the class names typed: `ita app`.

ita app --model models/ita-tiny
ita app --model models/ita-tiny --write_space my_space    # a folder to upload as a Hugging Face Space
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ita_segmentation.checkpoints import load_checkpoint, resolve_checkpoint
from ita_segmentation.cli.options import add_device, add_dtype, add_model, positive_int
from ita_segmentation.cli.parser import ConfigArgumentParser
from ita_segmentation.files import output_folder

ROOT = Path(__file__).resolve().parents[2]


def build_parser() -> ConfigArgumentParser:
    """Build the parser of `ita app`."""
    parser = ConfigArgumentParser(
        description="Serve a web page that segments images by the class names typed."
    )
    group = parser.add_argument_group("what is served")
    add_model(group)
    text = "what the page's Python lines call the checkpoint (default: --model)"
    group.add_argument("--model_name", help=text)
    add_device(group)
    add_dtype(group)
    text = "write a Space with this model to a new folder, and stop"
    group.add_argument("--write_space", type=Path, metavar="DIR", help=text)
    add = parser.add_argument_group("where").add_argument
    add("--host", default="127.0.0.1", help="0.0.0.0 for all machines (default: %(default)s)")
    add("--port", type=positive_int, help="(default: the first free one from 7860)")
    add("--share", action="store_true", help="also a public URL, through Gradio's servers")
    limits = parser.add_argument_group("limits")
    for name, default, text in (
        ("max_pixels", 25_000_000, "pixels of an image"),
        ("max_names", 1_000, "class names of a request, synonyms included"),
        ("max_characters", 20_000, "characters of a request's class names"),
        ("max_upload_mb", 30, "size of a file, in megabytes"),
        ("concurrency", 2, "requests worked on at the same time"),
        ("max_waiting", 64, "requests that may wait in line"),
    ):
        limits.add_argument(
            f"--{name}", type=positive_int, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    return parser


def serve(argv: Sequence[str] | None = None) -> int:
    """Run the command; it serves until it is interrupted."""
    arguments = build_parser().parse_command_line(argv)
    if arguments.write_space is not None:
        from ita_segmentation.app.space import write_space

        checkpoint = resolve_checkpoint(arguments.model)
        write_space(output_folder(arguments.write_space), checkpoint, ROOT, arguments.model_name)
        print(f"A Space is in {arguments.write_space}: upload that folder, or run app.py there.")
        return 0
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    from ita_segmentation.app import server
    from ita_segmentation.app.class_names import NameLimits
    from ita_segmentation.app.segmenter import Limits

    model, processor = load_checkpoint(arguments.model, arguments.device, arguments.dtype)
    names = NameLimits(names=arguments.max_names, total_characters=arguments.max_characters)
    options = server.ServerOptions(
        host=arguments.host,
        port=arguments.port,
        share=arguments.share,
        max_upload_mb=arguments.max_upload_mb,
        concurrency=arguments.concurrency,
        max_waiting=arguments.max_waiting,
        examples=server.find_examples(resolve_checkpoint(arguments.model) / "examples", ROOT / "examples"),
    )
    limits = Limits(max_pixels=arguments.max_pixels, names=names)
    server.serve(model, processor, arguments.model_name or arguments.model, limits, options)
    return 0
