"""Follow segments from frame to frame of a video, so that each keeps its id, and with it its color."""

from __future__ import annotations

from typing import Any

import numpy as np

MIN_IOU = 0.3
"""Intersection over union from which two segments of one class are the same."""
MEMORY = 12
"""Frames after which a segment that is gone is forgotten."""


class Tracks:
    """Gives the segments of each frame ids that last.

    A segment gets the id of that segment of its class in earlier frames which its mask overlaps most, or a new one.
    A segment that is gone is remembered for `MEMORY` frames where nothing else took its place. The class indices of
    semantic maps last by themselves.
    """

    def __init__(self) -> None:
        self._map: np.ndarray | None = None  # where each remembered id was last
        self._label_of: dict[int, int] = {}
        self._last_seen: dict[int, int] = {}
        self._frame, self._next = 0, 1

    def follow(
        self, label_map: np.ndarray, segments: list[dict[str, Any]]
    ) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Replace one frame's ids by ids that last.

        Args:
            label_map: (H, W) segment ids of this frame, 0 for none.
            segments: "id" and "label_id" of each, and whatever else.

        Returns:
            the map and the segments with lasting ids, uint16. A frame of another size than the one before starts
            again. After 65,535 segments ids begin again at 1.
        """
        chosen = self._matches(label_map, segments)
        lasting = np.zeros(int(label_map.max(initial=0)) + 1, dtype=np.uint16)
        for segment in segments:
            number = chosen.get(segment["id"])
            if number is None:
                number = chosen[segment["id"]] = self._new()
            lasting[segment["id"]] = number
        followed = lasting[label_map]
        for segment in segments:
            number = chosen[segment["id"]]
            self._label_of[number], self._last_seen[number] = segment["label_id"], self._frame
        self._remember(followed)
        return followed, [{**segment, "id": chosen[segment["id"]]} for segment in segments]

    def _remember(self, followed: np.ndarray) -> None:
        """Lay a frame's map over what is remembered of ids that are gone, and forget the oldest of those."""
        gone = [n for n, frame in self._last_seen.items() if self._frame - MEMORY <= frame < self._frame]
        kept = followed.copy()
        if self._map is not None and self._map.shape == followed.shape and gone:
            place = (followed == 0) & np.isin(self._map, gone)
            kept[place] = self._map[place]
        self._map = kept
        self._last_seen = {n: f for n, f in self._last_seen.items() if f == self._frame or n in gone}
        self._label_of = {number: self._label_of[number] for number in self._last_seen}
        self._frame += 1

    def _matches(self, label_map: np.ndarray, segments: list[dict[str, Any]]) -> dict[int, int]:
        """This frame's ids -> remembered ids, best overlap first, each at most once."""
        before = self._map
        if before is None or before.shape != label_map.shape:
            return {}
        label_of = {segment["id"]: segment["label_id"] for segment in segments}
        base = int(before.max(initial=0)) + 1
        pairs, common = np.unique(label_map.astype(np.int64) * base + before, return_counts=True)
        areas, areas_before = np.bincount(label_map.ravel()), np.bincount(before.ravel())
        candidates = []
        for pair, shared in zip(pairs.tolist(), common.tolist(), strict=True):
            new, old = divmod(pair, base)
            if new in label_of and old in self._label_of and label_of[new] == self._label_of[old]:
                candidates.append((shared / (areas[new] + areas_before[old] - shared), old, new))
        chosen: dict[int, int] = {}
        for overlap, old, new in sorted(candidates, reverse=True):
            if overlap >= MIN_IOU and new not in chosen and old not in chosen.values():
                chosen[new] = old
        return chosen

    def _new(self) -> int:
        while self._next in self._last_seen:
            self._next = self._next % 65_535 + 1
        number, self._next = self._next, self._next % 65_535 + 1
        return number
