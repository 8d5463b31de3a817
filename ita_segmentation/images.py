"""Find and read image files."""

import struct
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ita_segmentation.errors import ITAError

IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)
# What Pillow's decoders raise on files that are cut off or made of something else.
DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
)


def find_images(sources: Sequence[Path]) -> list[Path]:
    """Files as given and the images directly in the folders given, in order, each once.

    Raises:
        ITAError: if a source does not exist or a folder holds no image.
    """
    found: dict[Path, Path] = {}
    for source in sources:
        if source.is_dir():
            inside = [
                path
                for path in sorted(source.iterdir())
                if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and not path.name.startswith(".")
            ]
            if not inside:
                raise ITAError(f"no images in the folder {source}")
        elif source.exists():
            inside = [source]
        else:
            raise ITAError(f"no such image or folder: {source}")
        for path in inside:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def read_image(path: Path) -> Image.Image:
    """An image as a person sees it: upright, RGB, 8 bits.

    Raises:
        ITAError: if it is empty, cut off, no image, of a kind that Pillow cannot decode, or has more pixels than
            `image_processing_ita.MAX_IMAGE_PIXELS`.
    """
    from modeling_ita.image_processing_ita import read_image as decode

    try:
        return decode(path)
    except ValueError as error:
        raise ITAError(str(error)) from error
