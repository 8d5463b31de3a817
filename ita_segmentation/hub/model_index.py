"""Scores as the `model-index` of a model card, which the Hub shows beside the model.

Values are fractions, as `evaluate`'s metrics of the same names give them, rounded to four decimals: per cent with two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.evaluation.reporting.score_tables import Results, score_of
from ita_segmentation.files import write_files
from modeling_ita.model_card import FRONT_MATTER, CardError, dump, with_keys, with_scores

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


def model_index(results: Results, model_name: str) -> dict[str, Any]:
    """The front matter of a model card with these scores.

    Args:
        results: as for the report; scores that were not measured are left out.
        model_name: what the model is called on leaderboards.

    Returns:
        {"model-index": [...]}, as `huggingface_hub` writes and reads it.
    """
    return ModelCardData(model_name=model_name, eval_results=_eval_results(results)).to_dict()


def model_index_yaml(results: Results, model_name: str) -> str:
    """`model_index` as YAML, to be pasted between the two `---` at the head of a model card."""
    return dump(model_index(results, model_name))


def write_model_index(path: Path, results: Results, model: str) -> None:
    """Write the scores as YAML, to be pasted between the two `---` at the head of a model card.

    Args:
        path: file to write.
        results: benchmark -> scores, as for the report.
        model: what was evaluated, as the user gave it; the last part of it becomes the name of the model.

    Raises:
        ITAError: the file cannot be written.
    """
    name = Path(model).name or Path(model).resolve().name or model
    write_files({path: model_index_yaml(results, name).encode("utf-8", "replace")})


def update_model_card(path: Path, results: Results) -> Path:
    """Puts the scores into the front matter of a model card; everything else in it stays as it is, to the byte.

    Earlier scores on the same data set and split are replaced, those on others are kept. A card that does not exist is
    made. In a card that came with a checkpoint and that nobody has changed, the table of scores follows.

    Args:
        path: the card, or the folder whose README.md it is.

    Returns:
        the card's path.

    Raises:
        ITAError: if the card cannot be read or written, or its front matter is not what it should be.
    """
    card_path = path / "README.md" if path.is_dir() else path
    text = _read_card(card_path)
    name, earlier = _earlier_results(card_path, text)
    new = _eval_results(results)
    replaced = {result.unique_identifier for result in new}
    kept = [result for result in earlier if result.unique_identifier not in replaced]
    name = name or card_path.resolve().parent.name or "model"
    index = ModelCardData(model_name=name, eval_results=kept + new).to_dict()
    try:
        text = with_scores(with_keys(text, index))
    except CardError as error:
        raise ITAError(f"the model card {card_path}: {error}") from error
    write_files({card_path: text.encode()})
    return card_path


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


def _read_card(path: Path) -> str:
    """The text with its line ends and byte order mark as they are; "" if there is no card."""
    try:
        return path.read_bytes().decode() if path.exists() else ""
    except UnicodeDecodeError as error:
        raise ITAError(f"the model card {path} is not a UTF-8 text file") from error
    except OSError as error:
        raise ITAError(f"cannot read the model card {path}: {error.strerror or error}") from error


def _earlier_results(path: Path, text: str) -> tuple[str | None, list[EvalResult]]:
    """The name and the scores that the card has; `huggingface_hub` checks them."""
    found = FRONT_MATTER.match(text.removeprefix("\ufeff"))
    if found is None:
        return None, []
    try:
        models = (yaml.safe_load(found.group("yaml")) or {}).get("model-index") or []
        data = ModelCard(found.group()).data
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        message = f"the front matter of the model card {path} cannot be read: {one_line(error, 240)}"
        raise ITAError(message) from error
    if len(models) > 1:
        raise ITAError(f"the model card {path} has scores of {len(models)} models, not of one")
    return data.get("model_name"), list(data.get("eval_results", []))
