"""A checkpoint with random weights, small enough to build in a test."""

from pathlib import Path
from typing import Any

import torch

from modeling_ita import ITAConfig, ITAForOpenVocabSegmentation, ITAImageProcessor

CLASSES: list[Any] = ["sky", ["dog", "puppy"], "grass", ["car", "automobile"]]


def tiny_clip(
    tower: str = "resnet10t",
    *,
    width: int = 16,
    context_length: int = 16,
    image_size: int = 64,
    custom_text: bool = False,
) -> dict[str, Any]:
    """Give an open_clip configuration: a timm trunk or "modified_resnet", and a text tower of one layer."""
    vision: dict[str, Any] = {
        "timm_model_name": tower,
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "mlp" if tower.startswith("convnext") else "linear",
        "image_size": image_size,
    }
    if tower == "modified_resnet":
        vision = {"image_size": image_size, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
        vision["patch_size"] = None
    text = {"context_length": context_length, "vocab_size": 49408, "width": width, "heads": 2, "layers": 1}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    return config | {"custom_text": True} if custom_text else config


def tiny_config(**changes) -> ITAConfig:
    settings: dict[str, Any] = {
        "clip_model_name": "tiny",
        "clip_model_config": tiny_clip(custom_text=True),
        "vocabulary": CLASSES,
        "train_vocabulary": CLASSES[:2],
        "stuff_names": ["sky", "grass"],
        "templates": ["a photo of a {}."],
        "hidden_dim": 32,
        "mask_dim": 32,
        "num_learned_queries": 6,
        "num_dominant_categories": 3,
        "encoder_layers": 1,
        "encoder_ffn_dim": 32,
        "num_attention_heads": 2,
        "decoder_layers": 3,
        "decoder_ffn_dim": 32,
    }
    return ITAConfig(**settings | changes)


def save_tiny_checkpoint(folder: Path, **changes) -> Path:
    torch.manual_seed(0)
    ITAForOpenVocabSegmentation(tiny_config(**changes)).save_pretrained(folder)
    ITAImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(folder)
    return folder


class EncodedNames:
    """Counts the names that a model's text tower encodes from now on."""

    def __init__(self, model):
        self.count, tokenize = 0, model.clip_backbone.tokenize

        def counted(prompts):
            self.count += 1
            return tokenize(prompts)

        model.clip_backbone.tokenize = counted
