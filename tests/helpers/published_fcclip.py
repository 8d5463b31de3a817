"""The published FC-CLIP with ConvNeXt-L: a checkpoint of its very keys, at full size or with every width shrunken.

`fixtures/family_checkpoint_keys.json.gz` has the names and shapes that the published code saves. Values are random.
"""

import gzip
import json
import math
from pathlib import Path

import torch
from timm.models import register_model
from timm.models.convnext import ConvNeXt, _create_convnext

KEYS = Path(__file__).parents[1] / "fixtures" / "family_checkpoint_keys.json.gz"
CLIP = "backbone.clip_model."
SHRUNKEN_HEAD = {256: 32, 1024: 64, 2048: 64, 384: 16, 1536: 64}
SHRUNKEN_CLIP_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {
        "timm_model_name": "convnext_shrunken",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "mlp",
        "image_size": 320,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 16},
}


@register_model
def convnext_shrunken(pretrained: bool = False, **options) -> ConvNeXt:
    """ConvNeXt-L with a 24th of its channels."""
    return _create_convnext(
        "convnext_atto", pretrained, depths=(3, 3, 27, 3), dims=(8, 16, 32, 64), **options
    )


def published_keys() -> dict[str, list[int]]:
    keys = json.loads(gzip.decompress(KEYS.read_bytes()))["fcclip_l_maskadapter"]["keys"]
    return {key: shape for key, shape in keys.items() if not key.startswith("mask_adapter.")}


def published_tensors(shrunken: bool) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint, with random values of a sensible scale."""
    torch.manual_seed(0)
    tensors = {}
    for key, shape in published_keys().items():
        sizes = _shrink(key, shape) if shrunken else shape
        fan_in = math.prod(sizes[1:]) if len(sizes) > 1 else 1
        tensors[key] = torch.randn(sizes) / math.sqrt(max(fan_in, 1))
        if key.endswith("logit_scale"):
            tensors[key] = torch.tensor(math.log(100.0))
    return tensors


def _shrink(key: str, shape: list[int]) -> list[int]:
    if key.startswith(CLIP) or key == "void_embedding.weight":
        return [size // 24 if size >= 192 and size % 24 == 0 else size for size in shape]
    if "sampling_offsets" in key or "attention_weights" in key:
        return [shape[0], *(SHRUNKEN_HEAD[size] for size in shape[1:])]
    embedding = 96 if "in_proj" in key else 32
    sizes = SHRUNKEN_HEAD | {768: embedding, 192: 8}
    return [sizes.get(size, size) for size in shape]
