"""Open encoded images in raster formats only."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path

from PIL import Image

from ita_segmentation.images import IMAGE_SUFFIXES


def open_image(content: bytes | str | Path) -> Image.Image:
    """Open an image as `PIL.Image.open` does, but only in a format that `IMAGE_SUFFIXES` names.

    Pillow would run Ghostscript on an EPS file, whatever the file is called.

    Args:
        content: the content of a file, or its path.

    Raises:
        PIL.UnidentifiedImageError: if it is in none of these formats.
    """
    return Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=_formats())


@lru_cache(maxsize=1)
def _formats() -> list[str]:
    registered = Image.registered_extensions()
    formats = {registered[suffix] for suffix in IMAGE_SUFFIXES if suffix in registered}
    return sorted(formats, key=lambda name: (name == "TGA", name))  # TGA has no signature
