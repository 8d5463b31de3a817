"""Single images of an evaluation to look at: the image, its labels and what was predicted, small."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ita_segmentation.evaluation.benchmarks import Benchmark
from ita_segmentation.evaluation.evaluator import decode_sample
from ita_segmentation.evaluation.predictors import Predictor
from ita_segmentation.evaluation.scores import BenchmarkScores
from ita_segmentation.visualization import LegendEntry, add_legend, paint_segments, resize_labels

GROUPS = ("best", "worst")
LONGEST_SIDE = 480  # examples are kept in memory until the report is written
GAP, TITLE_SIZE, PAPER, INK = 8, 15, (255, 255, 255), (24, 24, 24)


@dataclass(frozen=True)
class ExampleImage:
    """One of the best or worst images of a benchmark, with overlays of its labels and of what was predicted.

    `score` is the mean IoU of the classes in its labels, in [0, 1]; the legend, (color id, class name and remark, IoU
    in this image or None), is of both overlays.
    """

    image_id: str
    group: str
    score: float
    image: Image.Image
    reference: Image.Image
    prediction: Image.Image
    legend: Sequence[LegendEntry] = ()


def worst_and_best(
    predictor: Predictor, benchmark: Benchmark, scores: BenchmarkScores, count: int
) -> list[ExampleImage]:
    """Predict the `count` images with the lowest and the `count` with the highest mean IoU once more.

    Images without a label have no score and are left out; none is in both groups. Of equals, the earlier one comes
    first.
    """
    indices, mious = scores.image_scores
    scored = ~np.isnan(mious)
    indices, mious = indices[scored], mious[scored]
    order = mious.argsort(kind="stable")
    worst = order[: min(count, -(-len(order) // 2))]
    best = [place for place in (-mious).argsort(kind="stable") if place not in worst][:count]
    chosen = {int(indices[place]): ("worst", float(mious[place])) for place in worst}
    chosen |= {int(indices[place]): ("best", float(mious[place])) for place in best}
    names = [names[0] for names in benchmark.classes]
    found = {}
    for index, row in zip(sorted(chosen), benchmark.rows_at(sorted(chosen)), strict=True):
        sample = decode_sample(benchmark, row)
        size = sample["label"].shape
        prediction = predictor([sample["image"]], [size], frozenset({"semantic"}))[0]
        group, score = chosen[index]
        found[index] = example_image(
            image_id=sample["image_id"],
            group=group,
            score=score,
            image=sample["image"],
            reference=sample["label"],
            prediction=np.asarray(prediction.semantic),
            names=names,
            ignore_index=benchmark.ignore_index,
        )
    return [found[index] for index in chosen]


def example_image(
    image_id: str,
    group: str,
    score: float,
    image: Image.Image,
    reference: np.ndarray,
    prediction: np.ndarray,
    names: Sequence[str],
    ignore_index: int,
) -> ExampleImage:
    """Draw overlays of an image's labels and prediction, (H, W) class indices, with one legend for both."""
    if reference.shape != prediction.shape:
        raise ValueError(f"{image_id}: the reference is {reference.shape}, the prediction {prediction.shape}")
    counted = reference != ignore_index
    classes, legend = _legend(reference[counted], prediction[counted], names)
    height, width = reference.shape
    factor = min(1.0, LONGEST_SIDE / max(height, width))
    size = max(1, round(height * factor)), max(1, round(width * factor))
    small = image.convert("RGB").resize(size[::-1], Image.Resampling.LANCZOS)
    gray = small.convert("L").convert("RGB")  # colors on it keep the legend's hues
    # Color ids are places in the legend, so that the classes of one image differ as much as possible.
    places = np.full(max(len(names), int(reference.max()) + 1), -1)
    places[classes] = range(len(classes))
    overlays = [
        paint_segments(gray, places[resize_labels(labels, size)], legend)[0]
        for labels in (reference, prediction)
    ]
    return ExampleImage(image_id, group, score, small, overlays[0], overlays[1], legend)


def _legend(
    reference: np.ndarray, prediction: np.ndarray, names: Sequence[str]
) -> tuple[list[int], list[LegendEntry]]:
    """Return the classes in (n,) counted pixels, largest first, and an entry with the IoU of each."""
    true_positives, referred, predicted = (
        np.bincount(labels.astype(np.int64), minlength=len(names))
        for labels in (reference[reference == prediction], reference, prediction)
    )
    unions = referred + predicted - true_positives
    classes = np.argsort(-unions, kind="stable")[: np.count_nonzero(unions)].tolist()
    legend: list[LegendEntry] = []
    for place, label in enumerate(classes):
        if not predicted[label]:
            legend.append((place, f"{names[label]}: missed", None))
        elif not referred[label]:
            legend.append((place, f"{names[label]}: not in the labels", None))
        else:
            legend.append((place, names[label], float(true_positives[label] / unions[label])))
    return classes, legend


def numbered(examples: Sequence[ExampleImage]) -> dict[str, ExampleImage]:
    """Name the examples "best_1", ..., "worst_1", ..., the best first."""
    return {
        f"{group}_{number}": example
        for group in GROUPS
        for number, example in enumerate((item for item in examples if item.group == group), start=1)
    }


def jpeg_of(image: Image.Image, quality: int, longest_side: int | None = None) -> bytes:
    """Encode an image, scaled down to `longest_side` pixels, as the content of a JPEG file."""
    image = image.convert("RGB")
    if longest_side is not None:
        image.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality, optimize=True)
    return content.getvalue()


def side_by_side(example: ExampleImage, title: str = "image") -> Image.Image:
    """Draw the three images in a row under their titles (the first one's is given), and the legend."""
    parts = {
        title: example.image,
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
