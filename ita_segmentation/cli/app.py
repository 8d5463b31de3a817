"""A web page that segments images by the words typed. It is also a Space: `--write_space` writes its folder.

python run_app.py --model models/ita-tiny
python run_app.py --model models/ita-tiny --write_space my_space
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ita_segmentation.checkpoints import load_checkpoint
from ita_segmentation.cli.parser import ConfigArgumentParser, positive_int, run_command
from ita_segmentation.errors import ITAError
from ita_segmentation.files import output_folder

ROOT = Path(__file__).resolve().parents[2]


def build_parser() -> ConfigArgumentParser:
    parser = ConfigArgumentParser(description="A web page that segments images by the words typed.")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint folder")
    parser.add_argument("--model_name", help="what the page's Python lines call the checkpoint (its folder)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all (%(default)s)"
    )
    parser.add_argument("--port", type=positive_int, help="port to listen at (the first free one from 7860)")
    parser.add_argument(
        "--max_pixels", type=positive_int, default=25_000_000, help="most pixels of an image (%(default)s)"
    )
    parser.add_argument(
        "--max_classes", type=positive_int, default=2_000, help="most class words of a request (%(default)s)"
    )
    parser.add_argument(
        "--max_upload_mb", type=positive_int, default=30, help="largest file, in megabytes (%(default)s)"
    )
    parser.add_argument(
        "--concurrency",
        type=positive_int,
        default=2,
        help="requests worked on at the same time (%(default)s)",
    )
    parser.add_argument(
        "--max_waiting", type=positive_int, default=64, help="requests that may wait in line (%(default)s)"
    )
    parser.add_argument(
        "--share", action="store_true", help="also a public address, through Gradio's servers"
    )
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    parser.add_argument(
        "--write_space",
        type=Path,
        metavar="DIR",
        help="write a Space with this model to a new folder, and stop",
    )
    return parser


def main() -> NoReturn:
    """The door: the process's arguments in, its exit status out."""
    run_command(serve)


def serve(argv: Sequence[str] | None = None) -> int:
    """Does what the arguments say; serves until interrupted.

    Raises:
        ITAError: what stops everything, in one line.
    """
    arguments = build_parser().parse_command_line(argv)
    if arguments.write_space is not None:
        from ita_segmentation.app.space import write_space

        write_space(output_folder(arguments.write_space), arguments.model, ROOT, arguments.model_name)
        print(f"A Space is in {arguments.write_space}: upload that folder, or run app.py there.")
        return 0
    launch(arguments)
    return 0


def prepare(arguments: Any) -> Any:
    """The page (`gradio.Blocks`), with the checkpoint loaded.

    Raises:
        ITAError: if the checkpoint cannot be loaded, or Gradio is missing.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        from ita_segmentation.app.page import build_page, example_images
    except ImportError as error:
        raise ITAError(
            f"the page needs more packages: pip install 'ita-segmentation[app]' ({error})"
        ) from error
    from ita_segmentation.app.segmenter import Limits, PageSegmenter

    model, processor = load_checkpoint(arguments.model, arguments.device)
    limits = Limits(arguments.max_pixels, arguments.max_classes)
    segmenter = PageSegmenter(model, processor, arguments.model_name or str(arguments.model), limits)
    examples = example_images(arguments.model, ROOT / "examples")
    return build_page(segmenter, examples, arguments.concurrency, arguments.max_waiting)


def launch(arguments: Any) -> None:
    """Serves the page until interrupted.

    Raises:
        ITAError: see `prepare`; and if the port is taken.
    """
    page = prepare(arguments)
    from ita_segmentation.app.page import example_images, page_style

    examples = example_images(arguments.model, ROOT / "examples")
    try:
        page.launch(
            allowed_paths=[str(path.resolve()) for path in examples],
            server_name=arguments.host,
            server_port=arguments.port,
            share=arguments.share,
            max_file_size=arguments.max_upload_mb * 1_000_000,
            run_history=False,
            ssr_mode=False,
            **page_style(),
        )
    except OSError as error:
        raise ITAError(f"cannot serve at {arguments.host}: {error}") from error
