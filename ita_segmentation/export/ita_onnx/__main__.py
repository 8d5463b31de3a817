"""Segment an image from the command line: `python -m ita_onnx IMAGE --classes "cat, sofa|couch"` in the folder."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from .predictor import OnnxPredictor
from .vocabulary import parse_classes

NO_CLASS = -1
THRESHOLDS = {"semantic": 0.5, "panoptic": 0.8, "instance": 0.5}


def main() -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m ita_onnx", description="Segment an image.")
    parser.add_argument("image", type=Path)
    parser.add_argument("--model", type=Path, default=Path(__file__).resolve().parents[1], metavar="DIR")
    parser.add_argument("--classes", help='such as "cat, sofa|couch" (default: the checkpoint\'s own)')
    parser.add_argument("--task", choices=tuple(THRESHOLDS), default="semantic")
    parser.add_argument("--threshold", type=float, help="minimum score (default: 0.5; panoptic 0.8)")
    parser.add_argument("--output", type=Path, metavar="PNG", help="where to write the label map")
    parser.add_argument(
        "--providers", help="of onnxruntime, such as CUDAExecutionProvider,CPUExecutionProvider"
    )
    arguments = parser.parse_args()
    threshold = THRESHOLDS[arguments.task] if arguments.threshold is None else arguments.threshold
    try:
        predictor = OnnxPredictor(arguments.model, arguments.providers and arguments.providers.split(","))
        classes = parse_classes(arguments.classes) if arguments.classes else None
        options = {"threshold": threshold, "distractors": True}
        if arguments.task == "semantic":
            options["ignore_index"] = NO_CLASS
        result = predictor(arguments.image, classes, arguments.task, **options)
        labels, found = _describe(result, classes or predictor.vocabulary)
        if arguments.output:
            kind = (
                np.uint8 if labels.max() < 255 else np.uint16
            )  # pixels without a class get its highest value
            Image.fromarray(labels.astype(kind)).save(arguments.output)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        return 1
    for segment in found:
        print(json.dumps(segment, ensure_ascii=False))  # noqa: T201
    return 0


def _describe(result, classes) -> tuple[np.ndarray, list[dict]]:
    """The map of labels, and what is in it with its share of the image."""
    if isinstance(result, dict):
        labels, entries = result["segmentation"], result["segments_info"]
    else:
        labels = result
        present = [one for one in np.unique(labels).tolist() if one != NO_CLASS]
        entries = [{"id": one, "label": classes[one][0]} for one in present]
    shares = {entry["id"]: float((labels == entry["id"]).mean()) for entry in entries}
    kept = ("id", "label", "score")
    return labels, [
        {key: entry[key] for key in kept if key in entry} | {"share": round(shares[entry["id"]], 4)}
        for entry in entries
    ]


if __name__ == "__main__":
    sys.exit(main())
