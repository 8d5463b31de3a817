"""Find, open, read and encode image files."""

import io
import struct
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image

from ita_segmentation.errors import ITAError
from ita_segmentation.files import path_text

IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm",
    ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
"""What is taken for an image in a folder."""
DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    struct.error,
)
"""What Pillow's decoders raise on files that are cut off or made of something else."""


def find_images(sources: Sequence[Path]) -> list[Path]:
    """List the files given and the images directly in the folders given, in order, each once."""
    found: dict[Path, Path] = {}
    for source in sources:
        if source.is_dir():
            inside = [
                path
                for path in sorted(source.iterdir())
                if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and not path.name.startswith(".")
            ]
            if not inside:
                raise ITAError(f"no images in the folder {path_text(source)}")
        elif source.is_file():
            inside = [source]
        elif source.exists():
            raise ITAError(f"{path_text(source)} is not a regular file")
        else:
            raise ITAError(f"no such image or folder: {path_text(source)}")
        for path in inside:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def open_image(content: bytes | str | Path) -> Image.Image:
    """Open an image as `PIL.Image.open` does, but only in a format that `IMAGE_SUFFIXES` names.

    Pillow would run Ghostscript on an EPS file, whatever the file is called. This is `modeling_ita.image_io.open_image`
    for code that reads images without importing torch.

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


def read_image(path: Path) -> Image.Image:
    """Read an image as a person sees it: upright, RGB, 8 bits.

    Raises:
        ITAError: it is empty, cut off, not an image, of a kind that Pillow cannot decode, or too large.
    """
    from modeling_ita.image_io import read_image as decode

    try:
        return decode(path)
    except ValueError as error:
        raise ITAError(str(error)) from error


def png_bytes(image: Image.Image) -> bytes:
    """Encode an image as a PNG file."""
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()
