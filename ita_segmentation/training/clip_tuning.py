"""What a run does with CLIP: frozen in full or half precision, partly or wholly trained, or adapted by LoRA.

Only weights that the segmentation features (res2..res5) depend on are ever trained. The text tower and CLIP's head stay
as they are, so names are encoded once all the same, and CLIP stays in eval mode: batch statistics never move.
"""

import copy
from typing import Literal

import torch
from torch import nn

from ita_segmentation.training.weights import adapted_layers
from modeling_ita import ITAForOpenVocabSegmentation
from modeling_ita.clip_backbone import ClipBackbone

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
ClipPart = Literal["none", "norms", "all"]


def feature_parameters(backbone: ClipBackbone) -> dict[str, nn.Parameter]:
    """The image tower's parameters that its features depend on, by their names in the tower; found by a gradient."""
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
    """Lets "norms" (scales and shifts of normalisation layers) or "all" of the image tower's features learn."""
    if part == "none":
        return
    visual = model.clip_backbone.clip.visual
    of_norms = {
        id(parameter)
        for module in visual.modules()
        if isinstance(module, NORMS)
        for parameter in module.parameters(recurse=False)
    }
    for parameter in feature_parameters(model.clip_backbone).values():
        parameter.requires_grad_(part == "all" or id(parameter) in of_norms)


def add_adapters(model: ITAForOpenVocabSegmentation, rank: int) -> None:
    """LoRA (arXiv 2106.09685) of some rank on the image tower's linear layers and 1x1 convolutions, through peft.

    Raises:
        ImportError: peft is not installed.
        ValueError: the tower has no such layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("--lora_rank needs peft: pip install peft") from error
    backbone = model.clip_backbone
    used = {name.rpartition(".")[0] for name in feature_parameters(backbone)}
    visual = backbone.clip.visual
    targets = [name for name, module in visual.named_modules() if name in used and is_adaptable(module)]
    if not targets:
        raise ValueError("--lora_rank: CLIP's image tower has no linear layer or 1x1 convolution to adapt")
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=targets)
    inject_adapter_in_model(config, visual)
    backbone.train()


def is_adaptable(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def merge_adapters(model: nn.Module) -> None:
    """Adds what adapters learned to the weights that they adapt, and removes the adapters."""
    for name, layer in adapted_layers(model).items():
        layer.merge()
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer.get_base_layer())


def set_precision(model: ITAForOpenVocabSegmentation, dtype: str) -> None:
    """Keeps the frozen image tower in `dtype`; the text tower, which runs once, stays in float32."""
    if dtype == "float32":
        return
    backbone, precision = model.clip_backbone, getattr(torch, dtype)
    backbone.clip.visual.to(precision)

    def cast(module: nn.Module, arguments: tuple) -> tuple:
        return (arguments[0].to(precision), *arguments[1:])

    backbone.register_forward_pre_hook(cast)
    backbone.clip.visual.register_forward_pre_hook(cast)


def prepare_clip(
    model: ITAForOpenVocabSegmentation, part: ClipPart, lora_rank: int, dtype: str, channels_last: bool
) -> None:
    """All that a run's arguments say about CLIP.

    Raises:
        ValueError: they contradict each other.
        ImportError: adapters without peft.
    """
    if part != "none" and lora_rank:
        raise ValueError("give one of --train_clip and --lora_rank")
    if dtype != "float32" and (part != "none" or lora_rank):
        raise ValueError(
            f"--clip_dtype {dtype} is for a frozen CLIP; a trained one stays in float32 (see --bf16)"
        )
    if channels_last:
        model.clip_backbone.clip.visual.to(memory_format=torch.channels_last)
    set_precision(model, dtype)
    unfreeze(model, part)
    if lora_rank:
        add_adapters(model, lora_rank)
