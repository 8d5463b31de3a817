"""Scores that the authors of other systems published: for comparison, never measured here.

`published_scores.json` has for each system its image tower, its source (empty where that is not recorded here) and
its scores, benchmark -> key of the results -> percent, as printed. All were trained on COCO's masks. Scores on other
protocols (such as Pascal VOC with a background made of Pascal Context's classes) are not listed, since no benchmark
here measures the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

MARK = "published by the authors, not measured here"
VALIDATION_IMAGES = {
    "ade20k-150": 2000,
    "ade20k-847": 2000,
    "pascal-context-59": 5104,
    "pascal-context-459": 5104,
    "pascal-voc-20": 1449,
    "pascal-voc-21": 1449,
    "coco-panoptic": 5000,
    "cityscapes": 500,
}
"""Size of each benchmark's validation set: scores on fewer images are not comparable."""


@dataclass(frozen=True)
class PublishedSystem:
    """A system, its image encoder, and what its authors report: benchmark -> "miou", "pq", "ap" -> percent."""

    name: str
    image_tower: str
    source: str
    scores: Mapping[str, Mapping[str, float]]

    @property
    def title(self) -> str:
        """Name, image tower and source in one line."""
        return ", ".join(part for part in (self.name, self.image_tower, self.source) if part)


@lru_cache
def published_systems() -> tuple[PublishedSystem, ...]:
    """Read the published scores."""
    content = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return tuple(PublishedSystem(**system) for system in content)
