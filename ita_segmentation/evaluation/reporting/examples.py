"""Single images of an evaluation to look at: the image, its reference and what was predicted, small."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ita_segmentation.visualization import LegendEntry, add_legend, paint_segments, resize_labels

GROUPS = ("best", "worst")
LONGEST_SIDE = 480  # examples are kept in memory until the report is written
GAP, TITLE_SIZE, PAPER, INK = 8, 15, (255, 255, 255), (24, 24, 24)


@dataclass(frozen=True)
class ExampleImage:
    """One image of a benchmark, for looking at.

    Attributes:
        image_id: the data set's own.
        group: "best" or "worst".
        score: mean IoU of this image's classes, in [0, 1].
        image, reference, prediction: the image, and overlays of its labels and of what was predicted.
        legend: of both overlays, if they do not carry one themselves: (id of the colour, class name and what there
            is to say of it, IoU in this image or None).
    """

    image_id: str
    group: str
    score: float
    image: Image.Image
    reference: Image.Image
    prediction: Image.Image
    legend: Sequence[LegendEntry] = ()


def example_image(
    image_id: str,
    group: str,
    score: float,
    image: Image.Image,
    reference: np.ndarray,
    prediction: np.ndarray,
    class_names: Sequence[str],
    ignore_index: int,
) -> ExampleImage:
    """Overlays of an image's labels and prediction, at most 480 pixels long, with one legend for both.

    Args:
        image: the image, any mode and size.
        reference: (H, W) integers, class indices or `ignore_index`.
        prediction: (H, W) integers, class indices.
        class_names: (K,) names.

    Raises:
        ValueError: if the maps differ in shape, or `group` is not one of `GROUPS`.
    """
    reference, prediction = np.asarray(reference), np.asarray(prediction)
    if reference.shape != prediction.shape:
        raise ValueError(f"{image_id}: the reference is {reference.shape}, the prediction {prediction.shape}")
    if group not in GROUPS:
        raise ValueError(f"group must be one of {GROUPS}, got {group!r}")
    counted = reference != ignore_index
    classes, legend = _legend(reference[counted], prediction[counted], class_names)
    height, width = reference.shape
    factor = min(1.0, LONGEST_SIDE / max(height, width))
    size = max(1, round(height * factor)), max(1, round(width * factor))
    pil_image = image.convert("RGB").resize(size[::-1], Image.Resampling.LANCZOS)
    grey = pil_image.convert("L").convert("RGB")  # what is painted on it keeps the legend's hues
    # Colours go by the place in the legend, so that the classes of one image look as different as can be.
    place_of = {label: place for place, label in enumerate(classes)}
    truth, said = (
        paint_segments(grey, resize_labels(_places(labels, place_of), size), legend)[0]
        for labels in (reference, prediction)
    )
    return ExampleImage(image_id, group, score, pil_image, truth, said, legend)


def _legend(
    truth: np.ndarray, said: np.ndarray, class_names: Sequence[str]
) -> tuple[list[int], list[LegendEntry]]:
    """The classes of both maps, on the counted pixels (n,), largest first; and the entry of each with its IoU."""
    truth, said = truth.astype(np.int64), said.astype(np.int64)
    areas, claimed, hits = (
        np.bincount(labels, minlength=len(class_names)) for labels in (truth, said, truth[truth == said])
    )
    unions = areas + claimed - hits
    classes = np.argsort(-unions, kind="stable")[: np.count_nonzero(unions)].tolist()
    legend: list[LegendEntry] = []
    for place, label in enumerate(classes):
        if not claimed[label]:
            legend.append((place, f"{class_names[label]}: missed", None))
        elif not areas[label]:
            legend.append((place, f"{class_names[label]}: not there", None))
        else:
            legend.append((place, class_names[label], float(hits[label] / unions[label])))
    return classes, legend


def _places(labels: np.ndarray, place_of: Mapping[int, int]) -> np.ndarray:
    """The labels' places in the legend; -1 for those that are not in it."""
    values, places = np.unique(labels, return_inverse=True)
    return np.array([place_of.get(int(value), -1) for value in values])[places].reshape(labels.shape)


def numbered(examples: Sequence[ExampleImage]) -> dict[str, ExampleImage]:
    """The examples by names such as "best_1" and "worst_3", counted within each group, the best first."""
    return {
        f"{group}_{number}": example
        for group in GROUPS
        for number, example in enumerate((item for item in examples if item.group == group), start=1)
    }


def encode_image(image: Image.Image, kind: str, quality: int = 85) -> bytes:
    """The image as the content of a "JPEG" or "PNG" file; `quality` is JPEG's."""
    content = io.BytesIO()
    if kind == "JPEG":
        image.convert("RGB").save(content, kind, quality=quality, optimize=True)
    else:
        image.save(content, kind, optimize=True)
    return content.getvalue()


def side_by_side(example: ExampleImage) -> Image.Image:
    """The three images in a row under their titles, and the legend."""
    parts = {
        "image": example.image,
        "reference": example.reference,
        f"prediction, mean IoU {100 * example.score:.1f} %": example.prediction,
    }
    font = ImageFont.load_default(TITLE_SIZE)
    widths = [max(part.width, round(font.getlength(title))) for title, part in parts.items()]
    top = 2 * TITLE_SIZE
    size = sum(widths) + GAP * (len(parts) - 1), top + max(part.height for part in parts.values())
    canvas = Image.new("RGB", size, PAPER)
    draw, left = ImageDraw.Draw(canvas), 0
    for (title, part), width in zip(parts.items(), widths, strict=True):
        draw.text((left, TITLE_SIZE // 2), title, fill=INK, font=font)
        canvas.paste(part, (left, top))
        left += width + GAP
    return add_legend(canvas, example.legend)
