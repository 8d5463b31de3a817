"""The dataset card of a prepared dataset, for `load_dataset`, `push_to_hub` and people."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow.parquet

from ita_segmentation.data.benchmarks.base import SourceDataset


def dataset_card(
    benchmark: str, dataset: SourceDataset, folder: Path, splits: Mapping[str, Iterable[str]]
) -> bytes:
    """Write README.md: the front matter that `datasets` reads, then tables; `splits` names the files of each split."""
    from datasets import DatasetInfo, Features, SplitDict, SplitInfo
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCardData

    infos, file_bytes, features = SplitDict(), 0, Features()
    for split, names in splits.items():
        metadata = [pyarrow.parquet.read_metadata(folder / name) for name in names]
        groups = [shard.row_group(group) for shard in metadata for group in range(shard.num_row_groups)]
        num_bytes = sum(group.total_byte_size for group in groups)
        infos.add(SplitInfo(split, num_bytes, num_examples=sum(group.num_rows for group in groups)))
        file_bytes += sum((folder / name).stat().st_size for name in names)
        features = Features.from_arrow_schema(pyarrow.parquet.read_schema(folder / next(iter(names))))
    info = DatasetInfo(
        features=features,
        splits=infos,
        download_size=file_bytes,
        dataset_size=sum(split.num_bytes for split in infos.values()),
    )
    front_matter = DatasetCardData(pretty_name=benchmark, task_categories=["image-segmentation"])
    DatasetInfosDict({"default": info}).to_dataset_card_data(front_matter)
    data_files = [{"split": name, "path": f"data/{name}-*"} for name in splits]
    front_matter["configs"] = [{"config_name": "default", "data_files": data_files}]
    counts = {name: split.num_examples for name, split in infos.items()}
    return f"---\n{front_matter}\n---\n\n{_text(benchmark, dataset, features, counts)}".encode()


def _text(
    benchmark: str, dataset: SourceDataset, columns: Iterable[str], num_images: Mapping[str, int]
) -> str:
    num_things = sum(bool(category.is_thing) for category in dataset.categories)
    things = "" if dataset.categories[0].is_thing is None else f", {num_things} of them things"
    bits = 8 if dataset.ignore_index == 255 else 16
    descriptions = {
        "image": "the image, with the file content of the release",
        "label": f"class of each pixel, {bits}-bit PNG, {dataset.ignore_index} for none",
        "panoptic": "segment of each pixel, PNG, id = R + 256 G + 65536 B, 0 for none",
        "segments": "of the panoptic map: `id`, `category_id`, `isthing`, `iscrowd`",
        "classes": "classes in the image; the feature names all",
        "things": "thing classes in the image; the feature names all",
        "ignore_index": f"{dataset.ignore_index} in every row",
        "image_id": "the image's name in the release",
    }
    splits = "\n".join(f"| `{name}` | {count:,} |" for name, count in num_images.items())
    table = "\n".join(f"| `{name}` | {descriptions[name]} |" for name in columns)
    return f"""# {benchmark}

Images and labels for segmentation with {len(dataset.categories)} classes{things}, made by `ita prepare {benchmark}`
from the official release, whose terms of use apply.

| split | images |
| --- | --- |
{splits}

| column | content |
| --- | --- |
{table}

The name of a class lists its names, separated by commas. `load_dataset(folder)` reads the dataset, also with
`streaming=True`.
"""
