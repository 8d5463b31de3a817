"""CLIP in a training run: loaded, and frozen in full or half precision, partly or fully trained, or adapted by LoRA.

Only weights that the segmentation features (res2..res5) depend on are ever trained. The text tower and CLIP's own head
stay frozen, so class names are encoded once, and CLIP stays in eval mode: batch statistics never change.

    --clip runs/scenes_clip                                            a folder in open_clip's Hub format
    --clip convnext_large_d_320:laion2b_s29b_b131k_ft_soup             MODEL:TAG of open_clip's list
    --clip hf-hub:laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup

open_clip downloads the last two once, into the Hub's cache. Nothing else is ever downloaded.
"""

import copy
import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ita_segmentation.errors import UsageError, one_line
from modeling_ita import ITAForOpenVocabSegmentation
from modeling_ita.clip_backbone import ClipBackbone

HUB = "hf-hub:"
CLIP = "clip_backbone."
EMBEDDINGS = ("embedding", "queries", "positions")  # suffixes of plain parameters that are embeddings
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
ClipPart = Literal["none", "norms", "all"]
Clip = tuple[dict[str, Any], dict[str, Tensor]]


# ------------------------------------------------------------------------------------------------------------
# Loading


def read_clip(source: str) -> Clip:
    """Read the configuration and the weights of a trained CLIP.

    Args:
        source: A folder, MODEL:TAG, or hf-hub:OWNER/NAME, as above.

    Returns:
        `{"name", "model_cfg", "preprocess_cfg"}` (the last with `mean` and `std` if they are known), and the state
        dict.

    Raises:
        UsageError: There is no such CLIP, or it cannot be downloaded or read.
    """
    if Path(source).is_dir():
        return _from_folder(Path(source))
    if source.startswith(HUB):
        return _from_hub(source.removeprefix(HUB))
    if ":" in source:
        return _from_list(*source.split(":", 1))
    raise UsageError(
        f"--clip: there is no folder {source}; a CLIP to download is named MODEL:TAG or {HUB}OWNER/NAME, "
        "as in convnext_large_d_320:laion2b_s29b_b131k_ft_soup"
    )


def _from_folder(folder: Path) -> Clip:
    """Read a folder in open_clip's Hub format; its configuration file may hold `model_cfg` alone."""
    try:
        config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "open_clip_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(f"--clip: {folder} cannot be read as a CLIP: {one_line(error)}") from error
    config = config if "model_cfg" in config else {"model_cfg": config}
    return {"preprocess_cfg": {}, **config, "name": folder.resolve().name}, weights


def _from_list(model: str, tag: str) -> Clip:
    import open_clip

    config = open_clip.get_model_config(model)
    if config is None:
        raise UsageError(f"--clip: open_clip knows no CLIP named {model!r}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag not in tags:
        raise UsageError(f"--clip: of {model} open_clip has {', '.join(tags) or 'no weights'}, not {tag!r}")
    preprocessing = open_clip.get_pretrained_cfg(model, tag)
    quick_gelu = bool(preprocessing.get("quick_gelu") or config.get("quick_gelu"))
    weights = _download(model, pretrained=tag, force_quick_gelu=quick_gelu)
    if quick_gelu:
        config["quick_gelu"] = True
    return {"name": model, "model_cfg": config, "preprocess_cfg": preprocessing}, weights


def _from_hub(name: str) -> Clip:
    from open_clip.pretrained import download_pretrained_from_hf

    try:
        config = json.loads(Path(download_pretrained_from_hf(name, "open_clip_config.json")).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"--clip: {HUB}{name} cannot be downloaded: {one_line(error)}") from error
    if "model_cfg" not in config:
        raise UsageError(f"--clip: the configuration of {HUB}{name} has no model_cfg")
    return {"preprocess_cfg": {}, **config, "name": name.rpartition("/")[2]}, _download(HUB + name)


def _download(name: str, **options: Any) -> dict[str, Tensor]:
    """Get weights through open_clip, which downloads, checks and converts them."""
    import open_clip

    try:
        return open_clip.create_model(name, require_pretrained=True, **options).state_dict()
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"--clip: {name} cannot be downloaded or read: {one_line(error)}") from error


# ------------------------------------------------------------------------------------------------------------
# Training


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Collect all trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def prepare_clip(
    model: ITAForOpenVocabSegmentation, part: ClipPart, lora_rank: int, dtype: str, channels_last: bool
) -> None:
    """Freeze, unfreeze, adapt or convert a model's CLIP in place.

    Args:
        model: The model.
        part: What of the image tower is trained.
        lora_rank: Rank of LoRA adapters; 0 adds none.
        dtype: Precision of a frozen image tower: "float32", "bfloat16" or "float16".
        channels_last: Keep the image tower in channels-last memory.

    Raises:
        UsageError: The arguments contradict each other.
    """
    if part != "none" and lora_rank:
        raise UsageError("give one of --train_clip and --lora_rank")
    if dtype != "float32" and (part != "none" or lora_rank):
        raise UsageError(
            f"--clip_dtype {dtype} is for a frozen CLIP; a trained one stays in float32 (see --bf16)"
        )
    if channels_last:
        model.clip_backbone.clip.visual.to(memory_format=torch.channels_last)
    set_precision(model, dtype)
    unfreeze(model, part)
    if lora_rank:
        add_adapters(model, lora_rank)


def feature_parameters(backbone: ClipBackbone) -> dict[str, nn.Parameter]:
    """Find the image tower's parameters that its features depend on, by a gradient; keys are names in the tower."""
    probe = copy.deepcopy(backbone.clip.visual).float().requires_grad_(True)
    tower, backbone.clip.visual = backbone.clip.visual, probe
    try:
        device = next(probe.parameters()).device
        with torch.enable_grad():
            levels = backbone(torch.zeros(1, 3, 64, 64, device=device)).levels
            total = torch.stack([level.sum() for level in levels]).sum()
        names, parameters = zip(*probe.named_parameters(), strict=True)
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    finally:
        backbone.clip.visual = tower
    own = dict(tower.named_parameters())
    return {name: own[name] for name, gradient in zip(names, gradients, strict=True) if gradient is not None}


def unfreeze(model: ITAForOpenVocabSegmentation, part: ClipPart) -> None:
    """Make "norms" (scales and shifts of normalization layers) or "all" of the image tower's features trainable."""
    if part == "none":
        return
    visual = model.clip_backbone.clip.visual
    of_norms = _parameters_of(visual, *NORMS)
    for parameter in feature_parameters(model.clip_backbone).values():
        parameter.requires_grad_(part == "all" or id(parameter) in of_norms)


def _parameters_of(model: nn.Module, *kinds: type[nn.Module]) -> set[int]:
    """Collect the ids of the own parameters of all modules of some kinds."""
    modules = [module for module in model.modules() if isinstance(module, kinds)]
    return {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}


def decayed_parameters(model: nn.Module) -> list[str]:
    """List all parameters but those of norms, embeddings and, in CLIP, biases and scales."""
    exempt = _parameters_of(model, *NORMS, nn.Embedding)
    return [
        name
        for name, parameter in model.named_parameters()
        if id(parameter) not in exempt
        and parameter.ndim > (1 if name.startswith(CLIP) else 0)
        and not name.endswith(EMBEDDINGS)
    ]


def separate_clip(optimizer: torch.optim.Optimizer, model: nn.Module, learning_rate: float) -> None:
    """Move CLIP's trained parameters into groups with a learning rate of their own."""
    of_clip = {id(p) for name, p in model.named_parameters() if CLIP in name and p.requires_grad}
    for group in list(optimizer.param_groups) if of_clip else []:
        clip = [p for p in group["params"] if id(p) in of_clip]
        group["params"] = [p for p in group["params"] if id(p) not in of_clip]
        optimizer.add_param_group({**group, "params": clip, "lr": learning_rate})


def set_precision(model: ITAForOpenVocabSegmentation, dtype: str) -> None:
    """Keep the frozen image tower in `dtype`; the text tower, which runs once, stays in float32."""
    if dtype == "float32":
        return
    backbone, precision = model.clip_backbone, getattr(torch, dtype)
    backbone.clip.visual.to(precision)

    def cast(module: nn.Module, arguments: tuple) -> tuple:
        return (arguments[0].to(precision), *arguments[1:])

    backbone.register_forward_pre_hook(cast)
    backbone.clip.visual.register_forward_pre_hook(cast)


# ------------------------------------------------------------------------------------------------------------
# Adapters


def add_adapters(model: ITAForOpenVocabSegmentation, rank: int) -> None:
    """Add LoRA adapters (arXiv 2106.09685) to the image tower's linear layers and 1x1 convolutions."""
    from peft import LoraConfig, inject_adapter_in_model

    backbone = model.clip_backbone
    used = {name.rpartition(".")[0] for name in feature_parameters(backbone)}
    visual = backbone.clip.visual
    targets = [name for name, module in visual.named_modules() if name in used and is_adaptable(module)]
    if not targets:
        raise UsageError("--lora_rank: CLIP's image tower has no linear layer or 1x1 convolution to adapt")
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=targets)
    inject_adapter_in_model(config, visual)
    backbone.train()


def is_adaptable(module: nn.Module) -> bool:
    """Tell whether a layer is linear, or a 1x1 convolution, which is the same for each pixel."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Collect peft's layers with a LoRA adapter, by the name of the layer that each replaced."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")}


def merge_adapters(model: nn.Module) -> None:
    """Add the adapters' updates to the weights that they adapt, and remove the adapters."""
    for name, layer in adapted_layers(model).items():
        layer.merge()
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer.get_base_layer())


def learned_weights(model: nn.Module) -> dict[str, Tensor]:
    """Collect the trained weights under the names of a model without adapters, which are merged."""
    layers = adapted_layers(model)
    weights: dict[str, Tensor] = {
        name: parameter.detach()
        for name, parameter in trainable(model).items()
        if not any(name.startswith(f"{layer}.") for layer in layers)
    }
    for name, layer in layers.items():
        for adapter in layer.active_adapters:
            base = layer.get_base_layer().weight
            weights[f"{name}.weight"] = (base + layer.get_delta_weight(adapter)).detach().to(base.dtype)
    return weights


def frozen_weights(model: nn.Module) -> dict[str, Tensor]:
    """Collect all other weights and buffers of a model without adapters."""
    adapters = adapted_layers(model)
    learned = {*trainable(model), *(f"{name}.weight" for name in adapters)}
    named = {name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items()}
    return {
        name: tensor
        for name, tensor in named.items()
        if name not in learned and not any(name.startswith(f"{layer}.lora_") for layer in adapters)
    }
