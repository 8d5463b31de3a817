"""The official classes of each benchmark: how many, which are things, and which values they have in the release."""

import pytest

from ita_segmentation.data.benchmarks import SOURCE_DATASETS
from ita_segmentation.data.categories import category_ids, load_categories

NUM_CLASSES_AND_THINGS = {
    "ade20k-150": (150, 100),
    "ade20k-847": (847, None),
    "pascal-context-59": (59, None),
    "pascal-context-459": (459, None),
    "pascal-voc-20": (20, 20),
    "pascal-voc-21": (21, 20),
    "coco-panoptic": (133, 80),
    "cityscapes": (19, 8),
}


def test_every_benchmark_with_classes_of_its_own_has_a_table():
    assert {*NUM_CLASSES_AND_THINGS, "folder"} == set(SOURCE_DATASETS)


@pytest.mark.parametrize("benchmark", NUM_CLASSES_AND_THINGS)
def test_classes_are_as_many_as_official_and_each_has_names_and_a_value_of_its_own(benchmark):
    categories = load_categories(benchmark)
    count, things = NUM_CLASSES_AND_THINGS[benchmark]
    assert len(categories) == count
    if things is None:
        assert all(category.is_thing is None for category in categories)
    else:
        assert sum(bool(category.is_thing) for category in categories) == things
    for names in (
        [category.name for category in categories],
        [category.name.split(", ")[0] for category in categories],
        [category.official_name for category in categories],
        category_ids(benchmark),
    ):
        assert len(set(names)) == count
    for category in categories:
        synonyms = category.name.split(", ")
        assert len(set(synonyms)) == len(synonyms)
        assert all(name == name.strip() and name for name in synonyms)


def test_names_are_cleaned_for_prompts_and_official_names_are_kept():
    names = {category.official_name: category.name for category in load_categories("coco-panoptic")}
    assert names["wall-other-merged"] == "wall" and names["sky-other-merged"] == "sky"
    assert names["door-stuff"] == "door" and names["floor-wood"].startswith("wooden floor")
    assert not any("-merged" in name or "-other" in name or "-stuff" in name for name in names.values())
    for benchmark in ("pascal-voc-20", "pascal-context-59", "pascal-context-459"):
        names = [category.name for category in load_categories(benchmark)]
        assert not {"diningtable", "pottedplant", "tvmonitor"} & set(names)


def test_values_are_those_of_the_releases():
    assert category_ids("ade20k-150") == tuple(range(1, 151))
    assert category_ids("pascal-context-459") == tuple(range(1, 460))
    assert category_ids("pascal-voc-20") == tuple(range(1, 21))
    assert category_ids("pascal-voc-21") == tuple(range(21))
    assert (
        category_ids("pascal-context-59")[:3] == (2, 9, 18) and category_ids("pascal-context-59")[-1] == 458
    )
    assert category_ids("cityscapes") == (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33)
    coco = dict(
        zip(
            (c.official_name for c in load_categories("coco-panoptic")),
            category_ids("coco-panoptic"),
            strict=True,
        )
    )
    assert (coco["person"], coco["toothbrush"], coco["banner"], coco["rug-merged"]) == (1, 90, 92, 200)
    ade = [
        (c.official_name, i)
        for c, i in zip(load_categories("ade20k-847"), category_ids("ade20k-847"), strict=True)
    ]
    assert ade[:2] == [("wall", 2978), ("building, edifice", 312)]


def test_a_benchmark_that_does_not_exist_has_no_table():
    with pytest.raises(FileNotFoundError):
        load_categories("imagenet")
