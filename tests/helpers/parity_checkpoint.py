"""Checkpoints of the published implementations, rebuilt from a recipe instead of stored.

The fixtures `NAME.json` and `NAME.safetensors` hold sizes and names of an original checkpoint's tensors, inputs and the
results that the published code computed on them (float32, CPU). Semantic scores are kept at every third pixel.
"""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from modeling_ita.image_processing_ita import ITAImageProcessor

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = ("ita_convnext_tiny", "fcclip_convnext_tiny", "fcclip_resnet_tiny")
FAMILY = ("maskadapter_fcclip_tiny", "maftp_semantic_tiny", "maftp_panoptic_tiny", "maskadapter_maftp_tiny")
"""Mask-Adapter and MAFT+, given as what they have beyond the checkpoint of `base`."""


def load_parity(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What was built, and inputs and results."""
    description = json.loads((FIXTURES / f"{name}.json").read_text())
    tensors = load_file(FIXTURES / f"{name}.safetensors")
    if "base" not in description:
        return description, tensors
    base, base_tensors = load_parity(description["base"])
    description = {**base, **description, "keys": {**base["keys"], **description["keys"]}}
    return description, {**base_tensors, **load_file(FIXTURES / "padded_image_tiny.safetensors"), **tensors}


def untold_settings(description: dict[str, Any]) -> dict[str, Any]:
    """Fields of `ITAConfig` that no tensor of a checkpoint of the family shows."""
    fields: dict[str, Any] = {}
    if description.get("geometric_ensemble"):
        fields["ensemble_alpha"], fields["ensemble_beta"] = description["geometric_ensemble"]
    if description.get("mask_adapter"):
        fields["adapter_mask_threshold"] = description["mask_adapter"]["mask_threshold"]
    if description.get("text_transfer"):
        outside = description["text_transfer"]["residual_outside_norm"]
        fields["text_transfer"] = "res_post_norm" if outside else "post_norm"
    return fields


def original_tensors(description: dict[str, Any]) -> dict[str, Tensor]:
    """The original checkpoint's tensors, made by numpy's legacy generator from their names."""
    return {key: _tensor(key, shape) for key, shape in description["keys"].items()}


def _tensor(key: str, shape: list[int]) -> Tensor:
    generator = np.random.RandomState(zlib.crc32(key.encode()))
    values = np.asarray(generator.standard_normal(shape)).astype(np.float32)
    if key.endswith("logit_scale"):
        values = np.full(shape, math.log(120 if "clip_model" in key else 40), dtype=np.float32)
    elif key.endswith("running_var"):
        values = np.abs(values) + np.float32(0.5)
    elif "sampling_offsets.weight" in key:
        values = np.float32(0.02) * values
    elif len(shape) >= 2:
        values = values * np.float32(np.sqrt(2 / np.prod(shape[1:])))
    elif key.endswith(("weight", "gamma")):
        values = 1 + np.float32(0.1) * values
    else:
        values = np.float32(0.1) * values
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).reshape(shape)


RELATIVE = 1e-4  # of a tensor's largest entry: float32 sums in another order


def assert_close(actual, expected, name):
    scale = expected.abs().max().clamp(min=1e-12)
    error = ((actual - expected).abs().max() / scale).item()
    assert error < RELATIVE, f"{name}: {error:.1e} of the largest entry"


def pixel_values(image):
    processor = ITAImageProcessor(do_resize=False)
    return processor(images=image.numpy(), input_data_format="channels_first", return_tensors="pt")
