"""Load other transformers models as baselines.

Any checkpoint of `AutoModelForUniversalSegmentation` or `AutoModelForSemanticSegmentation` whose labels are the
benchmark's classes (`labels.py`), with its own image processor and post-processing (`models.py`), and
`CLIPSegForImageSegmentation` with class names as prompts (`clipseg.py`).
"""

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES,
)
from transformers.utils import logging

from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.evaluation.baselines import models
from ita_segmentation.evaluation.baselines.clipseg import ClipSegPredictor
from ita_segmentation.evaluation.baselines.labels import LabelMatch, match_labels, quoted
from ita_segmentation.evaluation.baselines.postprocessing import BaselinePredictor, Network
from ita_segmentation.evaluation.predictors import Predictor

UNUSED_WEIGHTS = {"dpt": "neck.fusion_stage.layers.0.residual_layer1."}
"""Weights that a model has and never uses (its first fusion layer has nothing to fuse); files may lack them."""

BROKEN_CHECKPOINT_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, AssertionError) + (
    (AttributeError, ImportError, SafetensorError)
)
UNIVERSAL_PREDICTORS = {
    "detr": models.DetrPredictor,
    "eomt": models.EomtPredictor,
    "eomt_dinov3": models.EomtPredictor,
    "oneformer": models.OneFormerPredictor,
}


def is_baseline(path: Path) -> bool:
    """Tell whether a folder or a name on the Hub has a readable config.json of another model than ITA."""
    if not path.is_dir() and not _may_be_on_hub(path):
        return False
    try:
        settings = _settings(path)
    except (OSError, ValueError):
        return False
    return settings.get("model_type", "ita") != "ita"


def load_baseline(
    path: Path,
    classes: Sequence[Sequence[str]],
    is_thing: Sequence[bool] | None,
    device: str,
    dtype: torch.dtype | None = None,
    size: int | None = None,
    *,
    allow_missing: bool = False,
) -> Predictor:
    """Load a checkpoint of another model for a benchmark.

    Args:
        path: a folder, or a model's name on the Hub.
        classes: K classes of the benchmark, each a list of names.
        is_thing: (K,) which of them have instances; None if that is not known: semantic segmentation only.
        device: where the model runs.
        dtype: of mixed precision; None or float32 for none.
        size: shortest side of the network's input in pixels; None for the checkpoint's own.
        allow_missing: score classes without a label as never predicted, with a warning, instead of an error.

    Raises:
        ITAError: the checkpoint cannot be loaded, is no segmentation model, lacks weights or an image processor,
            cannot take images of `size`, or its labels are not the benchmark's classes.
    """
    with _quiet():
        kind = _kind(path)
        network, tokenizer = _load(path, kind, device, dtype)
    image_processor = getattr(network.processor, "image_processor", network.processor)
    _configure_size(image_processor, size)
    if kind == "clipseg":
        predictor: BaselinePredictor = ClipSegPredictor(network, tokenizer, classes)
    else:
        match = _match(path, network.model.config.id2label, classes, allow_missing)
        if kind in MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES:
            chosen = UNIVERSAL_PREDICTORS.get(kind, models.UniversalPredictor)
            predictor = chosen(network, image_processor, match, is_thing)
        else:
            predictor = models.SemanticPredictor(network, image_processor, match)
    if size is not None:  # find out whether the model takes images of another size than its own
        blank = Image.new("RGB", (round(size * 4 / 3), size), "gray")
        with _named(f"{path} cannot take images of size {size}", 200):
            predictor([blank], [(blank.height, blank.width)], frozenset({"semantic"}))
    return predictor


@contextmanager
def _named(problem: str, limit: int = 160) -> Iterator[None]:
    """Turn what a broken checkpoint raises into an ITAError that begins with the problem."""
    try:
        yield
    except BROKEN_CHECKPOINT_ERRORS as error:
        raise ITAError(f"{problem}: {one_line(error, limit)}") from error


def _match(
    path: Path, id2label: dict[int, str], classes: Sequence[Sequence[str]], allow_missing: bool
) -> LabelMatch:
    try:
        match = match_labels([id2label[index] for index in sorted(id2label)], classes)
    except ValueError as error:
        raise ITAError(f"{path} cannot be scored here: {one_line(error)}") from error
    if match.missing:
        names = [classes[index][0] for index in match.missing]
        lack = f"{path} has no label for {len(names)} of the {len(classes)} classes: {quoted(names)}"
        if not allow_missing:
            raise ITAError(f"{lack} (--allow_missing_classes scores them as never predicted)")
        warnings.warn(f"{lack}; they are scored as never predicted", stacklevel=3)
    return match


def _may_be_on_hub(path: Path) -> bool:
    return not path.exists() and re.fullmatch(r"[\w.-]*\w/[\w.-]+", path.as_posix()) is not None


def _settings(path: Path) -> dict[str, Any]:
    """Return the content of config.json; OSError or ValueError if that cannot be read."""
    if path.is_dir():
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    else:
        settings = transformers.AutoConfig.from_pretrained(path.as_posix()).to_dict()
    if not isinstance(settings, dict):
        raise ValueError("config.json holds no settings")
    return settings


def _kind(path: Path) -> str:
    """Return the model type of a checkpoint that can be scored."""
    if not path.is_dir() and not _may_be_on_hub(path):
        raise ITAError(f"no such checkpoint folder: {path}")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ITAError(f"{path} is not a checkpoint folder: it has no config.json")
    try:
        kind = str(_settings(path).get("model_type"))
    except (OSError, ValueError) as error:
        if not path.is_dir():
            raise ITAError(f"no checkpoint folder {path}, and no such model found on the Hub") from error
        raise ITAError(f"the config.json of {path} cannot be read: {one_line(error, 160)}") from error
    known = MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES, MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
    if kind != "clipseg" and not any(kind in names for names in known):
        lacks = "which transformers has no universal or semantic segmentation of"
        raise ITAError(f"{path} is a {kind} model, {lacks}")
    return kind


def _load(path: Path, kind: str, device: str, dtype: torch.dtype | None) -> tuple[Network, Any]:
    """Load the model with its processor, and its tokenizer if it has prompts."""
    name = str(path) if path.is_dir() else path.as_posix()
    if kind == "clipseg":
        loader: Any = transformers.CLIPSegForImageSegmentation
    elif kind in MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES:
        loader = transformers.AutoModelForUniversalSegmentation
    else:
        loader = transformers.AutoModelForSemanticSegmentation
    with _named(f"the checkpoint {path} cannot be loaded", 240):
        model, report = loader.from_pretrained(name, output_loading_info=True)
        model = model.eval().to(device)
    unused = UNUSED_WEIGHTS.get(kind)
    missing = sorted(key for key in report["missing_keys"] if not (unused and key.startswith(unused)))
    if missing:
        raise ITAError(f"the checkpoint {path} lacks {len(missing)} of its weights, such as {missing[0]}")
    # OneFormer's image processor asks the Hub for a list of class names that only training needs.
    settings = {"class_info_file": None} if kind == "oneformer" else {}
    lacks = f"the checkpoint {path} has no"
    with _named(f"{lacks} image processor that can be loaded (preprocessor_config.json)"):
        processor = transformers.AutoImageProcessor.from_pretrained(name, **settings)
    if kind not in ("clipseg", "oneformer"):
        return Network(model, processor, dtype), None
    with _named(f"{lacks} tokenizer that can be loaded"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        knows_names = tokenizer("cat")["input_ids"] != tokenizer("dog")["input_ids"]
    if not knows_names:  # what transformers loads from a folder without a tokenizer's files
        raise ITAError(f"{lacks} tokenizer (tokenizer.json)")
    if kind == "oneformer":
        lengths = {"max_seq_length": model.config.max_seq_len, "task_seq_length": model.config.task_seq_len}
        processor = transformers.OneFormerProcessor(processor, tokenizer, **lengths)
    return Network(model, processor, dtype), tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' reports of what it loads: what matters of them becomes an error here."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _configure_size(image_processor: Any, side: int | None) -> None:
    """Turn off cropping, as every pixel is scored, and set the shortest side; a longest one is scaled alike."""
    if getattr(image_processor, "do_center_crop", False):
        image_processor.do_center_crop = False
    if side is None:
        return
    size = dict(image_processor.size)
    if size.get("shortest_edge"):
        changed = {"shortest_edge": side}
        if size.get("longest_edge"):
            changed["longest_edge"] = round(size["longest_edge"] * side / size["shortest_edge"])
    else:
        changed = {"height": side, "width": side}
    image_processor.size = type(image_processor.size)(**changed)
    image_processor.do_resize = True
