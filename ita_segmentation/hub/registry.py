"""Published checkpoints of the family that `ita models` lists and `ita convert NAME` downloads: `registry.json`.

Addresses, licenses and scores are those of the projects' own pages; no score there was measured here. A SHA-256 is
listed where a public source states it; otherwise the first download's is recorded and later ones must match.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ita_segmentation.errors import UsageError

REGISTRY = Path(__file__).with_name("registry.json")


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A checkpoint that its authors offer for download.

    Attributes:
        name: what `ita convert` calls it.
        title: system and image tower.
        family: "fc-clip", "maft-plus" or "mask-adapter".
        homepage: the project's page, which links to the file.
        url: where the file is downloaded from.
        license: of code and weights.
        clip_license: of the CLIP's weights.
        sha256: of the file, if it is known.
        parameters: number of parameters after conversion, CLIP's included, if it is known.
        clip: MODEL:TAG of its CLIP in open_clip's list.
        train_vocabulary: benchmark whose classes it was trained on.
        domain: kind of images it was trained on.
        config: fields of `ITAConfig` that no tensor shows.
        size: the image processor's size that its authors test with; None for the default.
        scores: benchmark -> metric -> published score in per cent.
    """

    name: str
    title: str
    family: str
    homepage: str
    url: str
    license: str
    clip_license: str
    sha256: str | None
    parameters: int | None
    clip: str
    train_vocabulary: str
    domain: str
    config: Mapping[str, Any]
    size: Mapping[str, int] | None
    scores: Mapping[str, Mapping[str, float]]


@lru_cache
def published_checkpoints() -> dict[str, PublishedCheckpoint]:
    """Return all published checkpoints by name, in the registry's order."""
    content = json.loads(REGISTRY.read_text(encoding="utf-8"))
    return {name: PublishedCheckpoint(name=name, **entry) for name, entry in content.items()}


def published_checkpoint(name: str) -> PublishedCheckpoint:
    """Look up a published checkpoint."""
    checkpoints = published_checkpoints()
    if name not in checkpoints:
        raise UsageError(f"no published checkpoint is called {name!r}; there are {', '.join(checkpoints)}")
    return checkpoints[name]
