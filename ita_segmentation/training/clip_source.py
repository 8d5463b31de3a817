"""Where a new network's CLIP comes from: a folder, open_clip's list of trained CLIPs, or the Hub.

    --clip runs/scenes_clip                                            a folder, as open_clip saves it for the Hub
    --clip convnext_large_d_320:laion2b_s29b_b131k_ft_soup             MODEL:TAG of open_clip's list
    --clip hf-hub:laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup

The last two are fetched by open_clip, once, into the Hub's cache. Nothing is fetched that was not named so.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ita_segmentation.training.arguments import BadInput

HUB = "hf-hub:"

Clip = tuple[dict[str, Any], dict[str, torch.Tensor]]


def read_clip(text: str) -> Clip:
    """Configuration and weights of a trained CLIP.

    Args:
        text: a folder, MODEL:TAG, or hf-hub:OWNER/NAME, as above.

    Returns:
        `{"name", "model_cfg", "preprocess_cfg"}`, where `preprocess_cfg` has at least `mean` and `std` if they are
        known, and the state dict.

    Raises:
        BadInput: there is no such CLIP, it cannot be fetched, or it cannot be read.
    """
    if Path(text).is_dir():
        return _from_folder(Path(text))
    if text.startswith(HUB):
        return _from_hub(text.removeprefix(HUB))
    if ":" in text:
        return _from_list(*text.split(":", 1))
    raise BadInput(
        f"--clip: there is no folder {text}; a CLIP to fetch is named MODEL:TAG or {HUB}OWNER/NAME, "
        "as in convnext_large_d_320:laion2b_s29b_b131k_ft_soup"
    )


def _from_folder(folder: Path) -> Clip:
    """A folder as open_clip saves it for the Hub; its configuration file may hold `model_cfg` alone."""
    try:
        config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "open_clip_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise BadInput(f"--clip: {folder} cannot be read as a CLIP: {_one_line(error)}") from error
    config = config if "model_cfg" in config else {"model_cfg": config}
    return {"preprocess_cfg": {}, **config, "name": folder.resolve().name}, weights


def _from_list(model: str, tag: str) -> Clip:
    import open_clip

    config = open_clip.get_model_config(model)
    if config is None:
        raise BadInput(f"--clip: open_clip knows no CLIP named {model!r}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag not in tags:
        raise BadInput(f"--clip: of {model} open_clip has {', '.join(tags) or 'no weights'}, not {tag!r}")
    colours = open_clip.get_pretrained_cfg(model, tag)
    quick_gelu = bool(colours.get("quick_gelu") or config.get("quick_gelu"))
    weights = _weights(model, pretrained=tag, force_quick_gelu=quick_gelu)
    if quick_gelu:
        config["quick_gelu"] = True
    return {"name": model, "model_cfg": config, "preprocess_cfg": colours}, weights


def _from_hub(name: str) -> Clip:
    from open_clip.pretrained import download_pretrained_from_hf

    try:
        config = json.loads(Path(download_pretrained_from_hf(name, "open_clip_config.json")).read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"--clip: {HUB}{name} cannot be fetched: {_one_line(error)}") from error
    if "model_cfg" not in config:
        raise BadInput(f"--clip: the configuration of {HUB}{name} has no model_cfg")
    return {"preprocess_cfg": {}, **config, "name": name.rpartition("/")[2]}, _weights(HUB + name)


def _weights(name: str, **options: Any) -> dict[str, torch.Tensor]:
    """Weights through open_clip, which fetches, checks and converts them."""
    import open_clip

    try:
        return open_clip.create_model(name, require_pretrained=True, **options).state_dict()
    except (OSError, RuntimeError, ValueError) as error:
        raise BadInput(f"--clip: {name} cannot be fetched or read: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
