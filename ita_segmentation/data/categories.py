"""The official classes of each benchmark, from `category_lists/*.json` (one class a line).

`official_name` and `id` are the spelling and the label value of the official release; `name` is cleaned for text
prompts ("wall-other-merged" becomes "wall", "diningtable" becomes "dining table") and lists synonyms separated by
commas. The first name of each class is unique within the benchmark. `is_thing` is null where the release does not
distinguish things from stuff.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("category_lists")


@dataclass(frozen=True)
class Category:
    """A class of a benchmark.

    Attributes:
        name: its names, the most common one first, separated by commas: "road, route".
        official_name: its name as the release spells it.
        is_thing: whether its instances are labeled separately; None where the release does not say.
    """

    name: str
    official_name: str
    is_thing: bool | None = None


def load_categories(benchmark: str) -> tuple[Category, ...]:
    """Load the K classes of a benchmark; a class index is a position in the result. Raises FileNotFoundError."""
    return tuple(Category(row["name"], row["official_name"], row["is_thing"]) for row in _rows(benchmark))


def category_ids(benchmark: str) -> tuple[int, ...]:
    """Load the value that each of the K classes has in the labels of the official release.

    - ade20k-150: 1..150. ade20k-847: the index in the full list, (R / 10) * 256 + G of a `_seg.png`.
    - coco-panoptic: `category_id`. pascal-context-59: `category_id` of the merged file. pascal-context-459: 1..459.
    - pascal-voc-20, -21: the palette index. cityscapes: the id in `_labelIds.png`.
    """
    return tuple(row["id"] for row in _rows(benchmark))


@lru_cache(maxsize=16)
def _rows(benchmark: str) -> list[dict[str, Any]]:
    return json.loads((FOLDER / f"{benchmark}.json").read_text(encoding="utf-8"))
