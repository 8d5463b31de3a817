"""A checkpoint with random weights, small enough to build in a test."""

from pathlib import Path
from typing import Any

import torch

from modeling_ita import ITAConfig, ITAForOpenVocabSegmentation, ITAImageProcessor

CLASSES: list[Any] = ["sky", ["dog", "puppy"], "grass", ["car", "automobile"]]


def tiny_config(**changes) -> ITAConfig:
    clip = {
        "embed_dim": 32,
        "vision_cfg": {
            "timm_model_name": "resnet10t",
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 64,
        },
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        "custom_text": True,
    }
    settings: dict[str, Any] = {
        "clip_model_name": "tiny",
        "clip_model_config": clip,
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
