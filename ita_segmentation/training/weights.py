"""The weights in a checkpoint of a run: what learns, each time; what is frozen, once for all checkpoints.

A checkpoint folder loads like any other model (`from_pretrained`): two files of weights and an index. The first, with
the frozen weights, is a hard link to one file in the run's folder, so that a frozen CLIP of 1.4 GB is written and
stored once, and a checkpoint that is copied away is complete all the same.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ita_segmentation.training.checkpoints import digest, flush, unfinished
from ita_segmentation.training.ema import WeightAverage

FROZEN = "model-00001-of-00002.safetensors"
LEARNED = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
TRAINED = "trained.safetensors"  # what a resumed run starts from
AVERAGED = "averaged.safetensors"


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters that learn, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Peft's layers with a LoRA adapter, by the name of the layer without one."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")}


def learned_weights(model: nn.Module) -> dict[str, Tensor]:
    """What has learned, under the names of a model without adapters: those are added to the weights they adapt."""
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
    """Everything else that a model without adapters has, buffers among it."""
    learned = learned_weights(model)
    adapters = {f"{name}.lora_" for name in adapted_layers(model)}
    named = {name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items()}
    return {
        name: tensor
        for name, tensor in named.items()
        if name not in learned and not any(name.startswith(adapter) for adapter in adapters)
    }


class FrozenFile:
    """The frozen weights of a model, in one file of the run's folder.

    Attributes:
        fingerprint: SHA-256 over names and values; the same for the same weights.
        names: of the weights.
    """

    def __init__(self, model: nn.Module, output: Path) -> None:
        weights = frozen_weights(model)
        self.names = sorted(weights)
        self.fingerprint = fingerprint(weights)
        self.file = output / f"frozen-{self.fingerprint[:12]}.safetensors"
        self._digest: str | None = None

    def link_into(self, folder: Path, model: nn.Module) -> str:
        """Puts the file into a checkpoint's folder, as a hard link where that is possible; returns its SHA-256."""
        if not self.file.exists():
            # A run that was killed here leaves a name that is cleared away at the next start.
            save_file(on_host(frozen_weights(model)), unfinished(self.file), metadata={"format": "pt"})
            flush(unfinished(self.file))
            os.replace(unfinished(self.file), self.file)
        self._digest = self._digest or digest(self.file)
        link(self.file, folder / FROZEN)
        return self._digest


def fingerprint(weights: dict[str, Tensor]) -> str:
    """SHA-256 over the names, types, shapes and values of tensors."""
    algorithm = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        algorithm.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        algorithm.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return algorithm.hexdigest()


def link(source: Path, target: Path) -> None:
    """A hard link, or a copy on file systems that have none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def save_weights(
    model: PreTrainedModel, average: WeightAverage | None, frozen: FrozenFile, folder: Path
) -> dict[str, str]:
    """Writes configuration, code and weights of a checkpoint into an empty folder.

    `LEARNED` holds the averaged weights if there is an average, and adapters merged; `TRAINED` and `AVERAGED` what a
    resumed run needs.

    Returns: SHA-256 of the file of frozen weights, by its name.
    """
    if average is None:
        learned = learned_weights(model)
    else:
        with average.in_place():
            learned = {name: tensor.clone() for name, tensor in learned_weights(model).items()}
        average.save(folder / AVERAGED)
    model.save_pretrained(folder, state_dict=on_host(learned))
    os.replace(folder / "model.safetensors", folder / LEARNED)
    if average is None and not adapted_layers(model):
        link(folder / LEARNED, folder / TRAINED)
    else:
        save_file(on_host(dict(trainable(model))), folder / TRAINED)
    frozen_digest = frozen.link_into(folder, model)
    weight_map = {**dict.fromkeys(frozen.names, FROZEN), **dict.fromkeys(learned, LEARNED)}
    size = (folder / FROZEN).stat().st_size + (folder / LEARNED).stat().st_size
    metadata = {"total_size": size, "frozen": frozen.fingerprint}
    index = {"metadata": metadata, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")
    return {FROZEN: frozen_digest}


@torch.no_grad()
def load_weights(model: nn.Module, frozen: FrozenFile, folder: Path) -> None:
    """The weights that learn, from a checkpoint of a run of the same model.

    Raises:
        ValueError: the model is another one, or its frozen weights are others.
    """
    metadata = json.loads((folder / INDEX).read_text(encoding="utf-8"))["metadata"]
    tensors, parameters = load_file(folder / TRAINED), trainable(model)
    differing = sorted(set(tensors) ^ set(parameters)) or [
        name for name, parameter in parameters.items() if parameter.shape != tensors[name].shape
    ]
    if differing:
        raise ValueError(
            f"{folder} is of a run with other trainable weights: {len(differing)} differ, such as {differing[0]}"
        )
    if metadata["frozen"] != frozen.fingerprint:
        raise ValueError(f"{folder} is of a run with other frozen weights: give the same --clip or --model")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
