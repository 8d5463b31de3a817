"""FSDP2: what it needs to know of the model, and complete weights out of sharded ones and back.

torch's and accelerate's own functions for complete state dicts wait forever, or give parts, where some parameters are
sharded and others are not.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ita_segmentation.errors import ITAError

WEIGHTS = "model.safetensors"
SHARDED_WEIGHTS = "pytorch_model_fsdp.bin"  # which transformers writes beside them


def prepare_for_fsdp(model: Any, plugin: Any, device: torch.device) -> None:
    """Leave what is frozen, and trained scalars, which FSDP2 does not take, whole on each process's device."""
    model.get_input_embeddings = lambda: None  # accelerate would shard them by themselves
    whole = [one for one in model.parameters() if not (one.requires_grad and one.ndim)]
    plugin.ignored_modules = [nn.ParameterList(whole)]
    model.to(device)


def full_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gather the complete state dict, on the host where it was sharded. All processes call this together."""
    return {
        name: tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        for name, tensor in model.state_dict().items()
    }


@torch.no_grad()
def load_full_weights(model: nn.Module, folder: Path) -> None:
    """Load a checkpoint's weights, of which each process keeps its own part; ITAError if they do not fit."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        names = set(file.keys())
        for name, parameter in model.named_parameters():
            if name not in names or file.get_slice(name).get_shape() != list(parameter.shape):
                raise ITAError(f"{folder} is of a run with other weights, such as {name}")
            tensor = file.get_tensor(name).to(parameter.device)
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                tensor = distribute_tensor(tensor, mesh, placements, src_data_rank=None)
            parameter.copy_(tensor)


@contextlib.contextmanager
def class_before_sharding(model: nn.Module) -> Iterator[None]:
    """Give the model the class again that FSDP2 replaced by one of its own, whose name has no place in a checkpoint."""
    sharded: Any = type(model)
    if isinstance(model, FSDPModule):
        model.__class__ = sharded.__bases__[1]
    try:
        yield
    finally:
        model.__class__ = sharded
