"""Checkpoints of other transformers models with random weights, small enough to build in a test."""

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

LABELS = ["sky", "dog", "grass", "car", "tree"]
CLASSES = [["sky"], ["dog", "puppy"], ["grass"], ["car", "automobile"], ["tree"]]
IS_THING = [False, True, False, True, False]

FOUR_STAGES: dict[str, Any] = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
SWIN: dict[str, Any] = {
    "image_size": 64,
    "embed_dim": 8,
    "depths": [1] * 4,
    "num_heads": [1, 2, 2, 2],
    "window_size": 2,
}
SQUARE = {"height": 64, "width": 64}
EDGES = {"shortest_edge": 64, "longest_edge": 128}
VIT: dict[str, Any] = {
    **{"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16},
    **{"image_size": 64, "patch_size": 16},
}


def options(**settings: Any) -> dict[str, Any]:
    return settings


def mask2former(labels: dict) -> tuple[Any, Any]:
    config = hf.Mask2FormerConfig(
        backbone_config=hf.SwinConfig(**SWIN, **FOUR_STAGES),
        **options(feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16),
        **options(dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2),
        **options(num_queries=8, id2label=labels),
    )
    return hf.Mask2FormerForUniversalSegmentation(config), hf.Mask2FormerImageProcessor(size=SQUARE)


def maskformer(labels: dict) -> tuple[Any, Any]:
    heads: dict[str, Any] = {
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "num_queries": 8,
        "d_model": 16,
    }
    layers: dict[str, Any] = {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
    }
    config = hf.MaskFormerConfig(
        backbone_config=hf.MaskFormerSwinConfig(**SWIN, **FOUR_STAGES),
        decoder_config=hf.DetrConfig(**heads, **layers),
        **options(fpn_feature_size=32, mask_feature_size=32, id2label=labels),
    )
    return hf.MaskFormerForInstanceSegmentation(config), hf.MaskFormerImageProcessor(size=EDGES)


def oneformer(labels: dict) -> tuple[Any, Any]:
    text: dict[str, Any] = {
        "width": 16,
        "context_length": 24,
        "num_layers": 1,
        "vocab_size": 60,
        "proj_layers": 1,
        "n_ctx": 2,
    }
    config = hf.OneFormerConfig(
        backbone_config=hf.SwinConfig(**SWIN, **FOUR_STAGES),
        **{f"text_encoder_{name}": value for name, value in text.items()},
        **options(num_queries=8, hidden_dim=32, mask_dim=32, conv_dim=32, encoder_feedforward_dim=16),
        **options(dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2),
        **options(task_seq_len=24, max_seq_len=24, query_dec_layers=1, id2label=labels),
    )
    return hf.OneFormerForUniversalSegmentation(config), hf.OneFormerImageProcessor(size=EDGES)


def detr(labels: dict) -> tuple[Any, Any]:
    backbone = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic", **FOUR_STAGES
    )
    config = hf.DetrConfig(
        **options(use_timm_backbone=False, backbone=None, use_pretrained_backbone=False, d_model=64),
        **options(encoder_layers=1, decoder_layers=1, encoder_attention_heads=8, num_queries=8),
        **options(decoder_attention_heads=8, encoder_ffn_dim=16, decoder_ffn_dim=16, id2label=labels),
        backbone_config=backbone,
    )
    return hf.DetrForSegmentation(config), hf.DetrImageProcessor(size=EDGES)


def eomt(labels: dict, **processor: Any) -> tuple[Any, Any]:
    config = hf.EomtConfig(
        **{**VIT, "patch_size": 8, "num_hidden_layers": 3, "mlp_ratio": 1, "num_blocks": 1},
        **options(num_queries=6, num_upscale_blocks=1, num_register_tokens=1, id2label=labels),
    )
    size: dict[str, Any] = {"shortest_edge": 64, "longest_edge": None if processor else 64}
    return hf.EomtForUniversalSegmentation(config), hf.EomtImageProcessor(
        size=size, **(processor or {"do_pad": True})
    )


def eomt_of_windows(labels: dict) -> tuple[Any, Any]:
    return eomt(labels, do_split_image=True)


def segformer(labels: dict) -> tuple[Any, Any]:
    config = hf.SegformerConfig(
        **options(depths=[1] * 4, hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2]),
        **options(decoder_hidden_size=16, id2label=labels),
    )
    return hf.SegformerForSemanticSegmentation(config), hf.SegformerImageProcessor(size=SQUARE)


def upernet(labels: dict) -> tuple[Any, Any]:
    backbone = hf.ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4, **FOUR_STAGES)
    head: dict[str, Any] = {"hidden_size": 16, "use_auxiliary_head": False, "pool_scales": [1, 2]}
    config = hf.UperNetConfig(backbone_config=backbone, **head, id2label=labels)
    return hf.UperNetForSemanticSegmentation(config), hf.SegformerImageProcessor(size=SQUARE)


def dpt(labels: dict) -> tuple[Any, Any]:
    neck: dict[str, Any] = {
        "neck_hidden_sizes": [8] * 4,
        "fusion_hidden_size": 8,
        "backbone_out_indices": [0, 1, 2, 3],
    }
    config = hf.DPTConfig(**VIT, **neck, is_hybrid=False, use_auxiliary_head=False, id2label=labels)
    return hf.DPTForSemanticSegmentation(config), hf.DPTImageProcessor(size=SQUARE)


def beit(labels: dict) -> tuple[Any, Any]:
    head: dict[str, Any] = {"out_indices": [1, 2, 3, 4], "pool_scales": [1, 2], "use_auxiliary_head": False}
    return hf.BeitForSemanticSegmentation(
        hf.BeitConfig(**VIT, **head, id2label=labels)
    ), hf.BeitImageProcessor(size=SQUARE, do_center_crop=True, crop_size={"height": 32, "width": 32})


def clipseg(labels: dict) -> tuple[Any, Any]:
    small: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    tokens: dict[str, Any] = {
        "vocab_size": 60,
        "max_position_embeddings": 24,
        "bos_token_id": 54,
        "eos_token_id": 55,
    }
    config = hf.CLIPSegConfig(
        text_config={**small, **tokens, "pad_token_id": 55, "num_hidden_layers": 2},
        vision_config={**small, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8},
        **options(projection_dim=16, extract_layers=[0, 1, 2], reduce_dim=8),
        **options(decoder_num_attention_heads=2, decoder_intermediate_size=16),
    )
    return hf.CLIPSegForImageSegmentation(config), hf.ViTImageProcessor(size=SQUARE)


BUILDERS = {
    builder.__name__: builder
    for builder in (
        *(mask2former, maskformer, oneformer, detr, eomt, eomt_of_windows),
        *(segformer, upernet, dpt, beit, clipseg),
    )
}


def save_tiny_baseline(name: str, folder: Path, labels: list[str] | None = None) -> Path:
    """Weights large enough that maps have several classes; a tokenizer of single letters where there is text."""
    torch.manual_seed(0)
    model, processor = BUILDERS[name](dict(enumerate(labels or LABELS)))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 2 * weight[0].numel() ** -0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if name in ("clipseg", "oneformer"):
        letters = string.ascii_lowercase + "."
        words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
        vocabulary = {word: index for index, word in enumerate(words)}
        hf.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=24).save_pretrained(folder)
    return folder


def checkpoint_maker(tmp_path_factory) -> Callable[[str], Path]:
    """Gives the checkpoint of a family, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = save_tiny_baseline(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make
