"""Masks as polygons along the edges of their pixels, holes included, so that filling them gives the same mask.

Formats with one ring for each polygon cannot say "without this part". A hole is therefore joined to the ring around
it by a cut of no width, which every filling rule leaves without effect.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

Point = tuple[int, int]
# Steps along pixel edges with the mask to the right (y points down), in the order of turning right.
_EAST, _SOUTH, _WEST, _NORTH = 0, 1, 2, 3
_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))


def mask_polygons(mask: np.ndarray) -> list[np.ndarray]:
    """Trace a mask.

    Pixels that touch at a corner only belong to different polygons.

    Args:
        mask: (H, W) bool.

    Returns:
        for each connected part an (n, 2) int array of (x, y) corners, 0 to W and 0 to H; the last is joined to the
        first.
    """
    rings, ring_of_top = _rings(mask)
    attached: dict[int, list[tuple[Point, int]]] = {}
    outer = []
    for index, ring in enumerate(rings):
        if _area(ring) > 0:
            outer.append(index)
            continue
        # A cut upwards from the hole's highest corner ends at a top edge of the ring around it, or of a hole above.
        x, y = start = min(ring, key=lambda point: (point[1], point[0]))
        rings[index] = ring[ring.index(start) :] + ring[: ring.index(start)]
        while y > 0 and mask[y - 1, x]:
            y -= 1
        attached.setdefault(ring_of_top[x, y], []).append(((x, y), index))
    return [np.array(list(_walk(index, rings, attached)), dtype=np.int64) for index in outer]


def _rings(mask: np.ndarray) -> tuple[list[list[Point]], dict[Point, int]]:
    """The closed boundaries of a mask, and the ring of each pixel whose upper neighbor is not in the mask."""
    padded = np.pad(mask, 1)
    inside = padded[1:-1, 1:-1]
    leaving: dict[Point, list[int]] = {}
    # The start of each edge: a pixel's upper edge runs east, its right edge south, its lower edge west, its left north.
    edges = (
        (_EAST, inside & ~padded[:-2, 1:-1], 0, 0),
        (_SOUTH, inside & ~padded[1:-1, 2:], 1, 0),
        (_WEST, inside & ~padded[2:, 1:-1], 1, 1),
        (_NORTH, inside & ~padded[1:-1, :-2], 0, 1),
    )
    for direction, where, right, down in edges:
        for y, x in np.argwhere(where).tolist():
            leaving.setdefault((x + right, y + down), []).append(direction)
    rings: list[list[Point]] = []
    ring_of_top: dict[Point, int] = {}
    visited: set[tuple[Point, int]] = set()
    for start in ((point, direction) for point, directions in leaving.items() for direction in directions):
        if start in visited:
            continue
        ring: list[Point] = []
        (point, direction), before = start, -1
        while (point, direction) not in visited:
            visited.add((point, direction))
            if direction != before:
                ring.append(point)
            if direction == _EAST:
                ring_of_top[point] = len(rings)
            before = direction
            point = (point[0] + _STEPS[direction][0], point[1] + _STEPS[direction][1])
            ways = leaving[point]
            # Of two ways on, the turn to the right stays with this pixel.
            direction = ways[0] if len(ways) == 1 else (before + 1) % 4
        rings.append(ring if direction != before else ring[1:])
    return rings, ring_of_top


def _area(ring: list[Point]) -> float:
    """Positive for a ring around pixels, negative for one around a hole."""
    points = np.array(ring)
    following = np.roll(points, -1, axis=0)
    return float((points[:, 0] * following[:, 1] - following[:, 0] * points[:, 1]).sum()) / 2


def _walk(
    outer: int, rings: list[list[Point]], attached: dict[int, list[tuple[Point, int]]]
) -> Iterator[Point]:
    """The corners of a ring, with a detour to each hole that is attached to it."""
    pending: list[Iterator[Point | int]] = [_with_detours(rings[outer], attached.get(outer, []))]
    while pending:
        for step in pending[-1]:
            if isinstance(step, int):
                ring = rings[step]
                pending.append(_with_detours([*ring, ring[0]], attached.get(step, []), closed=False))
                break
            yield step
        else:
            pending.pop()


def _with_detours(
    ring: list[Point], detours: list[tuple[Point, int]], closed: bool = True
) -> Iterator[Point | int]:
    """The corners of a ring, and before and after each hole the point where its cut begins."""
    for index, (x, y) in enumerate(ring):
        yield x, y
        if index + 1 == len(ring) and not closed:
            return
        end = ring[(index + 1) % len(ring)]
        if end[1] != y or end[0] <= x:
            continue
        on_edge = sorted((point, hole) for point, hole in detours if point[1] == y and x <= point[0] < end[0])
        for point, hole in on_edge:
            yield point
            yield hole
            yield point
