"""Pictures of the Scenes world: crowded scenes with panoptic ground truth, single things, single textures.

Everything is decided by a generator seeded with (seed, index), so that a picture is the same in every process
and any of them can be drawn without the ones before it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from .scenes_classes import scenes_vocabulary, select_classes
from .scenes_glyphs import draw_thing, num_drawings
from .scenes_photo import BANK, color_matrix, give_material, photograph, smooth_bank
from .scenes_textures import draw_stuff

IGNORE_INDEX = 255
MIN_SIDE, MAX_SIDE = 16, 4096
MAX_THINGS, MAX_STUFF = 6, 4
SCENE_TAG, OBJECT_TAG, STUFF_TAG, DECK_TAG = 11, 12, 13, 14

Size = int | tuple[int, int]
Classes = str | Iterable[int]


@dataclass(frozen=True)
class Scene:
    """One scene with its ground truth."""

    image: Image.Image
    """"RGB" picture."""
    panoptic: np.ndarray
    """(H, W) int32 segment ids, 0 where there is none."""
    segments: list[dict]
    """One {"id", "class_id", "isthing"} for each segment of `panoptic`."""
    semantic: np.ndarray
    """(H, W) uint8 class ids, 255 where there is none."""


class ObjectPicture(NamedTuple):
    """One thing over one texture."""

    image: np.ndarray
    """(H, W, 3) uint8."""
    class_id: int
    background_id: int


class StuffPicture(NamedTuple):
    """One texture alone."""

    image: np.ndarray
    """(H, W, 3) uint8."""
    class_id: int


@dataclass(frozen=True)
class _Placed:
    """A thing where it will be painted; `left` and `top` may lie outside the picture."""

    class_id: int
    pixels: Image.Image
    left: int
    top: int


def scene(seed: int, index: int, size: Size = 192, classes: Classes = "seen") -> Scene:
    """A scene of one to four textures and two to six things.

    Args:
        seed: which world, >= 0.
        index: which picture of it, >= 0.
        size: side of a square, or (height, width), in pixels, each from 16 to 4096.
        classes: "seen" (nothing of an unseen class appears), "all", or class ids, at least one of them stuff.

    Returns:
        The picture and its ground truth; every pixel belongs to a segment.

    Raises:
        ValueError: an argument is out of range.
    """
    height, width = _check(seed, index, size)
    things, stuff = select_classes(classes)
    if not stuff:
        raise ValueError("a scene needs at least one stuff class to stand on")
    rng = np.random.default_rng([seed, index, SCENE_TAG])
    canvas, regions = _lay_ground(rng, _deal(stuff, seed, index, _num_stuff(rng)), height, width)
    num_things = int(rng.integers(2, MAX_THINGS + 1)) if things else 0
    placed = _place_things(rng, _repeat_one(rng, _deal(things, seed, index, num_things)), height, width)
    panoptic, segments = _paint(rng, canvas, regions, placed)
    lookup = np.full(max(s["id"] for s in segments) + 1, IGNORE_INDEX, np.uint8)
    for segment in segments:
        lookup[segment["id"]] = segment["class_id"]
    return Scene(Image.fromarray(photograph(rng, canvas)), panoptic, segments, lookup[panoptic])


def object_picture(seed: int, index: int, size: Size = 64, classes: Classes = "all") -> ObjectPicture:
    """One thing, 0.45 to 0.95 of the shorter side, over one texture.

    Args:
        seed, index, size: as in `scene`.
        classes: "seen", "all" or class ids; the texture is one of its stuff classes, or any if it names none.

    Raises:
        ValueError: an argument is out of range, or `classes` names no thing.
    """
    height, width = _check(seed, index, size)
    things, stuff = select_classes(classes)
    if not things:
        raise ValueError("classes names no thing to draw")
    rng = np.random.default_rng([seed, index, OBJECT_TAG])
    class_id = _pick(rng, things)
    background_id = _pick(rng, stuff or select_classes("all")[1])
    canvas = _texture(rng, background_id, height, width)
    pixels = _thing(rng, class_id, rng.uniform(0.45, 0.95) * min(height, width))
    spare_x, spare_y = width - pixels.width, height - pixels.height
    left = round(spare_x / 2 + rng.uniform(-0.5, 0.5) * (abs(spare_x) + 0.12 * width * (spare_x > 0)))
    top = round(spare_y / 2 + rng.uniform(-0.5, 0.5) * (abs(spare_y) + 0.12 * height * (spare_y > 0)))
    _paint_thing(rng, canvas, _Placed(class_id, pixels, left, top))
    return ObjectPicture(photograph(rng, canvas), class_id, background_id)


def stuff_picture(seed: int, index: int, size: Size = 64, classes: Classes = "all") -> StuffPicture:
    """One texture alone.

    Args:
        seed, index, size: as in `scene`.
        classes: "seen", "all" or class ids, at least one of them stuff.

    Raises:
        ValueError: an argument is out of range, or `classes` names no stuff.
    """
    height, width = _check(seed, index, size)
    stuff = select_classes(classes)[1]
    if not stuff:
        raise ValueError("classes names no stuff to draw")
    rng = np.random.default_rng([seed, index, STUFF_TAG])
    class_id = _pick(rng, stuff)
    return StuffPicture(photograph(rng, _texture(rng, class_id, height, width)), class_id)


def _check(seed: int, index: int, size: Size) -> tuple[int, int]:
    for name, value in (("seed", seed), ("index", index)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
    sides = (size, size) if isinstance(size, int | np.integer) else size
    if not isinstance(sides, tuple | list) or len(sides) != 2:
        raise ValueError(f"size must be an integer or (height, width), got {size!r}")
    if not all(isinstance(side, int | np.integer) and MIN_SIDE <= side <= MAX_SIDE for side in sides):
        raise ValueError(f"each side must be an integer from {MIN_SIDE} to {MAX_SIDE} pixels, got {size!r}")
    return int(sides[0]), int(sides[1])


def _pick(rng: np.random.Generator, ids: tuple[int, ...]) -> int:
    return ids[int(rng.integers(len(ids)))]


def _num_stuff(rng: np.random.Generator) -> int:
    return int(rng.choice(MAX_STUFF, p=(0.22, 0.38, 0.27, 0.13))) + 1


@lru_cache(maxsize=256)
def _deck(ids: tuple[int, ...], seed: int, shuffle: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng([seed, shuffle, DECK_TAG, len(ids)]).permutation(ids).tolist())


def _deal(ids: tuple[int, ...], seed: int, index: int, count: int) -> list[int]:
    """`count` different classes from a pack that is shuffled anew when used up: each comes equally often."""
    hand: list[int] = []
    most = MAX_THINGS if ids and ids[0] in select_classes("all")[0] else MAX_STUFF
    for position in range(index * most, index * most + most):
        card = _deck(ids, seed, position // len(ids))[position % len(ids)] if ids else None
        if len(hand) < count and card is not None and card not in hand:
            hand.append(card)
    return hand


def _repeat_one(rng: np.random.Generator, class_ids: list[int]) -> list[int]:
    """Sometimes a second thing of the first class, for instances that only their place tells apart."""
    if class_ids and rng.random() < 0.15:
        return class_ids[: MAX_THINGS - 1] + class_ids[:1]
    return class_ids


def _texture(rng: np.random.Generator, class_id: int, height: int, width: int) -> Image.Image:
    image = draw_stuff(rng, scenes_vocabulary().names[class_id], (height, width))
    return image.convert("RGB", color_matrix(rng, 7, 0.2, 0.16))


def _thing(rng: np.random.Generator, class_id: int, side: float) -> Image.Image:
    """A thing in its own colour, surface, pose and shading, "RGBA"."""
    drawing = int(rng.integers(num_drawings(class_id)))
    degrees, stretch = rng.uniform(-25, 25), float(np.exp(rng.uniform(-0.12, 0.12)))
    pixels = draw_thing(class_id, drawing, side, degrees, bool(rng.random() < 0.5), stretch)
    colors = pixels.convert("RGB").convert("RGB", color_matrix(rng, 12, 0.25, 0.18))
    if rng.random() < 0.7:
        colors = give_material(rng, colors)
    colors.putalpha(pixels.getchannel("A"))
    return colors


def _lay_ground(
    rng: np.random.Generator, class_ids: list[int], height: int, width: int
) -> tuple[Image.Image, list[tuple[int, np.ndarray]]]:
    """Textures with natural borders: the picture, and each region's class and (H, W) bool mask."""
    canvas = _texture(rng, class_ids[0], height, width)
    owner = np.zeros((height, width), np.uint8)
    short = min(height, width)
    direction = rng.uniform(0, np.pi)
    for number, class_id in enumerate(class_ids[1:], start=1):
        turn = rng.choice([0.0, np.pi / 2, rng.uniform(0, np.pi)])
        field = _border_field(rng, height, width, direction + turn, patch=rng.random() < 0.25)
        inside = field > 0
        if not 0.08 < inside.mean() < 0.75:
            continue
        softness = short / rng.choice([1.2, 2.0, 4.0])
        cover = np.clip(field * softness + 0.5, 0, 1) * 255
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        top, left = max(int(rows[0]) - 4, 0), max(int(columns[0]) - 4, 0)
        bottom, right = min(int(rows[-1]) + 5, height), min(int(columns[-1]) + 5, width)
        texture = _texture(rng, class_id, bottom - top, right - left)
        canvas.paste(texture, (left, top), Image.fromarray(cover[top:bottom, left:right].astype(np.uint8)))
        owner[inside] = number
    return canvas, [(class_id, owner == number) for number, class_id in enumerate(class_ids)]


@lru_cache(maxsize=1)
def _border_noise() -> Image.Image:
    return Image.fromarray(smooth_bank())


def _border_field(rng: np.random.Generator, height: int, width: int, angle: float, patch: bool) -> np.ndarray:
    """A signed field (H, W) float32 in units of the shorter side, positive inside a half-plane or a patch."""
    short = min(height, width)
    x = np.linspace(-0.5, 0.5, width, dtype=np.float32) * np.float32(width / short)
    y = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None] * np.float32(height / short)
    span = int(rng.integers(60, 300))
    left, top = (int(v) for v in rng.integers(0, BANK - span, 2))
    box = (left, top, left + span, top + span)
    wobble = np.asarray(_border_noise().resize((width, height), Image.Resampling.BILINEAR, box))
    wobble = (wobble - wobble.mean()) * np.float32(rng.uniform(0.01, 0.09))
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    along, across = x * cos + y * sin, y * cos - x * sin
    if patch:
        center, radius = rng.uniform(-0.3, 0.3, 2), rng.uniform(0.25, 0.45, 2)
        u = (along - np.float32(center[0])) / np.float32(radius[0])
        v = (across - np.float32(center[1])) / np.float32(radius[1])
        return (1 - np.sqrt(u * u + v * v)) * np.float32(radius.min()) + wobble
    wave = np.float32(rng.uniform(0, 0.05)) * np.sin(along * rng.uniform(4, 16) + rng.uniform(0, 6))
    return across - np.float32(rng.uniform(-0.22, 0.22)) + wave.astype(np.float32) + wobble


def _place_things(rng: np.random.Generator, class_ids: list[int], height: int, width: int) -> list[_Placed]:
    """Things at random sizes and places, back to front, most of them apart from one another."""
    short = min(height, width)
    smallest = min(max(0.14, 20 / short), 0.5)
    placed: list[_Placed] = []
    circles: list[tuple[float, float, float]] = []
    for class_id in class_ids:
        share = smallest + (0.6 - smallest) * rng.random() ** 1.6
        pixels = _thing(rng, class_id, share * short)
        radius, apart = share * short / 2, rng.uniform(0.5, 1.0)
        for _ in range(12):
            margin = radius * rng.uniform(0.5, 1.1)
            x, y = (rng.uniform(min(margin, side / 2), max(side - margin, side / 2)) for side in (width, height))
            if all(np.hypot(x - cx, y - cy) > apart * (radius + r) for cx, cy, r in circles):
                break
        circles.append((x, y, radius))
        left, top = round(x - pixels.width / 2), round(y - pixels.height / 2)
        placed.append(_Placed(class_id, pixels, left, top))
    return placed


def _window(thing: _Placed, height: int, width: int) -> tuple[slice, slice, tuple[int, int, int, int]] | None:
    """The thing's rows and columns in the picture, and its own box (left, top, right, bottom) inside it."""
    left, top = max(thing.left, 0), max(thing.top, 0)
    right, bottom = min(thing.left + thing.pixels.width, width), min(thing.top + thing.pixels.height, height)
    if left >= right or top >= bottom:
        return None
    box = (left - thing.left, top - thing.top, right - thing.left, bottom - thing.top)
    return slice(top, bottom), slice(left, right), box


def _visible(placed: list[_Placed], height: int, width: int) -> np.ndarray:
    """(H, W) uint8: which thing is in front at each pixel, counted from 1; 0 for none."""
    front = np.zeros((height, width), np.uint8)
    for number, thing in enumerate(placed, start=1):
        window = _window(thing, height, width)
        if window is not None:
            rows, columns, box = window
            front[rows, columns][np.asarray(thing.pixels.getchannel("A").crop(box)) > 127] = number
    return front


def _paint(
    rng: np.random.Generator, canvas: Image.Image, regions: list[tuple[int, np.ndarray]], placed: list[_Placed]
) -> tuple[np.ndarray, list[dict]]:
    """Paints the things that stay visible onto the canvas; returns the segment map and the segments."""
    height, width = canvas.height, canvas.width
    least = 60 * min(1.0, min(height, width) / 96) ** 2
    counts = np.bincount(_visible(placed, height, width).ravel(), minlength=len(placed) + 1)[1:]
    enough = [
        seen >= max(least, 0.35 * np.count_nonzero(np.asarray(thing.pixels.getchannel("A")) > 127))
        for seen, thing in zip(counts, placed, strict=True)
    ]
    placed = [thing for thing, keep in zip(placed, enough, strict=True) if keep]
    for thing in placed:
        _paint_thing(rng, canvas, thing)
    front = _visible(placed, height, width)
    panoptic = np.zeros((height, width), np.int32)
    segments: list[dict] = []
    masks = [(class_id, mask & (front == 0), False) for class_id, mask in regions]
    masks += [(thing.class_id, front == number, True) for number, thing in enumerate(placed, start=1)]
    for class_id, mask, is_thing in masks:
        if np.count_nonzero(mask) >= (1 if is_thing else least):
            segments.append({"id": len(segments) + 1, "class_id": class_id, "isthing": is_thing})
            panoptic[mask] = len(segments)
    return panoptic, segments


def _paint_thing(rng: np.random.Generator, canvas: Image.Image, thing: _Placed) -> None:
    """Pastes a thing, often with the shadow that it drops."""
    alpha = thing.pixels.getchannel("A")
    side = max(thing.pixels.size)
    if rng.random() < 0.6:
        dx, dy = (int(round(v)) for v in rng.uniform((-0.08, 0.01), (0.08, 0.09)) * side)
        strength = rng.uniform(0.25, 0.6)
        shadow = alpha.point(_dimmer(int(strength * 20)))
        if side > 24:
            shadow = shadow.filter(ImageFilter.BoxBlur(side / 40))
        canvas.paste((10, 10, 18), (thing.left + dx, thing.top + dy), shadow)
    canvas.paste(thing.pixels, (thing.left, thing.top), alpha)


@lru_cache(maxsize=32)
def _dimmer(twentieths: int) -> list[int]:
    return [value * twentieths // 20 for value in range(256)]
