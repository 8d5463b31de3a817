"""Prediction: many images, videos and datasets through one checkpoint, with results written as they come."""

from ita_segmentation.prediction.formats import FORMATS, ImageFormat, Item, Source
from ita_segmentation.prediction.images import segment_images
from ita_segmentation.prediction.rows import open_rows
from ita_segmentation.prediction.runs import FileRun, RunOutcome
from ita_segmentation.prediction.segmenter import DEFAULT_THRESHOLDS, TASKS, SegmentedImage, Segmenter
from ita_segmentation.prediction.segments import Segment, segments_of
from ita_segmentation.prediction.shards import ShardFolder, UnitSegmenter, segment_dataset
from ita_segmentation.prediction.sources import find_sources
from ita_segmentation.prediction.tracks import Tracks
from ita_segmentation.prediction.video import segment_video

__all__ = [
    "DEFAULT_THRESHOLDS",
    "FORMATS",
    "TASKS",
    "FileRun",
    "ImageFormat",
    "Item",
    "RunOutcome",
    "Segment",
    "SegmentedImage",
    "Segmenter",
    "ShardFolder",
    "Source",
    "Tracks",
    "UnitSegmenter",
    "find_sources",
    "open_rows",
    "segment_dataset",
    "segment_images",
    "segment_video",
    "segments_of",
]
