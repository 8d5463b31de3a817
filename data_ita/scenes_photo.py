"""What makes a Scenes picture photo-like: colour jitter, lighting, materials, blur, sensor noise, compression."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from .scenes_textures import noise

BANK = 512
BANK_TAG = 7_002
BLUR, NOISE, COMPRESSION = 0.35, 0.65, 0.25
"""Probabilities of the three defects."""

_LUMA = np.array([0.299, 0.587, 0.114])
_GRAY = np.tile(_LUMA, (3, 1))
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_RGB = np.linalg.inv(_YIQ)


@lru_cache(maxsize=1)
def smooth_bank() -> np.ndarray:
    """Smooth noise (BANK, BANK) float32, zero mean, unit variance: borders and shades."""
    return noise(np.random.default_rng([BANK_TAG, 0]), 1.7, side=BANK)


@lru_cache(maxsize=1)
def _sensor_bank() -> np.ndarray:
    return np.random.default_rng([BANK_TAG, 1]).standard_normal((BANK, BANK, 3), dtype=np.float32)


@lru_cache(maxsize=1)
def _materials() -> list[Image.Image]:
    """Surfaces of things: grey images (BANK, BANK), 255 leaves the colour as it is."""
    rng = np.random.default_rng([BANK_TAG, 2])
    y, x = np.mgrid[:BANK, :BANK].astype(np.float32)
    fields = [
        noise(rng, 1.6, side=BANK),
        noise(rng, 0.3, side=BANK),
        noise(rng, 1.0, stretch=40, side=BANK),
        noise(rng, 1.0, stretch=1 / 40, side=BANK),
        1.3 * np.sin((x + y) * 0.7),
        1.3 * np.sin(x * 0.9) * np.sin(y * 0.9) + 0.5 * noise(rng, 1.0, side=BANK),
    ]
    return [Image.fromarray(np.clip(222 + 22 * field, 0, 255).astype(np.uint8)) for field in fields]


def color_matrix(rng: np.random.Generator, degrees: float, saturation: float, gain: float) -> tuple[float, ...]:
    """A random mild change of hue (up to +-degrees), saturation and brightness (relative, +-) for `convert`."""
    angle, s, g, red, blue, lift = rng.uniform(-1, 1, 6)
    angle = np.radians(degrees) * angle
    cos, sin = np.cos(angle), np.sin(angle)
    hue = _RGB @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ _YIQ
    s = 1 + saturation * s
    matrix = (1 + gain * g) * (s * hue + (1 - s) * _GRAY)
    matrix *= np.array([[1 + 0.06 * red], [1.0], [1 + 0.06 * blue]])
    return tuple(np.column_stack([matrix, np.full(3, 8 * lift)]).ravel().tolist())


def give_material(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """An "RGB" thing with a surface: fabric, brushed, speckled, ... (strength and place at random)."""
    materials = _materials()
    surface = materials[int(rng.integers(len(materials)))]
    left, top = (int(rng.integers(max(BANK - side, 1))) for side in image.size)
    patch = surface.crop((left, top, left + image.width, top + image.height))
    if max(image.size) > BANK:
        patch = surface.resize(image.size)
    return Image.blend(image, ImageChops.multiply(image, patch.convert("RGB")), float(rng.uniform(0.3, 1.0)))


def photograph(rng: np.random.Generator, image: Image.Image) -> np.ndarray:
    """Light falling off across the picture, then maybe blur, noise and compression; (H, W, 3) uint8."""
    short = min(image.size)
    blur, grainy, compress = rng.random(3) < (BLUR, NOISE, COMPRESSION)
    if blur:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.0)) * (short / 192) ** 0.5))
    pixels = np.asarray(image, np.float32)
    height, width = pixels.shape[:2]
    slope_x, slope_y, curve = rng.uniform(-1, 1, 3)
    across = np.linspace(-1, 1, width, dtype=np.float32)
    down = np.linspace(-1, 1, height, dtype=np.float32)
    light = (0.16 * slope_x * across + 0.97 - 0.06 * abs(curve) * across**2)[None] + (0.16 * slope_y * down)[:, None]
    pixels = pixels * light[..., None]
    if grainy:
        pixels += _grain(rng, height, width) * np.float32(rng.uniform(2, 11))
    picture = np.clip(pixels, 0, 255).astype(np.uint8)
    if compress:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=int(rng.integers(35, 90)))
        picture = np.asarray(Image.open(buffer))
    return picture


def _grain(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    if max(height, width) > BANK:
        return rng.standard_normal((height, width, 3), dtype=np.float32)
    top, left = int(rng.integers(BANK - height + 1)), int(rng.integers(BANK - width + 1))
    return _sensor_bank()[top : top + height, left : left + width]
