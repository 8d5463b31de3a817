"""Images of Scenes: crowded scenes with panoptic ground truth, single things, single textures.

Everything depends on a generator seeded with (seed, index): an image is the same in every process, and any of them can
be drawn without the ones before it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from ita_segmentation.data.scenes.classes import scenes_vocabulary, select_classes
from ita_segmentation.data.scenes.glyphs import draw_thing, num_drawings
from ita_segmentation.data.scenes.photo import BANK, color_matrix, give_material, photograph, smooth_bank
from ita_segmentation.data.scenes.textures import draw_stuff

IGNORE_INDEX = 255
MIN_SIDE, MAX_SIDE = 16, 4096
MAX_THINGS, MAX_STUFF = 6, 4
SMALLEST, LARGEST = 0.14, 0.6  # longer side of a thing in a scene, relative to the scene's shorter side
MIN_THING_SIDE, MIN_AREA, MIN_VISIBLE = 20, 60, 0.35
"""A thing has at least this side (pixels), and is drawn where at least this area and share of it is visible."""
BORDER_LEVEL, BORDER_STEPS = 128, 24
STUFF_COUNTS = (0.22, 0.60, 0.87)  # cumulative probabilities of one, two and three textures; else four
SCENE_TAG, OBJECT_TAG, STUFF_TAG, DECK_TAG = 11, 12, 13, 14

Size = int | tuple[int, int]
Classes = str | Iterable[int]


@dataclass(frozen=True)
class Scene:
    """One scene with its ground truth."""

    image: Image.Image
    """"RGB" image."""
    panoptic: np.ndarray
    """(H, W) int32 segment ids, 0 for none."""
    segments: list[dict]
    """One {"id", "class_id", "isthing"} for each segment of `panoptic`."""
    semantic: np.ndarray
    """(H, W) uint8 class ids, 255 for none."""


class ObjectImage(NamedTuple):
    """One thing over one texture."""

    image: np.ndarray
    """(H, W, 3) uint8."""
    class_id: int
    background_id: int


class StuffImage(NamedTuple):
    """One texture alone."""

    image: np.ndarray
    """(H, W, 3) uint8."""
    class_id: int


@dataclass(frozen=True)
class _Placed:
    """A thing and its position; `left` and `top` may be outside the image."""

    class_id: int
    pixels: Image.Image
    left: int
    top: int


def scene(seed: int, index: int, size: Size = 192, classes: Classes = "seen") -> Scene:
    """Draw a scene of one to four textures and two to six things.

    Args:
        seed: the seed of the dataset, >= 0.
        index: the index of the image, >= 0.
        size: side of a square, or (height, width), in pixels, each from 16 to 4096.
        classes: "seen" (no unseen class appears), "all", or class ids, at least one of them stuff.

    Returns:
        The image and its ground truth; regions too small to count belong to no segment.

    Raises:
        ValueError: if an argument is out of range.
    """
    height, width = check_size(size)
    things, stuff = select_classes(classes)
    if not stuff:
        raise ValueError("a scene needs at least one stuff class")
    rng = _generator(seed, index, SCENE_TAG)
    num_stuff = 1 + int(np.searchsorted(STUFF_COUNTS, rng.random(), side="right"))
    num_things = int(rng.integers(2, MAX_THINGS + 1))
    regions, canvas = _lay_ground(rng, _deal(stuff, seed, index, num_stuff, MAX_STUFF), height, width)
    hand = _deal(things, seed, index, num_things, MAX_THINGS)
    if hand and rng.random() < 0.15:  # one class twice, so that only position distinguishes instances
        hand = hand[: MAX_THINGS - 1] + hand[:1]
    placed = _place_things(rng, hand, height, width)
    panoptic, segments = _paint(rng, canvas, regions, placed)
    lookup = np.full(len(segments) + 1, IGNORE_INDEX, np.uint8)
    for segment in segments:
        lookup[segment["id"]] = segment["class_id"]
    return Scene(Image.fromarray(photograph(rng, canvas)), panoptic, segments, lookup[panoptic])


def object_image(seed: int, index: int, size: Size = 64, classes: Classes = "all") -> ObjectImage:
    """Draw one thing, 0.45 to 0.95 of the shorter side, on one texture.

    Arguments and errors as of `scene`; the texture is any if `classes` has no stuff.
    """
    height, width = check_size(size)
    short = min(height, width)
    things, stuff = select_classes(classes)
    if not things:
        raise ValueError("classes names no thing to draw")
    rng = _generator(seed, index, OBJECT_TAG)
    class_id = _pick(rng, things)
    background_id = _pick(rng, stuff or select_classes("all")[1])
    canvas = _texture(rng, background_id, height, width, short)
    share, across, down = rng.random(3).tolist()
    pixels = _thing(rng, class_id, (0.45 + 0.5 * share) * short)
    left, top = (
        round(spare / 2 + (chance - 0.5) * (abs(spare) + 0.1 * short))
        for spare, chance in ((width - pixels.width, across), (height - pixels.height, down))
    )
    _paint_thing(rng, canvas, _Placed(class_id, pixels, left, top))
    return ObjectImage(photograph(rng, canvas), class_id, background_id)


def stuff_image(seed: int, index: int, size: Size = 64, classes: Classes = "all") -> StuffImage:
    """Draw one texture alone; arguments and errors as of `scene`."""
    height, width = check_size(size)
    stuff = select_classes(classes)[1]
    if not stuff:
        raise ValueError("classes names no stuff to draw")
    rng = _generator(seed, index, STUFF_TAG)
    class_id = _pick(rng, stuff)
    canvas = _texture(rng, class_id, height, width, min(height, width))
    return StuffImage(photograph(rng, canvas), class_id)


def check_size(size: Size) -> tuple[int, int]:
    """Convert a size to (height, width); ValueError if it is neither an integer nor a pair, or out of range."""
    sides = (size, size) if isinstance(size, int | np.integer) else size
    if not isinstance(sides, tuple | list) or len(sides) != 2:
        raise ValueError(f"size must be an integer or (height, width), got {size!r}")
    if not all(isinstance(side, int | np.integer) and MIN_SIDE <= side <= MAX_SIDE for side in sides):
        raise ValueError(f"each side must be an integer from {MIN_SIDE} to {MAX_SIDE} pixels, got {size!r}")
    return int(sides[0]), int(sides[1])


def _generator(seed: int, index: int, tag: int) -> np.random.Generator:
    for name, value in (("seed", seed), ("index", index)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
    return np.random.default_rng([seed, index, tag])


def _pick(rng: np.random.Generator, ids: tuple[int, ...]) -> int:
    return ids[int(rng.integers(len(ids)))]


@lru_cache(maxsize=256)
def _deck(ids: tuple[int, ...], seed: int, shuffle: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng([seed, shuffle, DECK_TAG, len(ids)]).permutation(ids).tolist())


def _deal(ids: tuple[int, ...], seed: int, index: int, count: int, most: int) -> list[int]:
    """Draw at most `count` classes from a deck that is reshuffled when used up, so that each comes equally often."""
    if not ids:
        return []
    positions = range(index * most, index * most + count)
    cards = [_deck(ids, seed, position // len(ids))[position % len(ids)] for position in positions]
    return list(dict.fromkeys(cards))


def _texture(
    rng: np.random.Generator, class_id: int, height: int, width: int, image_side: int
) -> Image.Image:
    image = draw_stuff(rng, scenes_vocabulary().names[class_id], (height, width), image_side)
    return image.convert("RGB", color_matrix(rng, 7, 0.2, 0.16))


def _thing(rng: np.random.Generator, class_id: int, side: float) -> Image.Image:
    """Draw a thing in a random color, surface and pose, "RGBA"."""
    drawing, turn, stretch, mirror, surface = rng.random(5).tolist()
    drawing = int(drawing * num_drawings(class_id))
    pixels = draw_thing(class_id, drawing, side, 50 * turn - 25, mirror < 0.5, 0.88 + 0.24 * stretch)
    colors = pixels.convert("RGB").convert("RGB", color_matrix(rng, 12, 0.25, 0.18))
    if surface < 0.7:
        colors = give_material(rng, colors)
    colors.putalpha(pixels.getchannel("A"))
    return colors


def _lay_ground(
    rng: np.random.Generator, class_ids: list[int], height: int, width: int
) -> tuple[list[tuple[int, np.ndarray]], Image.Image]:
    """Paint textures with natural borders; return each region's class and (H, W) bool mask, and the image."""
    short = min(height, width)
    canvas = _texture(rng, class_ids[0], height, width, short)
    owner = np.zeros((height, width), np.uint8)
    direction = math.pi * rng.random()
    for number, class_id in enumerate(class_ids[1:], start=1):
        turn, patch, softness = rng.random(3).tolist()
        angle = direction + math.pi * max(turn - 0.4, 0) / 0.6
        field = _border_field(rng, height, width, angle, patch < 0.25)
        inside = field >= BORDER_LEVEL
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        if not 0.08 < np.count_nonzero(inside) / inside.size < 0.75:
            continue
        top, left = max(int(rows[0]) - 4, 0), max(int(columns[0]) - 4, 0)
        bottom, right = min(int(rows[-1]) + 5, height), min(int(columns[-1]) + 5, width)
        texture = _texture(rng, class_id, bottom - top, right - left, short)
        cover = _cover_table(int(4 * softness))[field[top:bottom, left:right]]
        canvas.paste(texture, (left, top), Image.fromarray(cover))
        owner[inside] = number
    return [(class_id, owner == number) for number, class_id in enumerate(class_ids)], canvas


@lru_cache(maxsize=1)
def _border_noise() -> Image.Image:
    return Image.fromarray(smooth_bank())


@lru_cache(maxsize=4)
def _cover_table(sharpness: int) -> np.ndarray:
    """Make a table from border field to opacity, (256,) uint8; the transition takes 1.5 to 6 pixels."""
    distance = (np.arange(256) - BORDER_LEVEL) / BORDER_STEPS
    return (np.clip(distance / (1.5 * (1 + sharpness)) + 0.5, 0, 1) * 255).astype(np.uint8)


def _border_field(rng: np.random.Generator, height: int, width: int, angle: float, patch: bool) -> np.ndarray:
    """Measure how far inside a half-plane or a patch each pixel is: (H, W) uint8, BORDER_LEVEL on the border."""
    short = min(height, width)
    rows, columns = (max(side // 2, 2) for side in (height, width))
    x = np.linspace(-0.5, 0.5, columns, dtype=np.float32) * np.float32(width / short)
    y = np.linspace(-0.5, 0.5, rows, dtype=np.float32)[:, None] * np.float32(height / short)
    chance = rng.random(8).tolist()
    span = 60 + 240 * chance[0]
    left, top = chance[1] * (BANK - span), chance[2] * (BANK - span)
    box = (left, top, left + span, top + span)
    wobble = np.asarray(_border_noise().resize((columns, rows), Image.Resampling.BILINEAR, box))
    wobble = (wobble - wobble.mean()) * (0.01 + 0.08 * chance[3])
    cos, sin = math.cos(angle), math.sin(angle)
    along, across = x * cos + y * sin, y * cos - x * sin
    if patch:
        u = (along - (0.6 * chance[4] - 0.3)) / (0.25 + 0.2 * chance[5])
        v = (across - (0.6 * chance[6] - 0.3)) / (0.25 + 0.2 * chance[7])
        inside = 0.3 - 0.3 * np.sqrt(u * u + v * v)
    else:
        inside = across - 0.44 * (chance[4] - 0.5)
        inside += 0.05 * chance[5] * np.sin(along * (4 + 12 * chance[6]) + 6 * chance[7])
    field = np.clip((inside + wobble) * (BORDER_STEPS * short) + BORDER_LEVEL, 0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(field).resize((width, height), Image.Resampling.BILINEAR))


def _place_things(rng: np.random.Generator, class_ids: list[int], height: int, width: int) -> list[_Placed]:
    """Place things at random sizes and positions, back to front, most of them apart from each other."""
    short = min(height, width)
    smallest = min(max(SMALLEST, MIN_THING_SIDE / short), 0.5)
    placed: list[_Placed] = []
    circles: list[tuple[float, float, float]] = []
    for class_id in class_ids:
        chance = rng.random(28).tolist()
        share = smallest + (LARGEST - smallest) * chance[0] ** 1.6
        pixels = _thing(rng, class_id, share * short)
        radius, apart = share * short / 2, 0.5 + 0.5 * chance[1]
        for trial in range(2, 26, 2):
            margin = radius * (0.5 + 0.6 * chance[26])
            x, y = (
                min(margin, side / 2) + place * max(side - 2 * margin, 0)
                for side, place in ((width, chance[trial]), (height, chance[trial + 1]))
            )
            if all(math.hypot(x - cx, y - cy) > apart * (radius + r) for cx, cy, r in circles):
                break
        circles.append((x, y, radius))
        left, top = round(x - pixels.width / 2), round(y - pixels.height / 2)
        placed.append(_Placed(class_id, pixels, left, top))
    return placed


def _solid(thing: _Placed, height: int, width: int) -> tuple[tuple[slice, slice], np.ndarray, int]:
    """Find where a thing covers the image: rows and columns, (h, w) bool mask there, and its total area."""
    solid = np.asarray(thing.pixels.getchannel("A")) > 127
    top, left = max(thing.top, 0), max(thing.left, 0)
    bottom, right = min(thing.top + solid.shape[0], height), min(thing.left + solid.shape[1], width)
    shown = solid[top - thing.top : bottom - thing.top, left - thing.left : right - thing.left]
    return (slice(top, bottom), slice(left, right)), shown, int(np.count_nonzero(solid))


def _paint(
    rng: np.random.Generator,
    canvas: Image.Image,
    regions: list[tuple[int, np.ndarray]],
    placed: list[_Placed],
) -> tuple[np.ndarray, list[dict]]:
    """Paint the things that stay visible onto the canvas; return the segment map and the segments."""
    height, width = canvas.height, canvas.width
    least = MIN_AREA * min(1.0, min(height, width) / 96) ** 2
    solids = [_solid(thing, height, width) for thing in placed]
    covered = np.zeros((height, width), bool)
    front = np.zeros((height, width), np.uint8)
    kept: list[_Placed] = []
    for thing, (place, shown, area) in reversed(list(zip(placed, solids, strict=True))):
        visible = shown & ~covered[place]
        if np.count_nonzero(visible) >= max(least, MIN_VISIBLE * area):
            covered[place] |= shown
            kept.append(thing)
            front[place][visible] = len(kept)
    for thing in reversed(kept):
        _paint_thing(rng, canvas, thing)
    masks = [(class_id, mask & (front == 0), False) for class_id, mask in regions]
    masks += [(thing.class_id, front == number, True) for number, thing in enumerate(kept, start=1)]
    panoptic = np.zeros((height, width), np.int32)
    segments: list[dict] = []
    for class_id, mask, is_thing in masks:
        if np.count_nonzero(mask) >= least:
            segments.append({"id": len(segments) + 1, "class_id": class_id, "isthing": is_thing})
            panoptic[mask] = len(segments)
    return panoptic, segments


def _paint_thing(rng: np.random.Generator, canvas: Image.Image, thing: _Placed) -> None:
    """Paste a thing, often with a shadow."""
    alpha = thing.pixels.getchannel("A")
    side = max(thing.pixels.size)
    shadowed, dx, dy, strength = rng.random(4).tolist()
    if shadowed < 0.6:
        place = (thing.left + round(0.16 * side * (dx - 0.5)), thing.top + round(side * (0.01 + 0.08 * dy)))
        shadow = Image.blend(Image.new("L", alpha.size), alpha, 0.25 + 0.35 * strength)
        if side > 24:
            shadow = shadow.filter(ImageFilter.BoxBlur(side / 40))
        canvas.paste((10, 10, 18), place, shadow)
    canvas.paste(thing.pixels, (thing.left, thing.top), alpha)
