"""Weights that accelerate keeps on another device or on the disk until they are needed (`device_map`)."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

from torch import nn


def with_weights(method: Callable) -> Callable:
    """Decorate a method of a module that needs the module's weights outside of `forward`.

    Where weights are offloaded to another device or the disk, accelerate brings them in around `forward` only.
    """

    @functools.wraps(method)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hook = getattr(self, "_hf_hook", None)
        if hook is None:
            return method(self, *args, **kwargs)
        args, kwargs = hook.pre_forward(self, *args, **kwargs)
        return hook.post_forward(self, method(self, *args, **kwargs))

    return run


def load_blocks_at_once(model: nn.Module) -> None:
    """Bring in the offloaded weights of each child of a dispatched model together, not module by module.

    open_clip and `nn.MultiheadAttention` read weights of modules that they do not call, where accelerate's hooks are.
    """
    for name, block in model.named_children():
        hooks = [getattr(module, "_hf_hook", None) for module in block.modules()]
        offloading = next((hook for hook in hooks if getattr(hook, "offload", False)), None)
        if offloading is None:
            continue
        accelerate: Any = importlib.import_module("accelerate.hooks")
        accelerate.remove_hook_from_submodules(block)
        hook = accelerate.AlignDevicesHook(
            execution_device=offloading.execution_device,
            offload=True,
            weights_map=accelerate.PrefixedDataset(offloading.weights_map.dataset, f"{name}."),
            offload_buffers=offloading.offload_buffers,
            place_submodules=True,
            skip_keys=offloading.skip_keys,
            tied_params_map=offloading.tied_params_map,
        )
        accelerate.add_hook_to_module(block, hook)
