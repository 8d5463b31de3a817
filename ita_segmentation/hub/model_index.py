"""Write scores as the `model-index` of a model card, which the Hub shows beside the model.

Values are fractions, as `evaluate`'s metrics of the same names give them, rounded to four decimals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load

from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.evaluation.reporting.score_tables import Results, score_of
from ita_segmentation.files import read_mapping, write_files
from modeling_ita.checkpoint_code import CARD_FILE, CardError, is_generated, read_card, write_model_card

TASK_TYPE, TASK_NAME = "image-segmentation", "Image segmentation"

# Key of the results -> (type and name of the metric).
METRICS = {
    "miou": ("mean_iou", "mean IoU"),
    "miou_seen": ("mean_iou", "mean IoU, classes with masks in training"),
    "miou_unseen": ("mean_iou", "mean IoU, classes without masks in training"),
    "fwiou": ("frequency_weighted_iou", "frequency-weighted IoU"),
    "macc": ("mean_accuracy", "mean class accuracy"),
    "pacc": ("overall_accuracy", "pixel accuracy"),
    "pq": ("pq", "panoptic quality"),
    "sq": ("sq", "segmentation quality"),
    "rq": ("rq", "recognition quality"),
    "ap": ("ap", "mask AP at IoU 0.50:0.95"),
    "ap50": ("ap50", "mask AP at IoU 0.50"),
    "ap75": ("ap75", "mask AP at IoU 0.75"),
}
DATASET_NAMES = {
    "scenes": "Scenes",
    "ade20k-150": "ADE20K, 150 classes",
    "ade20k-847": "ADE20K, 847 classes",
    "pascal-context-59": "Pascal Context, 59 classes",
    "pascal-context-459": "Pascal Context, 459 classes",
    "pascal-voc-20": "Pascal VOC 2012, 20 classes",
    "pascal-voc-21": "Pascal VOC 2012, 20 classes and background",
    "coco-panoptic": "COCO 2017 panoptic",
    "cityscapes": "Cityscapes",
}


def write_model_index(path: Path, results: Results, model: str) -> None:
    """Write the scores as YAML, to be pasted between the two `---` at the head of a model card."""
    name = Path(model).name or Path(model).resolve().name or model
    data = ModelCardData(model_name=name, eval_results=_eval_results(results))
    write_files({path: f"{data.to_yaml()}\n".encode("utf-8", "replace")})


def update_model_card(path: Path, results: Results) -> Path:
    """Put the scores into the front matter of a model card.

    Earlier scores on the same dataset and split are replaced, those on others are kept. A card that does not exist is
    made. The text of a card stays to the byte, except for one that came with a checkpoint and that nobody has
    changed: its table of scores follows.

    Args:
        path: the card, or the folder whose README.md it is.
        results: benchmark -> scores, as for the report.

    Returns:
        The card's path.

    Raises:
        ITAError: the card cannot be read or written, or its front matter is not what it should be.
    """
    path = path / CARD_FILE if path.is_dir() else path
    try:
        card = read_card(path) or ModelCard("---\n{}\n---\n")
        models = (metadata_load(path) or {}).get("model-index") or [] if path.is_file() else []
    except (CardError, OSError) as error:
        raise ITAError(f"the model card {path}: {one_line(error, 240)}") from error
    if len(models) > 1:
        raise ITAError(f"the model card {path} has scores of {len(models)} models, not of one")
    new = _eval_results(results)
    replaced = {result.unique_identifier for result in new}
    kept = [one for one in card.data.get("eval_results") or [] if one.unique_identifier not in replaced]
    card.data["eval_results"] = kept + new
    card.data["model_name"] = card.data.get("model_name") or path.resolve().parent.name or "model"
    write_files({path: str(card).encode()})
    if is_generated(card.text) and (path.parent / "config.json").is_file():
        write_model_card(path.parent, read_mapping(path.parent / "config.json"))
    return path


def _eval_results(results: Results) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=TASK_TYPE,
            task_name=TASK_NAME,
            dataset_type=benchmark,
            dataset_name=DATASET_NAMES.get(benchmark, benchmark),
            dataset_split=_split_of(scores),
            dataset_args={"num_images": int(scores["num_images"])},
            metric_type=metric_type,
            metric_name=metric_name,
            metric_value=round(score_of(scores, key), 4),
        )
        for benchmark, scores in results.items()
        for key, (metric_type, metric_name) in METRICS.items()
        if not math.isnan(score_of(scores, key))
    ]


def _split_of(scores: Mapping[str, Any]) -> str | None:
    split = scores.get("settings", {}).get("split")
    return None if split is None else str(split)
