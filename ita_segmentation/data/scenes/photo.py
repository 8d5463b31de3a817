"""What makes an image of Scenes photo-like: color jitter, lighting, materials, blur, sensor noise, compression."""

import io
import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from ita_segmentation.data.scenes.textures import noise

BANK = 512
BANK_TAG = 7_002
BLUR, NOISE, COMPRESSION = 0.35, 0.65, 0.25  # probabilities of the three defects

_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_TURNS = np.array(
    [np.diag([1, 0, 0]), np.diag([0, 1, 1]), [[0, 0, 0], [0, 0, -1], [0, 1, 0]], np.zeros((3, 3))]
)
_HUE_BASIS = np.pad(np.linalg.inv(_YIQ) @ _TURNS @ _YIQ, ((0, 0), (0, 0), (0, 1))).reshape(4, 12)
"""What gray, cosine and sine of a hue rotation add to a 3 x 4 color matrix."""


@lru_cache(maxsize=1)
def smooth_bank() -> np.ndarray:
    """Make smooth noise (BANK, BANK) float32, zero mean, unit variance, for borders."""
    return noise(np.random.default_rng([BANK_TAG, 0]), 1.7, side=BANK)


@lru_cache(maxsize=1)
def _sensor_bank() -> np.ndarray:
    return np.random.default_rng([BANK_TAG, 1]).standard_normal((BANK, BANK, 3), dtype=np.float32)


@lru_cache(maxsize=1)
def _materials() -> list[Image.Image]:
    """Make surfaces of things: gray "RGB" images of side BANK; 255 keeps the color."""
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
    surfaces = [np.clip(222 + 22 * field, 0, 255).astype(np.uint8) for field in fields]
    return [Image.fromarray(surface).convert("RGB") for surface in surfaces]


def color_matrix(
    rng: np.random.Generator, degrees: float, saturation: float, gain: float
) -> tuple[float, ...]:
    """Draw a mild change of hue (up to +-degrees), saturation and brightness (relative, +-) for `Image.convert`."""
    turn, vivid, bright, red, blue, lift = (2 * rng.random(6) - 1).tolist()
    angle, strength, gain = math.radians(degrees) * turn, 1 + saturation * vivid, 1 + gain * bright
    hue = (1.0, strength * math.cos(angle), strength * math.sin(angle), 0.0) @ _HUE_BASIS
    rows = (gain * (1 + 0.06 * red), gain, gain * (1 + 0.06 * blue))
    matrix = hue.reshape(3, 4) * np.array(rows)[:, None]
    matrix[:, 3] = 8 * lift
    return tuple(matrix.ravel().tolist())


def give_material(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Give an "RGB" thing a random surface: fabric, brushed, speckled, ..."""
    materials = _materials()
    surface = materials[int(rng.integers(len(materials)))]
    across, down, strength = rng.random(3).tolist()
    if max(image.size) > BANK:
        patch = surface.resize(image.size)
    else:
        left, top = int(across * (BANK - image.width)), int(down * (BANK - image.height))
        patch = surface.crop((left, top, left + image.width, top + image.height))
    return Image.blend(image, ImageChops.multiply(image, patch), 0.3 + 0.7 * strength)


def photograph(rng: np.random.Generator, image: Image.Image) -> np.ndarray:
    """Apply uneven light and, at random, blur, noise and compression; (H, W, 3) uint8."""
    blur, grainy, compress, softness, grain, quality, slope_x, slope_y, curve = rng.random(9).tolist()
    if blur < BLUR:
        image = image.filter(ImageFilter.BoxBlur((0.25 + 0.55 * softness) * math.sqrt(min(image.size) / 192)))
    pixels = np.asarray(image, np.float32)
    height, width = pixels.shape[:2]
    across, down = _ramp(width), _ramp(height)
    row = 0.97 + 0.32 * (slope_x - 0.5) * across - 0.06 * curve * across * across
    light = row[None] + (0.32 * (slope_y - 0.5) * down)[:, None]
    pixels *= light[..., None]
    if grainy < NOISE:
        pixels += _grain(rng, height, width) * np.float32(2 + 9 * grain)
    photo = np.clip(pixels, 0, 255, out=pixels).astype(np.uint8)
    if compress < COMPRESSION:
        buffer = io.BytesIO()
        Image.fromarray(photo).save(buffer, "JPEG", quality=int(35 + 55 * quality))
        photo = np.asarray(Image.open(buffer, formats=["JPEG"]))
    return photo


@lru_cache(maxsize=64)
def _ramp(side: int) -> np.ndarray:
    return np.linspace(-1, 1, side, dtype=np.float32)


def _grain(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    if max(height, width) > BANK:
        return rng.standard_normal((height, width, 3), dtype=np.float32)
    top, left = int(rng.integers(BANK - height + 1)), int(rng.integers(BANK - width + 1))
    return _sensor_bank()[top : top + height, left : left + width]
