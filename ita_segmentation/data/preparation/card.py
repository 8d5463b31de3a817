"""The dataset card of a prepared data set: what `load_dataset`, `push_to_hub` and a person read of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ita_segmentation.data.benchmarks.release import Release
from ita_segmentation.data.preparation.shard import knows_things

if TYPE_CHECKING:
    from datasets import Features


@dataclass(frozen=True)
class SplitSize:
    """Images of a split, and bytes of its files as they are and unpacked."""

    num_images: int
    file_bytes: int
    unpacked_bytes: int


def dataset_card(
    benchmark: str, release: Release, features: Features, splits: Mapping[str, SplitSize]
) -> bytes:
    """README.md: the front matter that `datasets` reads, then the tables that people read."""
    from datasets import DatasetInfo, SplitDict, SplitInfo
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCardData

    infos = SplitDict()
    for name, size in splits.items():
        infos.add(SplitInfo(name, num_bytes=size.unpacked_bytes, num_examples=size.num_images))
    info = DatasetInfo(
        features=features,
        splits=infos,
        download_size=sum(size.file_bytes for size in splits.values()),
        dataset_size=sum(size.unpacked_bytes for size in splits.values()),
    )
    front = DatasetCardData(pretty_name=benchmark, task_categories=["image-segmentation"])
    DatasetInfosDict({"default": info}).to_dataset_card_data(front)
    front["configs"] = [
        {
            "config_name": "default",
            "data_files": [{"split": name, "path": f"data/{name}-*"} for name in splits],
        }
    ]
    return f"---\n{front}\n---\n\n{_text(benchmark, release, features, splits)}".encode()


def _text(benchmark: str, release: Release, features: Features, splits: Mapping[str, SplitSize]) -> str:
    categories = release.categories
    things = sum(bool(category.is_thing) for category in categories)
    kinds = f", {things} of them things" if knows_things(release) else ""
    rows = "\n".join(f"| `{name}` | {size.num_images:,} |" for name, size in splits.items())
    bits = 8 if release.ignore_index == 255 else 16
    columns = {
        "image": "the image, file content as in the release",
        "label": f"class of each pixel, {bits}-bit PNG, {release.ignore_index} where there is none",
        "panoptic": "segment of each pixel, PNG, id = R + 256 G + 65536 B, 0 where there is none",
        "segments": "of the panoptic map: `id`, `category_id`, `isthing`, `iscrowd`",
        "classes": "classes in the image; the feature names all",
        "things": "thing classes in the image; the feature names all",
        "ignore_index": f"{release.ignore_index} in every row",
        "image_id": "the image's name in the release",
    }
    table = "\n".join(f"| `{name}` | {columns[name]} |" for name in features)
    return f"""# {benchmark}

Images and labels for segmentation with {len(categories)} classes{kinds}, made by `run_prepare.py {benchmark}` from
the official release, whose terms of use apply.

| split | images |
| --- | --- |
{rows}

| column | what |
| --- | --- |
{table}

A class's name is its words, separated by commas. `load_dataset(folder)` reads the data set, with `streaming=True` too.
"""
