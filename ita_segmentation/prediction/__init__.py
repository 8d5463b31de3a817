"""Prediction: many images, videos and datasets through one checkpoint, with results written as they come."""

from ita_segmentation.prediction.dataset import ParquetFolder, ParquetSegmenter, segment_dataset
from ita_segmentation.prediction.formats import RESULT_FORMATS, ResultFormat
from ita_segmentation.prediction.image_files import PredictionRun, PredictionSummary, segment_files
from ita_segmentation.prediction.rows import open_rows
from ita_segmentation.prediction.segmenter import DEFAULT_THRESHOLDS, TASKS, SegmentedImage, Segmenter
from ita_segmentation.prediction.segments import Segment, segments_of
from ita_segmentation.prediction.sources import InputFile, find_sources
from ita_segmentation.prediction.tracks import Tracks
from ita_segmentation.prediction.video import segment_video

__all__ = [
    "DEFAULT_THRESHOLDS",
    "RESULT_FORMATS",
    "TASKS",
    "InputFile",
    "ParquetFolder",
    "ParquetSegmenter",
    "PredictionRun",
    "PredictionSummary",
    "ResultFormat",
    "Segment",
    "SegmentedImage",
    "Segmenter",
    "Tracks",
    "find_sources",
    "open_rows",
    "segment_dataset",
    "segment_files",
    "segment_video",
    "segments_of",
]
