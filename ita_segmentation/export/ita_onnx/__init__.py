"""Segment images by any class names with onnxruntime, numpy, Pillow and tokenizers: neither torch nor transformers.

`ita export` writes a copy of this package into the folder that it makes, so that a program takes the folder and
nothing else:

    from ita_onnx import OnnxPredictor

    predictor = OnnxPredictor("exported")
    label_map = predictor("photo.jpg", ["cat", ["sofa", "couch"], "wall"])
"""

from .images import preprocess, read_image
from .postprocessing import OnnxOutputs, instance_segments, panoptic_segments, semantic_map
from .predictor import OnnxPredictor
from .vocabulary import parse_classes

__all__ = [
    "OnnxOutputs",
    "OnnxPredictor",
    "instance_segments",
    "panoptic_segments",
    "parse_classes",
    "preprocess",
    "read_image",
    "semantic_map",
]
