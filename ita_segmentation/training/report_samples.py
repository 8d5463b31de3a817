"""Predictions to look at, of the first evaluation images: the image, what was predicted, what is true."""

import io
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ita_segmentation.visualization import add_legend, paint_segments, resize_labels

SAMPLES = "samples"
SAMPLE_NAME = re.compile(r"step-(\d+)\.jpg")
LONGEST_SIDE, SHORTEST_SIDE = 420, 210  # of an image's longer side, in pixels of the drawing
GAP, TITLE_SIZE, PAPER, INK = 8, 14, (255, 255, 255), (24, 24, 24)
JPEG_QUALITY = 85


@dataclass(frozen=True)
class Sample:
    """One evaluation image and its label maps.

    Attributes:
        place: in the order of the evaluation images.
        name: the image's own.
        image: (H, W, 3) uint8, as the network saw it.
        prediction: (h, w) integers, class indices.
        truth: (h, w) integers, class indices or the ignore index.
    """

    place: int
    name: str
    image: np.ndarray
    prediction: np.ndarray
    truth: np.ndarray


def samples_of(
    batch: dict[str, Any], predictions: list[Tensor], places: list[int], processor: Any
) -> list[Sample]:
    """The first images of an evaluation batch, as many as there are places for, small enough to be kept.

    Args:
        batch: of the `EvaluationCollator`: `inputs` (normalised and padded pixels), `labels`, `image_names`.
        predictions: of each image (h, w) int64.
        places: of the images, in the order of the evaluation images.
        processor: the `ITAImageProcessor`, which knows how pixels were normalised.
    """
    samples = []
    for number, place in enumerate(places):
        pixels = batch["inputs"]["pixel_values"][number].float().cpu().numpy()
        mask = batch["inputs"]["pixel_mask"][number].cpu().numpy().astype(bool)
        pixels = pixels[:, : mask.any(1).sum(), : mask.any(0).sum()].transpose(1, 2, 0)
        pixels = pixels * np.asarray(processor.image_std) + np.asarray(processor.image_mean)
        image = Image.fromarray((255 * pixels).round().clip(0, 255).astype(np.uint8))
        prediction, truth = predictions[number].cpu().numpy(), np.asarray(batch["labels"][number])
        size = drawn_size(*truth.shape)
        samples.append(
            Sample(
                place,
                batch["image_names"][number],
                np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC)),
                resize_labels(prediction, size),
                resize_labels(truth, size),
            )
        )
    return samples


def drawn_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of a drawing: the longer side within `SHORTEST_SIDE` and `LONGEST_SIDE`."""
    longer = max(height, width)
    factor = min(max(longer, SHORTEST_SIDE), LONGEST_SIDE) / longer
    return max(1, round(height * factor)), max(1, round(width * factor))


def draw_samples(samples: list[Sample], class_names: list[str], ignore_index: int, title: str) -> Image.Image:
    """A row for each sample: image, prediction, truth and a legend of the classes in either.

    Args:
        class_names: (K,) names.
        title: stands above all rows.
    """
    rows = [_draw_row(sample, class_names, ignore_index) for sample in samples]
    top = 2 * TITLE_SIZE + GAP
    size = max(row.width for row in rows), top + sum(row.height + GAP for row in rows)
    canvas = Image.new("RGB", size, PAPER)
    ImageDraw.Draw(canvas).text((GAP, GAP), title, fill=INK, font=ImageFont.load_default(TITLE_SIZE + 2))
    for row in rows:
        canvas.paste(row, (0, top))
        top += row.height + GAP
    return canvas


def _draw_row(sample: Sample, class_names: list[str], ignore_index: int) -> Image.Image:
    counted = sample.truth != ignore_index
    shown, areas = np.unique(
        np.concatenate([sample.truth[counted], sample.prediction.ravel()]), return_counts=True
    )
    shown = shown[np.argsort(-areas, kind="stable")]
    # Colours go by the place in the legend, so that the classes of one image look as different as can be.
    places = np.full(max(len(class_names), ignore_index, shown.max(initial=0)) + 1, -1)
    places[shown] = np.arange(len(shown))
    legend = []
    for place, label in enumerate(shown.tolist()):
        is_true, is_said = (sample.truth == label).any(), (sample.prediction == label).any()
        remark = "" if is_true and is_said else ": missed" if is_true else ": not there"
        legend.append((place, class_names[label] + remark, None))
    image = Image.fromarray(sample.image)
    grey = image.convert("L").convert("RGB")  # what is painted on it keeps the legend's hues
    truth = np.where(counted, places[np.where(counted, sample.truth, 0)], -1)
    said = paint_segments(grey, places[sample.prediction], legend)[0]
    parts = {sample.name: image, "prediction": said, "truth": paint_segments(grey, truth, legend)[0]}
    return add_legend(_side_by_side(parts), legend)


def _side_by_side(parts: dict[str, Image.Image]) -> Image.Image:
    """Images in a row under their titles, which are cut to the image's width."""
    font = ImageFont.load_default(TITLE_SIZE)
    width = sum(part.width + GAP for part in parts.values()) - GAP
    top = 2 * TITLE_SIZE
    canvas = Image.new("RGB", (width, top + max(part.height for part in parts.values())), PAPER)
    draw, left = ImageDraw.Draw(canvas), 0
    for title, part in parts.items():
        fitting = max(1, math.floor(len(title) * part.width / max(font.getlength(title), 1.0)))
        draw.text((left, TITLE_SIZE // 2), " ".join(title.split())[:fitting], fill=INK, font=font)
        canvas.paste(part, (left, top))
        left += part.width + GAP
    return canvas


def as_jpeg(image: Image.Image, quality: int = JPEG_QUALITY) -> bytes:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality, optimize=True)
    return content.getvalue()


def sample_files(output: Path) -> dict[int, Path]:
    """Step of the evaluation -> file with its samples, in the order of steps."""
    found = [(SAMPLE_NAME.fullmatch(file.name), file) for file in (output / SAMPLES).glob("step-*.jpg")]
    return dict(sorted((int(match[1]), file) for match, file in found if match))
