"""What a run shows of itself: its log, `results.png`, and sample predictions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ita_segmentation.data.training import TrainingClasses
from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.evaluation.metrics.confusion_matrix import count_pixels, iou_scores
from ita_segmentation.evaluation.reporting.examples import ExampleImage, example_image, side_by_side
from ita_segmentation.files import atomic_path
from ita_segmentation.training.checkpoints import checkpoints_of

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
        folder: The run's output folder, or a checkpoint. Of an unfinished run, up to its last evaluation or checkpoint.

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


def draw_results(folder: str | Path, history: Sequence[dict[str, Any]] | None = None) -> Path:
    """Draw the curves of a run to `results.png` in its folder, and return its path; ITAError if there is no log."""
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
        for name, label in names.items():
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            if points:
                marker = "o" if len(points) < 30 else None
                axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=3)
        if len(axes.lines) > 1:
            axes.legend(fontsize="small")
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        if title == "mIoU":
            axes.set_ylim(bottom=0)
        if not axes.lines:
            axes.text(0.5, 0.5, "not logged", ha="center", va="center", transform=axes.transAxes)
    file = Path(folder) / RESULTS
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return file


def take_sample(
    batch: dict[str, Any], place: int, prediction: Tensor, processor: Any, classes: TrainingClasses
) -> ExampleImage:
    """Draw the image at a place of an `EvaluationCollator`'s batch, as the network saw it, beside its prediction."""
    pixels = batch["inputs"]["pixel_values"][place].float().cpu().numpy()
    mask = batch["inputs"]["pixel_mask"][place].cpu().numpy().astype(bool)
    pixels = pixels[:, : mask.any(1).sum(), : mask.any(0).sum()].transpose(1, 2, 0)
    pixels = pixels * np.asarray(processor.image_std) + np.asarray(processor.image_mean)
    image = Image.fromarray((255 * pixels).round().clip(0, 255).astype(np.uint8))
    truth = np.asarray(batch["labels"][place])
    counts = count_pixels(prediction, truth, len(classes.classes), classes.ignore_index, prediction.device)
    score = iou_scores(counts.cpu().numpy())["miou"]
    names, predicted = [names[0] for names in classes.classes], prediction.cpu().numpy()
    name = batch["image_names"][place]
    return example_image(name, "", score, image, truth, predicted, names, classes.ignore_index)


def draw_samples(samples: Sequence[ExampleImage]) -> Image.Image:
    """Stack the drawings of samples, at least one, each under the name of its image."""
    rows = [side_by_side(sample, " ".join(sample.image_id.split())[-40:]) for sample in samples]
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def write_results(
    output: Path, state: TrainerState, samples: Sequence[ExampleImage], writers: Sequence[Any]
) -> None:
    """Write a run's log, `results.png` and the samples, if any, as `samples/step-STEP.jpg` and to TensorBoard."""
    with atomic_path(output / TRAINER_STATE_NAME) as file:
        state.save_to_json(str(file))
    draw_results(output, state.log_history)
    if not samples:
        return
    drawing = draw_samples(samples)
    with atomic_path(output / SAMPLES / f"step-{state.global_step}.jpg") as file:
        drawing.save(file, "JPEG", quality=85)
    for writer in filter(None, writers):
        writer.add_image(SAMPLES, np.asarray(drawing), state.global_step, dataformats="HWC")
