"""What the authors of other systems published for the same benchmarks: for comparison, never measured here.

All were trained on COCO's masks; scores are in per cent, as printed. Scores on other protocols (such as Pascal VOC
with a background made of Pascal Context's classes) are not listed, since no benchmark here measures the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

MARK = "published by the authors, not measured here"

# The size of each benchmark's validation set: scores on fewer images compare with nothing.
VALIDATION_IMAGES: Mapping[str, int] = MappingProxyType(
    {
        "ade20k-150": 2000,
        "ade20k-847": 2000,
        "pascal-context-59": 5104,
        "pascal-context-459": 5104,
        "pascal-voc-20": 1449,
        "pascal-voc-21": 1449,
        "coco-panoptic": 5000,
        "cityscapes": 500,
    }
)


@dataclass(frozen=True)
class PublishedSystem:
    """A system and what its authors report.

    Attributes:
        name: the system's.
        image_tower: the image encoder of these scores.
        source: where it was published; empty where that is not recorded here.
        scores: benchmark -> key of the results ("miou", "pq", "ap") -> per cent.
    """

    name: str
    image_tower: str
    source: str
    scores: Mapping[str, Mapping[str, float]]

    @property
    def title(self) -> str:
        """Name, image tower and source in one line."""
        return ", ".join(part for part in (self.name, self.image_tower, self.source) if part)


def _system(
    name: str,
    image_tower: str,
    source: str = "",
    miou: tuple[float, ...] = (),
    voc_21: float | None = None,
    ade_pq: float | None = None,
    ade_ap: float | None = None,
) -> PublishedSystem:
    """`miou` is in the order of the field's tables: A-847, PC-459, A-150, PC-59, PAS-20."""
    order = ("ade20k-847", "pascal-context-459", "ade20k-150", "pascal-context-59", "pascal-voc-20")
    scores = {benchmark: {"miou": value} for benchmark, value in zip(order, miou, strict=True)}
    if voc_21 is not None:
        scores["pascal-voc-21"] = {"miou": voc_21}
    if ade_pq is not None:
        scores["ade20k-150"]["pq"] = ade_pq
    if ade_ap is not None:
        scores["ade20k-150"]["ap"] = ade_ap
    return PublishedSystem(name, image_tower, source, scores)


PUBLISHED = (
    _system(
        *("FC-CLIP", "ConvNeXt-L", "arXiv 2308.02487"),
        miou=(14.8, 18.2, 34.1, 58.4, 95.4),
        voc_21=81.8,
        ade_pq=26.8,
        ade_ap=16.8,
    ),
    _system("SED", "ConvNeXt-L", miou=(13.9, 22.6, 35.2, 60.6, 96.1)),
    _system("MAFT+", "ConvNeXt-L", miou=(15.1, 21.6, 36.1, 59.4, 96.5), ade_pq=27.1),
    _system("CAT-Seg", "ViT-L/14", miou=(16.0, 23.8, 37.9, 63.3, 97.0)),
    _system("MaskCLIP++", "EVA02-L + ConvNeXt-L", miou=(16.8, 23.9, 38.2, 62.5, 96.8), ade_pq=28.1),
    _system("ESC-Net", "ViT-L + SAM decoder", miou=(18.1, 27.0, 41.8, 65.6, 98.3)),
    _system("PCA-Seg", "ViT-L/14", miou=(18.3, 26.7, 41.5, 64.7, 98.4)),
)
