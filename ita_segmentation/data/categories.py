"""The official classes of each benchmark: `categories/*.json`, one class a line.

`official_name` and `id` are the release's own spelling and label value; `name` has the same words, cleaned for text
prompts ("wall-other-merged" is "wall", "diningtable" is "dining table"), with commas between synonyms. The first word
of each class is its own within the benchmark. `is_thing` is null where the release does not tell things from stuff.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from ita_segmentation.data.benchmarks.release import Category

FOLDER = Path(__file__).with_name("category_lists")


def load_categories(benchmark: str) -> tuple[Category, ...]:
    """The K classes of a benchmark; a class index is a position here.

    Raises:
        FileNotFoundError: no benchmark of that name.
    """
    return tuple(Category(row["name"], row["official_name"], row["is_thing"]) for row in _rows(benchmark))


def category_ids(benchmark: str) -> tuple[int, ...]:
    """(K,) the value that each class has in the release's own labels.

    - ade20k-150: 1..150. ade20k-847: the index in the full list, (R / 10) * 256 + G of a `_seg.png`.
    - coco-panoptic: `category_id`. pascal-context-59: `category_id` of the merged file. pascal-context-459: 1..459.
    - pascal-voc-20, -21: the palette index. cityscapes: the id in `_labelIds.png`.

    Raises:
        FileNotFoundError: no benchmark of that name.
    """
    return tuple(row["id"] for row in _rows(benchmark))


@lru_cache(maxsize=16)
def _rows(benchmark: str) -> list[dict[str, Any]]:
    return json.loads((FOLDER / f"{benchmark}.json").read_text(encoding="utf-8"))
