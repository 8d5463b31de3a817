"""The stuff of Scenes: procedural textures, rendered once into large tiles and cropped at random.

Each texture is a function that paints one tile with a random generator. Noise is white noise filtered in the frequency
domain; stones and leaves are Voronoi cells of a jittered grid.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image

TILE = 384  # side of a tile in pixels
VARIANTS = 3  # tiles of each class
OVERSAMPLING = 2  # tiles are stored enlarged, so that cropping needs no interpolation (ten times faster)
TILE_TAG = 7_001

Painter = Callable[[np.random.Generator], np.ndarray]
Color = tuple[float, float, float]

Y, X = np.meshgrid(np.arange(TILE, dtype=np.float32), np.arange(TILE, dtype=np.float32), indexing="ij")


@lru_cache(maxsize=64)
def _frequency(stretch: float, side: int) -> np.ndarray:
    fy = np.fft.fftfreq(side)[:, None] / math.sqrt(stretch)
    fx = np.fft.rfftfreq(side)[None] * math.sqrt(stretch)
    return np.hypot(fx, fy).astype(np.float32)


def noise(rng: np.random.Generator, beta: float = 1.5, stretch: float = 1.0, side: int = TILE) -> np.ndarray:
    """Make periodic 1/f**beta noise (side, side), zero mean, unit variance; stretch > 1 elongates it along x."""
    gain = np.maximum(_frequency(stretch, side), 1e-9) ** np.float32(-beta)
    gain[0, 0] = 0
    return _filtered(rng, gain)


def blobs(rng: np.random.Generator, period: float, stretch: float = 1.0, sharp: float = 3.0) -> np.ndarray:
    """Make band-passed noise (TILE, TILE) with a blob about every `period` pixels, zero mean, unit variance."""
    octave = np.log2(np.maximum(_frequency(stretch, TILE), 1e-6) * np.float32(period))
    return _filtered(rng, np.exp(np.float32(-sharp) * octave**2))


def _filtered(rng: np.random.Generator, gain: np.ndarray) -> np.ndarray:
    white = rng.standard_normal((len(gain), len(gain)), dtype=np.float32)
    field = np.fft.irfft2(np.fft.rfft2(white) * gain, s=white.shape)
    return ((field - field.mean()) / (field.std() + 1e-9)).astype(np.float32)


def cells(rng: np.random.Generator, count: int, jitter: float = 0.8) -> tuple[np.ndarray, ...]:
    """Make Voronoi cells of a jittered count x count grid: distance, gap to the next cell (cell units), number."""
    points = (rng.random((2, count, count), dtype=np.float32) - 0.5) * jitter + 0.5
    along = np.arange(TILE, dtype=np.float32) * (count / TILE)
    cell = along.astype(int)
    nearest: np.ndarray = np.full((TILE, TILE), 99.0, np.float32)
    second, number = nearest.copy(), np.zeros((TILE, TILE), int)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            place = np.ix_((cell + dy) % count, (cell + dx) % count)
            v = (along - cell - dy)[:, None] - points[0][place]
            u = (along - cell - dx)[None] - points[1][place]
            distance = u * u + v * v
            np.copyto(number, place[0] * count + place[1], where=distance < nearest)
            np.minimum(second, np.maximum(nearest, distance), out=second)
            np.minimum(nearest, distance, out=nearest)
    nearest = np.sqrt(nearest)
    return nearest, np.sqrt(second) - nearest, number


def ramp(values: np.ndarray, *colors: Color) -> np.ndarray:
    """Map values (H, W) in [0, 1] to a gradient of colors, (H, W, 3) float32."""
    stops, fine = np.linspace(0, 1, len(colors)), np.linspace(0, 1, 1024)
    table = np.stack([np.interp(fine, stops, channel) for channel in zip(*colors, strict=True)], axis=-1)
    return table.astype(np.float32)[(np.clip(values, 0, 1) * 1023).astype(np.int16)]


def unit(values: np.ndarray, spread: float = 2.0) -> np.ndarray:
    """Map zero-mean noise to [0, 1]: `spread` standard deviations on each side fill it."""
    return np.clip(values / (2 * spread) + 0.5, 0, 1)


def step(values: np.ndarray, width: float = 1.0) -> np.ndarray:
    """Apply a soft step from 0 to 1 at zero, `width` wide."""
    return np.clip(values / width + 0.5, 0, 1)


def mix(first: np.ndarray, second: np.ndarray | Color, weight: np.ndarray) -> np.ndarray:
    """Blend: `first` (H, W, 3) where `weight` (H, W) is 0, `second` where it is 1."""
    return first + (np.asarray(second, np.float32) - first) * weight[..., None].astype(np.float32)


def grid_gap(period_y: float, period_x: float, shift: np.ndarray | float = 0.0) -> np.ndarray:
    """Distance in pixels to the nearest line of a rectangular grid whose columns are shifted by `shift`."""
    dy = np.abs((Y + period_y / 2) % period_y - period_y / 2)
    dx = np.abs((X + shift + period_x / 2) % period_x - period_x / 2)
    return np.minimum(dx, dy)


def _per_cell(rng: np.random.Generator, number: np.ndarray) -> np.ndarray:
    return rng.random(int(number.max()) + 1, dtype=np.float32)[number]


def _grass(rng: np.random.Generator) -> np.ndarray:
    blades = blobs(rng, 9, stretch=0.12) + 0.6 * blobs(rng, 4, stretch=0.1) + 0.5 * noise(rng, 1.5)
    return ramp(unit(blades), (22, 70, 12), (66, 138, 28), (112, 186, 48), (170, 220, 90))


def _sand(rng: np.random.Generator) -> np.ndarray:
    warp = 16 * noise(rng, 2.2)
    ripples = np.sin((Y + warp) * (2 * np.pi * 12 / TILE)) * 0.5
    grain = rng.standard_normal((TILE, TILE), dtype=np.float32) * 0.45
    return ramp(
        unit(ripples + grain + 0.3 * noise(rng, 1.5)), (188, 150, 92), (226, 194, 134), (246, 224, 176)
    )


def _water(rng: np.random.Generator) -> np.ndarray:
    warp = 12 * noise(rng, 2.0, stretch=3)
    waves = np.sin((Y + warp) * (2 * np.pi * 14 / TILE)) + 0.8 * blobs(rng, 14, stretch=5)
    return ramp(unit(waves, 2.2), (8, 52, 120), (20, 98, 178), (46, 140, 210), (160, 214, 240))


def _sky(rng: np.random.Generator) -> np.ndarray:
    clouds = step(noise(rng, 1.9, stretch=1.8) - 0.5, 1.4)
    base = ramp(Y / TILE, (76, 146, 226), (150, 200, 246))
    return mix(base, (252, 252, 255), clouds * 0.95)


def _brick_wall(rng: np.random.Generator) -> np.ndarray:
    height, width = TILE / 16, TILE / 8
    row = (Y // height).astype(int)
    shift = (row % 2) * (width / 2)
    column = ((X + shift) // width).astype(int) % 8
    tone = _per_cell(rng, row * 8 + column)
    brick = ramp(np.clip(tone + 0.12 * noise(rng, 0.8), 0, 1), (132, 44, 32), (172, 66, 46), (206, 98, 70))
    mortar = step(2.4 - grid_gap(height, width, shift), 1.5)
    return mix(brick, (206, 196, 184), mortar)


def _wood(rng: np.random.Generator) -> np.ndarray:
    board = (Y // 48).astype(int)
    offset = rng.random(8, dtype=np.float32)[board] * TILE
    grain = noise(rng, 1.3, stretch=30)
    rings = np.sin((Y * 0.5 + offset + 9 * noise(rng, 2.2, stretch=12)) * 0.7)
    tone = unit(0.7 * grain + 0.6 * rings) * 0.8 + 0.2 * rng.random(8)[board]
    planks = ramp(tone, (84, 46, 18), (138, 84, 40), (188, 128, 70))
    seam = np.minimum(Y % 48, 48 - Y % 48)
    return mix(planks, (38, 20, 8), step(1.8 - seam, 1.5))


def _snow(rng: np.random.Generator) -> np.ndarray:
    drifts = np.sin((Y + 22 * noise(rng, 2.4)) * (2 * np.pi * 8 / TILE)) + 0.5 * noise(rng, 1.6)
    base = ramp(unit(drifts, 1.8), (168, 190, 228), (226, 234, 248), (250, 251, 255), (255, 255, 255))
    glitter = rng.random((TILE, TILE)) > 0.985
    return mix(base, (120, 150, 214), glitter * 0.7)


def _cobblestone(rng: np.random.Generator) -> np.ndarray:
    distance, gap, number = cells(rng, 10, 0.6)
    tone = 0.75 * _per_cell(rng, number) + 0.25 * unit(noise(rng, 1.0))
    stones = ramp(tone, (108, 102, 98), (150, 140, 128), (186, 176, 160))
    stones = stones * (1.15 - 0.75 * distance**2)[..., None]
    return mix(stones, (44, 40, 36), step(0.14 - gap, 0.1))


def _gravel(rng: np.random.Generator) -> np.ndarray:
    distance, gap, number = cells(rng, 38, 0.95)
    tone = _per_cell(rng, number)
    colors = ramp(tone, (66, 58, 62), (124, 106, 108), (152, 140, 130), (204, 196, 190))
    return mix(colors * (1.15 - 0.7 * distance)[..., None], (30, 26, 26), step(0.12 - gap, 0.2))


def _dirt(rng: np.random.Generator) -> np.ndarray:
    clumps = noise(rng, 1.2) + 0.6 * blobs(rng, 12)
    base = ramp(unit(clumps), (52, 30, 16), (94, 58, 34), (128, 84, 52))
    return mix(base, (160, 130, 100), step(blobs(rng, 16) - 2.3, 0.3))


def _road(rng: np.random.Generator) -> np.ndarray:
    grain = rng.standard_normal((TILE, TILE), dtype=np.float32) * 0.7 + noise(rng, 1.2) * 0.5
    base = ramp(unit(grain), (48, 48, 54), (74, 74, 80), (104, 104, 108))
    across = np.abs((X + 96) % 192 - 96)
    dash = step(7 - across, 1.5) * step(28 - np.abs((Y + 48) % 96 - 48), 1.5)
    return mix(base, (240, 238, 228), dash * (0.9 - 0.15 * unit(noise(rng, 1.0))))


def _carpet(rng: np.random.Generator) -> np.ndarray:
    u, v = (X + Y) % 48, (X - Y) % 48
    border = np.minimum(np.minimum(u, 48 - u), np.minimum(v, 48 - v))
    diamond = np.maximum(np.abs(u - 24), np.abs(v - 24))
    pile = rng.standard_normal((TILE, TILE), dtype=np.float32) * 0.6 + 0.5 * noise(rng, 1.0)
    base = ramp(unit(pile), (112, 6, 44), (176, 20, 76))
    base = mix(base, (226, 170, 60), step(3.5 - border, 1.5) * 0.9)
    base = mix(base, (244, 206, 170), step(6 - diamond, 1.5) * 0.9)
    return base * (0.9 + 0.1 * unit(noise(rng, 0.4)))[..., None]


def _tiles(rng: np.random.Generator) -> np.ndarray:
    number = (Y // 48).astype(int) * 8 + (X // 48).astype(int)
    glaze = ramp(0.6 * _per_cell(rng, number) + 0.4 * unit(noise(rng, 1.8)), (62, 166, 156), (128, 214, 200))
    shine = step(((X % 48) + (Y % 48)) - 60, 30) * 0.25
    glaze = mix(glaze, (20, 90, 90), shine)
    return mix(glaze, (246, 248, 246), step(2.6 - grid_gap(48, 48), 1.5))


def _foliage(rng: np.random.Generator) -> np.ndarray:
    distance, gap, number = cells(rng, 20, 0.95)
    tone = _per_cell(rng, number)
    leaves = ramp(tone, (10, 52, 24), (18, 84, 34), (40, 120, 44), (74, 148, 50))
    leaves = leaves * (1.3 - 1.1 * distance)[..., None]
    return mix(leaves, (4, 20, 10), step(0.1 - gap, 0.15)) * (0.75 + 0.35 * unit(noise(rng, 1.8)))[..., None]


def _cloth(rng: np.random.Generator) -> np.ndarray:
    def stripes(t):
        wide = (t % 96 < 48) * 0.5
        thin = (np.abs(t % 96 - 72) < 5) * 0.7
        return wide + thin

    weave = 0.12 * np.sin(X * np.pi * 0.5) * np.sin(Y * np.pi * 0.5)
    plaid = np.clip((stripes(X) + stripes(Y)) / 1.7 + weave + 0.05 * noise(rng, 1.0), 0, 1)
    return ramp(plaid, (62, 28, 112), (112, 70, 172), (160, 122, 210), (226, 204, 246))


def _metal(rng: np.random.Generator) -> np.ndarray:
    brushed = noise(rng, 0.7, stretch=400) * 0.8
    shine = np.sin(Y * (2 * np.pi * 2 / TILE) + rng.random() * 6)
    plate = ramp(unit(brushed + shine, 2.4), (104, 114, 124), (160, 170, 180), (226, 232, 238))
    rivet = np.hypot((X % 96) - 48, (Y % 96) - 48)
    plate = mix(plate, (70, 78, 88), step(8 - rivet, 2))
    return mix(plate, (222, 230, 238), step(5.5 - np.hypot((X % 96) - 47, (Y % 96) - 46.5), 2))


def _marble(rng: np.random.Generator) -> np.ndarray:
    base = ramp(unit(noise(rng, 1.9)), (222, 212, 202), (248, 244, 238))
    warp = noise(rng, 1.7)
    veins = step(0.13 - np.abs(blobs(rng, 90, sharp=1.5) + 0.35 * warp), 0.16) * (
        0.4 + 0.6 * unit(noise(rng, 1.5))
    )
    fine = step(0.08 - np.abs(blobs(rng, 50, sharp=1.0) + 0.3 * warp), 0.1) * 0.55
    return mix(mix(base, (184, 150, 112), fine), (70, 66, 72), veins)


def _lava(rng: np.random.Generator) -> np.ndarray:
    distance, gap, number = cells(rng, 8, 0.9)
    gap = gap + 0.06 * noise(rng, 1.4)
    glow = np.clip(1 - gap / 0.42, 0, 1)
    crust = 0.08 * unit(noise(rng, 1.0))
    heat = np.clip(glow * 0.95 + crust, 0, 1)
    return ramp(heat, (30, 10, 8), (120, 18, 4), (238, 84, 6), (255, 176, 30), (255, 244, 150))


def _straw(rng: np.random.Generator) -> np.ndarray:
    height: np.ndarray = np.full((TILE, TILE), -1.0, np.float32)
    tone: np.ndarray = np.zeros((TILE, TILE), np.float32)
    for angle in (0.15, 0.6, -0.35, 1.0, -0.8):
        u, v = X * np.cos(angle) + Y * np.sin(angle), Y * np.cos(angle) - X * np.sin(angle)
        lane = (v // 9).astype(int) % 128
        stalk = rng.random((128, 16), dtype=np.float32)[lane, ((u + lane * 37) // 70).astype(int) % 16]
        rounded = 1 - np.abs((v % 9) - 4.5) / 4.5
        level = stalk + 0.1 * rounded
        top = (level > height) & (rounded > 0.15)
        tone = np.where(top, 0.35 * stalk + 0.65 * rounded, tone)
        height = np.where(top, level, height)
    return ramp(np.clip(tone, 0, 1), (92, 62, 12), (200, 158, 44), (236, 204, 92), (252, 234, 150))


def _ice(rng: np.random.Generator) -> np.ndarray:
    _, gap, number = cells(rng, 7, 0.9)
    tone = 0.6 * unit(noise(rng, 1.9)) + 0.4 * _per_cell(rng, number)
    base = ramp(tone, (140, 206, 232), (186, 230, 246), (222, 246, 252))
    base = mix(base, (252, 255, 255), step(0.035 - gap - 0.01 * noise(rng, 1.2), 0.03))
    return mix(base, (255, 255, 255), 0.5 * step(0.04 - np.abs(noise(rng, 1.8, stretch=3)), 0.05))


def _concrete(rng: np.random.Generator) -> np.ndarray:
    grain = rng.standard_normal((TILE, TILE), dtype=np.float32) * 0.35 + noise(rng, 1.3)
    base = ramp(unit(grain), (140, 140, 136), (168, 168, 162), (192, 192, 186))
    base = mix(base, (96, 96, 92), step(blobs(rng, 10) - 2.4, 0.3))
    holes = np.hypot((X % 128) - 24, (Y % 128) - 24)
    base = mix(base, (84, 84, 82), step(5 - holes, 2))
    return mix(base, (104, 104, 100), step(1.6 - grid_gap(128, 192), 1.5))


def _night_sky(rng: np.random.Generator) -> np.ndarray:
    haze = unit(noise(rng, 2.0, stretch=2))
    base = ramp(haze, (4, 6, 24), (14, 16, 56), (44, 34, 92))
    stars = np.zeros((TILE, TILE))
    for y, x in rng.integers(2, TILE - 2, (320, 2)):
        brightness = rng.random() ** 2
        stars[y, x] = 0.5 + 0.5 * brightness
        if brightness > 0.35:
            stars[y - 1 : y + 2, x - 1 : x + 2] = np.maximum(stars[y - 1 : y + 2, x - 1 : x + 2], brightness)
    return mix(base, (255, 252, 230), stars)


def _checkerboard(rng: np.random.Generator) -> np.ndarray:
    edge = np.sin(X * (np.pi / 40)) * np.sin(Y * (np.pi / 40))
    squares = step(edge, 0.08)
    wear = 0.06 * noise(rng, 1.4)
    return ramp(np.clip(squares * 0.94 + 0.03 + wear, 0, 1), (18, 18, 20), (244, 242, 236))


def _fence(rng: np.random.Generator) -> np.ndarray:
    yard = ramp(unit(noise(rng, 1.2)), (36, 56, 44), (70, 92, 66))
    rail = step(11 - np.abs((Y % 128) - 64), 1.5)
    board = (X // 32).astype(int)
    tint = 0.5 * rng.random(12)[board] + 0.5 * unit(noise(rng, 1.2, stretch=0.05))
    paint = ramp(tint, (196, 206, 204), (246, 248, 244))
    fenced = mix(mix(yard, (150, 160, 158), rail), paint, step(11 - np.abs((X % 32) - 16), 1.5))
    nails = np.hypot((X % 32) - 16, (Y % 128) - 64)
    return mix(fenced, (60, 60, 60), step(2.2 - nails, 1.0))


PAINTERS: dict[str, tuple[Painter, float]] = {
    "grass": (_grass, 12),
    "sand": (_sand, 25),
    "water": (_water, 10),
    "sky": (_sky, 10),
    "brick wall": (_brick_wall, 15),
    "wood": (_wood, 90),
    "snow": (_snow, 20),
    "cobblestone": (_cobblestone, 180),
    "gravel": (_gravel, 180),
    "dirt": (_dirt, 180),
    "road": (_road, 40),
    "carpet": (_carpet, 45),
    "tiles": (_tiles, 20),
    "foliage": (_foliage, 180),
    "cloth": (_cloth, 45),
    "metal": (_metal, 30),
    "marble": (_marble, 180),
    "lava": (_lava, 180),
    "straw": (_straw, 45),
    "ice": (_ice, 180),
    "concrete": (_concrete, 20),
    "night sky": (_night_sky, 180),
    "checkerboard": (_checkerboard, 45),
    "fence": (_fence, 10),
}
"""The painter of each stuff class, and by how many degrees its texture may be rotated."""


@lru_cache(maxsize=256)
def tile(name: str, variant: int, level: int = 0) -> Image.Image:
    """Make a tile of a texture, "RGB", with OVERSAMPLING * TILE / 2**level pixels on a side; always the same."""
    image = _painted(name, variant).reduce(2**level)
    side = OVERSAMPLING * image.width
    return image.resize((side, side), Image.Resampling.BILINEAR)


@lru_cache(maxsize=256)
def _painted(name: str, variant: int) -> Image.Image:
    rng = np.random.default_rng([TILE_TAG, list(PAINTERS).index(name), variant])
    return Image.fromarray(np.clip(PAINTERS[name][0](rng), 0, 255).astype(np.uint8))


def draw_stuff(rng: np.random.Generator, name: str, size: tuple[int, int], image_side: int) -> Image.Image:
    """Draw a random crop (height, width) of a texture, "RGB"; the larger the image it is for, the coarser."""
    height, width = size
    chance = rng.random(6).tolist()
    variant, mirror = int(chance[0] * VARIANTS), -1.0 if chance[1] < 0.5 else 1.0
    angle = math.radians(PAINTERS[name][1] * (2 * chance[2] - 1))
    cos, sin = math.cos(angle), math.sin(angle)
    span_x = abs(cos) * width + abs(sin) * height
    span_y = abs(sin) * width + abs(cos) * height
    coarseness = (128 / image_side) ** 0.5 * math.exp(0.85 * chance[3] - 0.45)
    scale = min(coarseness, (TILE - 4) / max(span_x, span_y))
    center_x = span_x * scale / 2 + 1 + chance[4] * (TILE - 2 - span_x * scale)
    center_y = span_y * scale / 2 + 1 + chance[5] * (TILE - 2 - span_y * scale)
    level = 1 if scale >= 1.3 else 0
    shrink = OVERSAMPLING * 0.5**level
    a, b = mirror * scale * cos * shrink, mirror * scale * sin * shrink
    d, e = -scale * sin * shrink, scale * cos * shrink
    c = center_x * shrink - a * width / 2 - b * height / 2
    f = center_y * shrink - d * width / 2 - e * height / 2
    source = tile(name, variant, level)
    return source.transform((width, height), Image.Transform.AFFINE, (a, b, c, d, e, f))
