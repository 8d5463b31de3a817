"""Serve the page."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ita_segmentation.app.page import Example, build_page, page_style
from ita_segmentation.app.segmenter import GradioSegmenter, Limits
from ita_segmentation.app.uploads import upload_folder
from ita_segmentation.checkpoints import domain_notice
from ita_segmentation.errors import ITAError
from ita_segmentation.images import IMAGE_SUFFIXES

MAX_EXAMPLES = 8
CLASSES_FILE = "classes.json"
"""In a folder of examples: the class names that go with each image, {"image.png": "cat, sofa|couch"}."""
TERMINATED = 143


@dataclass(frozen=True)
class ServerOptions:
    """How the page is served."""

    host: str = "127.0.0.1"
    port: int | None = None
    share: bool = False
    max_upload_mb: int = 30
    concurrency: int = 2
    max_waiting: int = 64
    examples: Sequence[Example] = field(default_factory=list)


def find_examples(*folders: Path) -> list[Example]:
    """List the images of the first of some folders that has any, in the order of their names, with their classes."""
    for folder in folders:
        found = sorted(folder.glob("*")) if folder.is_dir() else []
        found = [path for path in found if path.suffix.lower() in IMAGE_SUFFIXES][:MAX_EXAMPLES]
        if found:
            named = folder / CLASSES_FILE
            classes = json.loads(named.read_text(encoding="utf-8")) if named.is_file() else {}
            return [Example(path, classes.get(path.name, "")) for path in found]
    return []


def build(model: Any, processor: Any, checkpoint: str, limits: Limits, options: ServerOptions) -> Any:
    """Build the page (`gradio.Blocks`) for a loaded checkpoint.

    The checkpoint's own classes are encoded first, so that the first request does not wait for them. Class names that
    somebody types are never written to the disk.
    """
    if model.default_vocabulary is not None:
        model.encode_vocabulary()
    model.text_encoder.use_disk = False
    segmenter = GradioSegmenter(model, processor, checkpoint, limits, notice=domain_notice(model.config))
    return build_page(segmenter, options.examples, options.concurrency, options.max_waiting)


def serve(
    model: Any,
    processor: Any,
    checkpoint: str,
    limits: Limits,
    options: ServerOptions,
    announce: Callable[[str], object] = print,
) -> NoReturn:
    """Serve the page until the process is interrupted or terminated; the uploads are deleted then."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    chosen = os.environ.get("GRADIO_TEMP_DIR")
    with upload_folder(Path(chosen) if chosen else None) as uploads:
        os.environ["GRADIO_TEMP_DIR"] = str(uploads)
        page = build(model, processor, checkpoint, limits, options)
        try:
            _, local_url, share_url = page.launch(
                allowed_paths=[str(example.path.resolve()) for example in options.examples],
                server_name=options.host,
                server_port=options.port,
                share=options.share,
                max_file_size=options.max_upload_mb * 1_000_000,
                run_history=False,
                ssr_mode=False,
                quiet=True,
                prevent_thread_lock=True,
                **page_style(),
            )
        except OSError as error:
            raise ITAError(f"cannot serve at {options.host}: {error}") from error
        announce(f"Serving at {share_url or local_url} (Ctrl-C ends it)")
        try:
            while True:
                threading.Event().wait()
        finally:
            page.close(verbose=False)


def _terminate(number: int, frame: Any) -> NoReturn:
    raise SystemExit(TERMINATED)
