"""Segments followed from frame to frame of a video, so that one keeps its id, and with it its colour."""

from __future__ import annotations

from typing import Any

import numpy as np

LEAST_OVERLAP = 0.3
"""Intersection over union from which two segments of one class in neighbouring frames are the same."""


class Tracks:
    """Gives the segments of each frame ids that last: that of the segment of the same class in the frame before that it
    overlaps most, or a new one. A class index is an id that lasts by itself: semantic maps need none of this."""

    def __init__(self) -> None:
        self._map: np.ndarray | None = None
        self._label_of: dict[int, int] = {}
        self._next = 1

    def follow(
        self, label_map: np.ndarray, segments: list[dict[str, Any]]
    ) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """One frame's ids -> ids that last.

        Args:
            label_map: (H, W) segment ids of this frame, 0 being none.
            segments: "id" and "label_id" of each, and whatever else.

        Returns:
            the map with lasting ids, uint16, and the segments with the same. A frame of another size than the one
            before starts afresh. After 65,535 segments ids begin again at 1.
        """
        chosen = self._matches(label_map, segments)
        lasting = np.zeros(int(label_map.max(initial=0)) + 1, dtype=np.uint16)
        for segment in segments:
            number = chosen.get(segment["id"])
            if number is None:
                number = chosen[segment["id"]] = self._new(chosen)
            lasting[segment["id"]] = number
        self._map = lasting[label_map]
        self._label_of = {chosen[segment["id"]]: segment["label_id"] for segment in segments}
        return self._map, [{**segment, "id": chosen[segment["id"]]} for segment in segments]

    def _matches(self, label_map: np.ndarray, segments: list[dict[str, Any]]) -> dict[int, int]:
        """This frame's ids -> the former frame's, best overlap first, each at most once."""
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
            if overlap >= LEAST_OVERLAP and new not in chosen and old not in chosen.values():
                chosen[new] = old
        return chosen

    def _new(self, chosen: dict[int, int]) -> int:
        while self._next in chosen.values():
            self._next = self._next % 65_535 + 1
        number, self._next = self._next, self._next % 65_535 + 1
        return number
