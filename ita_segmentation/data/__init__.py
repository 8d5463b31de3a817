"""Datasets: official releases and their preparation, training data, and Scenes, a synthetic dataset."""

from ita_segmentation.data.categories import Category, category_ids, load_categories
from ita_segmentation.data.prepared import (
    DatasetVocabulary,
    count_rows,
    decode_row,
    load_prepared,
    prepared_splits,
    vocabulary_of,
)

__all__ = [
    "Category",
    "DatasetVocabulary",
    "category_ids",
    "count_rows",
    "load_categories",
    "load_prepared",
    "prepared_splits",
    "decode_row",
    "vocabulary_of",
]
