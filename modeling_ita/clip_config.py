"""Open_clip's configuration of the frozen CLIP: found by name, and checked before anything is built of it."""

import copy
from typing import Any

from .configuration_ita import MAX_PARAMETERS

LARGEST_CLIP_SIZE = 100_000
CLIP_COUNTS = ("embed_dim", "width", "layers", "heads", "context_length", "vocab_size")
CLIP_LIMITS = {"layers": 1000, "vocab_size": 10_000_000}


def resolve_clip_config(name: str, config: dict[str, Any] | None) -> dict[str, Any]:
    """Give the open_clip configuration to build, a copy of `config` or else from open_clip's registry.

    Args:
        name: of a CLIP in open_clip's registry.
        config: an open_clip model configuration, which takes precedence.

    Raises:
        ValueError: an unknown name, or a configuration that cannot serve: no tower with four stages, or a text tower
            that would have to be downloaded.
    """
    if config is None:
        from open_clip import get_model_config, list_models

        config = get_model_config(name) if ":" not in name else None
        if config is None:
            close = [
                known for known in list_models() if known.split("_")[0] == name.split("_", maxsplit=1)[0]
            ][:8]
            hint = f"; did you mean one of {', '.join(close)}?" if close else ""
            raise ValueError(f"open_clip knows no CLIP named {name!r}{hint}")
    config = copy.deepcopy(config)
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if missing:
        raise ValueError(f"the CLIP configuration lacks {', '.join(missing)}")
    vision, text = config["vision_cfg"], config["text_cfg"]
    for part, sizes in (("", {"embed_dim": config["embed_dim"]}), ("vision_cfg", vision), ("text_cfg", text)):
        _check_clip_sizes(part, sizes)
    _check_clip_parameters(config["embed_dim"], vision, text)
    if ":" in str(vision.get("timm_model_name")):
        raise ValueError("timm_model_name must name an architecture of timm, not a model on the Hub")
    if text.get("hf_model_name") or text.get("hf_tokenizer_name"):
        raise ValueError(
            f"CLIP {name!r} has a text tower from the Hub, which is not supported: use an open_clip one"
        )
    if not vision.get("timm_model_name") and not isinstance(vision.get("layers"), list | tuple):
        raise ValueError(f"CLIP {name!r} has a plain vision transformer; a tower with four stages is needed")
    if vision.get("timm_model_name"):
        vision["timm_model_pretrained"] = False
    return config


def _check_clip_sizes(part: str, sizes: Any) -> None:
    """Check that no size in a part of an open_clip configuration is negative or absurd.

    Raises:
        ValueError: one is, or the part is not a mapping.
    """
    if not isinstance(sizes, dict):
        raise ValueError(f"{part} of the CLIP configuration must be a mapping, got {sizes!r:.60}")
    for name, value in sizes.items():
        is_count = isinstance(value, int) and not isinstance(value, bool)
        if name in CLIP_COUNTS and not is_count and not (part == "vision_cfg" and name == "layers"):
            raise ValueError(f"{name} of the CLIP configuration must be an integer, got {value!r:.60}")
        most = CLIP_LIMITS.get(name, LARGEST_CLIP_SIZE)
        numbers = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(number, int | float) and not 0 <= number <= most for number in numbers):
            raise ValueError(f"{name} of the CLIP configuration must be from 0 to {most}, got {value!r:.60}")


def _check_clip_parameters(embed_dim: int, vision: dict[str, Any], text: dict[str, Any]) -> None:
    """Check, by rough numbers of parameters, that sizes which are possible each are not absurd together.

    Raises:
        ValueError: they are, or one is not a number.
    """
    layers = vision.get("layers", 12)
    try:
        of_text = text.get("vocab_size", 49408) + text.get("context_length", 77) + embed_dim
        of_text = text.get("width", 512) * (of_text + 12 * text.get("layers", 12) * text.get("width", 512))
        side = vision.get("image_size", 224)
        cells = max(side if isinstance(side, list | tuple) else [side]) ** 2 // 32**2
        depth, width = sum(layers) if isinstance(layers, list | tuple) else 0, vision.get("width", 64)
        of_vision = depth * 20 * (8 * width) ** 2 + 32 * width * (cells + embed_dim)
    except (TypeError, ValueError) as error:
        raise ValueError(f"sizes of the CLIP configuration must be integers: {error!s:.200}") from error
    if not max(of_text, of_vision) <= MAX_PARAMETERS:
        raise ValueError(
            "the sizes of the CLIP configuration make a tower of more than 20 billion parameters"
        )
