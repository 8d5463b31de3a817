"""What a run shows of itself: its log, `results.png`, and sample predictions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ita_segmentation.data.training import TrainingClasses
from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.files import atomic_path
from ita_segmentation.training.checkpoints import checkpoints_of
from ita_segmentation.visualization import add_legend, assign_colors, paint_segments, resize_labels

RESULTS, SAMPLES = "results.png", "samples"
PANELS: dict[str, dict[str, str]] = {
    "Loss": {"loss": "all predictions"},
    "Loss by part": {f"loss_{part}_sum": part for part in ("ce", "mask", "dice")},
    "Loss by part, last layer": {f"loss_{part}": part for part in ("ce", "mask", "dice")},
    "mIoU": {"eval_miou": "all", "eval_miou_seen": "seen", "eval_miou_unseen": "unseen"},
    "Learning rate": {"learning_rate": "first group"},
    "Gradient norm before clipping": {"grad_norm": "norm"},
    "Images per second": {"images_per_second": "all processes"},
    "Text queries": {
        "matched_text_queries": "share of the matched queries",
        "true_classes_dominant": "true classes that are dominant",
    },
}
"""Title of each panel of `results.png` -> the logged values and their labels."""


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """Read all log entries of a run in order, each with its `step`; docs/training.md lists what they hold.

    Args:
        folder: The run's output folder, or one of its checkpoints. Of a run that was killed or is under way, the
            entries up to its last evaluation or checkpoint.

    Raises:
        ITAError: The folder has no log, or a damaged one.
    """
    folders = [Path(folder), *checkpoints_of(Path(folder))[:1]]
    files = [one / TRAINER_STATE_NAME for one in folders if (one / TRAINER_STATE_NAME).is_file()]
    if not files:
        raise ITAError(f"{folder} has no training log ({TRAINER_STATE_NAME})")
    try:
        states = [TrainerState.load_from_json(str(file)) for file in files]
        entries = max(states, key=lambda state: state.global_step).log_history
        return [{**entry, "step": int(entry["step"])} for entry in entries]
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise ITAError(f"the training log of {folder} is damaged: {one_line(error)}") from error


def curve(history: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Collect the steps and values of a logged number; both are empty if it was never logged."""
    points = [(entry["step"], entry[name]) for entry in history if name in entry]
    return [step for step, _ in points], [value for _, value in points]


def draw_results(folder: str | Path, history: Sequence[dict[str, Any]] | None = None) -> Path:
    """Draw the curves of a run to `results.png` in its output folder; `history` is read where it is None.

    Returns:
        The image's path.

    Raises:
        ITAError: There is no log, or the image cannot be written.
    """
    from matplotlib.figure import Figure

    history = read_history(folder) if history is None else history
    figure = Figure(figsize=(16, 7))
    figure.suptitle(Path(folder).resolve().name)
    panels = figure.subplots(2, 4)
    last_step = max((entry["step"] for entry in history), default=1)
    figure.subplots_adjust(left=0.04, right=0.99, bottom=0.07, top=0.89, wspace=0.2, hspace=0.32)
    for axes, (title, names) in zip(panels.flat, PANELS.items(), strict=True):
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.set_xlim(0, 1.03 * last_step)
        curves = {label: curve(history, name) for name, label in names.items()}
        curves = {label: points for label, points in curves.items() if points[0]}
        for label, (steps, values) in curves.items():
            axes.plot(steps, values, label=label, marker="o" if len(steps) < 30 else None, markersize=3)
        if len(curves) > 1:
            axes.legend(fontsize="small")
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        if title == "mIoU":
            axes.set_ylim(bottom=0)
        if not curves:
            axes.text(0.5, 0.5, "not logged", ha="center", va="center", transform=axes.transAxes)
    file = Path(folder) / RESULTS
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return file


# ------------------------------------------------------------------------------------------------------------
# Sample predictions

SAMPLE_SIDE = 320  # pixels of an image's longer side


@dataclass(frozen=True)
class Sample:
    """One evaluation image and its label maps.

    Attributes:
        index: Among the evaluation images.
        name: Of the image.
        image: (H, W, 3) uint8, as the network saw it.
        prediction: (H, W) class indices.
        truth: (H, W) class indices, or the ignore index.
    """

    index: int
    name: str
    image: np.ndarray
    prediction: np.ndarray
    truth: np.ndarray


def take_sample(batch: dict[str, Any], place: int, index: int, prediction: Tensor, processor: Any) -> Sample:
    """Take an image from an evaluation batch, at the size of a drawing.

    Args:
        batch: Of the `EvaluationCollator`: `inputs` (normalized and padded pixels), `labels`, `image_names`.
        place: The image's place in the batch.
        index: The image's index among all evaluation images.
        prediction: (h, w) int64 class indices.
        processor: The `ITAImageProcessor` that normalized the pixels.
    """
    pixels = batch["inputs"]["pixel_values"][place].float().cpu().numpy()
    mask = batch["inputs"]["pixel_mask"][place].cpu().numpy().astype(bool)
    pixels = pixels[:, : mask.any(1).sum(), : mask.any(0).sum()].transpose(1, 2, 0)
    pixels = pixels * np.asarray(processor.image_std) + np.asarray(processor.image_mean)
    image = Image.fromarray((255 * pixels).round().clip(0, 255).astype(np.uint8))
    truth = np.asarray(batch["labels"][place])
    factor = SAMPLE_SIDE / max(truth.shape)
    size = max(1, round(truth.shape[0] * factor)), max(1, round(truth.shape[1] * factor))
    return Sample(
        index=index,
        name=batch["image_names"][place],
        image=np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC)),
        prediction=resize_labels(prediction.cpu().numpy(), size),
        truth=resize_labels(truth, size),
    )


def draw_samples(
    samples: Sequence[Sample], class_names: Sequence[str], ignore_index: int, title: str
) -> np.ndarray:
    """Draw a row for each sample: image, prediction and ground truth with their classes.

    Args:
        samples: At least one.
        class_names: (K,) names.
        ignore_index: Label of pixels that are left out; they stay unpainted.
        title: Stands above all rows.

    Returns:
        (H, W, 3) uint8.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4 * len(samples)))
    figure.suptitle(title)
    canvas = FigureCanvasAgg(figure)
    rows = figure.subplots(len(samples), 3, squeeze=False)
    figure.subplots_adjust(
        left=0.01, right=0.99, bottom=0.01, top=1 - 0.25 / len(samples), wspace=0.02, hspace=0.1
    )
    for row, sample in zip(rows, samples, strict=True):
        image = Image.fromarray(sample.image)
        gray = image.convert("L").convert("RGB")  # keeps the hues of what is painted on it
        predicted, true = (
            set(np.unique(one).tolist()) - {ignore_index} for one in (sample.prediction, sample.truth)
        )
        colors = assign_colors(sorted(predicted | true))
        drawings = {" ".join(sample.name.split())[-40:]: image}
        for name, labels, own, other, remark in (
            ("prediction", sample.prediction, predicted, true, "not there"),
            ("ground truth", sample.truth, true, predicted, "missed"),
        ):
            legend = [(i, class_names[i] + ("" if i in other else f" ({remark})"), None) for i in sorted(own)]
            painted, entries = paint_segments(gray, labels, legend, colors=colors)
            drawings[name] = add_legend(painted, entries, colors)
        for axes, (name, drawing) in zip(row, drawings.items(), strict=True):
            axes.imshow(drawing)
            axes.set_title(name, fontsize="small", parse_math=False)
            axes.axis("off")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def write_results(
    output: Path,
    state: TrainerState,
    samples: Sequence[Sample],
    classes: TrainingClasses,
    writers: Sequence[Any],
) -> None:
    """Write a run's log, `results.png` and the samples, if any, as `samples/step-STEP.jpg` and to TensorBoard."""
    with atomic_path(output / TRAINER_STATE_NAME) as file:
        state.save_to_json(str(file))
    draw_results(output, state.log_history)
    if not samples:
        return
    step, names = state.global_step, [names[0] for names in classes.classes]
    image = draw_samples(samples, names, classes.ignore_index, f"step {step:,}")
    with atomic_path(output / SAMPLES / f"step-{step}.jpg") as file:
        Image.fromarray(image).save(file, "JPEG", quality=85)
    for writer in writers:
        if writer is not None:
            writer.add_image(SAMPLES, image, step, dataformats="HWC")
