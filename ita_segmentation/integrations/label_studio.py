"""Predictions that Label Studio imports: brush masks or polygons, with labels and scores.

A brush mask is a run-length code of the image's RGBA values, as a list of bytes. The code is a string of bits: the
number of values (32), the bits of a value minus 1 (5), four sizes of run lengths minus 1 (4 each); then for each run
a bit that tells a run (1) from single values (0), the number of the size (2), the length minus 1, and the value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np

from ita_segmentation.integrations.polygons import mask_polygons
from ita_segmentation.prediction.segmenter import SegmentedImage
from ita_segmentation.prediction.segments import Segment

FROM_NAME, TO_NAME = "label", "image"
_LENGTH_BITS = (3, 4, 8, 16)


def label_studio_task(
    result: SegmentedImage, image: str, model_version: str = "ita", polygons: bool = False
) -> dict[str, Any]:
    """Make a task with one prediction.

    Args:
        result: the segments of the image.
        image: where Label Studio finds the image: a URL, or "/data/local-files/?d=..." of its local storage.
        model_version: what Label Studio calls the prediction.
        polygons: write polygons, in the place of brush masks. A hole is joined to the outline around it.

    Returns:
        the task; a list of them, as JSON, is what Label Studio imports into a project with `labeling_config`.
    """
    segments = list(result.masks())
    size = {"original_width": result.width, "original_height": result.height, "image_rotation": 0}
    common = {"from_name": FROM_NAME, "to_name": TO_NAME, **size}
    regions = []
    for segment in segments:
        label = result.vocabulary[segment.label_id][0]
        score = None if segment.score is None else round(float(segment.score), 6)
        for number, (kind, value) in enumerate(_values(segment, label, polygons)):
            name = f"{segment.id}-{number}"
            regions.append({"id": name, "type": kind, **common, "value": value, "score": score})
    scores = [float(segment.score) for segment in segments if segment.score is not None]
    prediction = {
        "model_version": model_version,
        "score": round(sum(scores) / len(scores), 6) if scores else 0.0,
        "result": regions,
    }
    return {"data": {TO_NAME: image}, "predictions": [prediction]}


def labeling_config(vocabulary: Sequence[Sequence[str]], polygons: bool = False) -> str:
    """Return the labeling interface of a project that takes the predictions.

    Args:
        vocabulary: the classes, each a list of names.
        polygons: as for `label_studio_task`.
    """
    tag = "PolygonLabels" if polygons else "BrushLabels"
    labels = "\n".join(f"    <Label value={quoteattr(names[0])}/>" for names in vocabulary)
    return (
        f'<View>\n  <Image name="{TO_NAME}" value="${TO_NAME}" zoom="true"/>\n'
        f'  <{tag} name="{FROM_NAME}" toName="{TO_NAME}">\n{labels}\n  </{tag}>\n</View>\n'
    )


def brush_rle(mask: np.ndarray) -> list[int]:
    """Encode a mask, (H, W) bool, as a brush mask: 255 in all four channels where it is true."""
    values = mask.ravel()
    ends = np.flatnonzero(np.diff(values, append=~values[-1:])) + 1
    lengths = 4 * np.diff(ends, prepend=0)
    bits = [f"{4 * values.size:032b}", f"{8 - 1:05b}", *(f"{size - 1:04b}" for size in _LENGTH_BITS)]
    for end, length in zip(ends.tolist(), lengths.tolist(), strict=True):
        value = "11111111" if values[end - 1] else "00000000"
        longest = 2 ** _LENGTH_BITS[-1]
        for start in range(0, length, longest):
            run = min(longest, length - start)
            size = next(index for index, width in enumerate(_LENGTH_BITS) if run <= 2**width)
            bits.append(f"1{size:02b}{run - 1:0{_LENGTH_BITS[size]}b}{value}")
    code = "".join(bits)
    code += "0" * (-len(code) % 8)
    return list(int(code, 2).to_bytes(len(code) // 8, "big"))


def _values(segment: Segment, label: str, polygons: bool) -> list[tuple[str, dict[str, Any]]]:
    """The type and the value of each region that a segment becomes."""
    if not polygons:
        return [("brushlabels", {"format": "rle", "rle": brush_rle(segment.mask), "brushlabels": [label]})]
    percent = 100 / np.array(segment.mask.shape[::-1])
    return [
        ("polygonlabels", {"points": (ring * percent).tolist(), "closed": True, "polygonlabels": [label]})
        for ring in mask_polygons(segment.mask)
    ]
