"""Load checkpoints."""

from pathlib import Path
from typing import Any

from ita_segmentation.errors import ITAError, one_line

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def load_checkpoint(path: Path, device: str | None = None) -> tuple[Any, Any]:
    """The model, in eval mode on `device` (a GPU if there is one, by default), and the processor of a checkpoint.

    Raises:
        ITAError: if the folder is not there, has no weights, lacks some of them, or does not fit together.
    """
    if not path.is_dir():
        raise ITAError(f"no such checkpoint folder: {path}")
    if not (path / "config.json").is_file():
        raise ITAError(f"{path} is not a checkpoint folder: it has no config.json")
    if not any((path / name).is_file() for name in WEIGHT_FILES):
        raise ITAError(f"the checkpoint folder {path} has no weights (model.safetensors)")
    if not (path / "preprocessor_config.json").is_file():
        raise ITAError(f"the checkpoint folder {path} has no image processor (preprocessor_config.json)")

    import torch
    from safetensors import SafetensorError
    from transformers import AutoImageProcessor
    from transformers.utils import logging

    from modeling_ita import ITAForOpenVocabSegmentation

    logging.disable_progress_bar()
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model, report = ITAForOpenVocabSegmentation.from_pretrained(path, output_loading_info=True)
        processor = AutoImageProcessor.from_pretrained(path)
        model = model.eval().to(chosen)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AssertionError, SafetensorError) as error:
        raise ITAError(f"the checkpoint {path} cannot be loaded: {one_line(error, 240)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ITAError(f"the checkpoint {path} lacks {len(missing)} of its weights, such as {missing[0]}")
    return model, processor


def set_shortest_side(processor: Any, side: int | None) -> None:
    """Lets the processor bring images to this shortest side in pixels; the limit of the longest scales along."""
    if side is None:
        return
    size = dict(processor.size)
    ratio = (size.get("longest_edge") or 1333) / (size.get("shortest_edge") or 800)
    processor.size = type(processor.size)(shortest_edge=side, longest_edge=round(side * ratio))
    processor.do_resize = True
