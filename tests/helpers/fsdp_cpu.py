"""FSDP2 on CPUs, through gloo: PyTorch can, but accelerate (1.15) ignores the plugin where processes have no GPU."""

from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

# What `accelerate launch --config_file recipes/accelerate/fsdp2_8gpu.yaml` sets.
ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def allow_fsdp_on_cpus() -> None:
    """Let accelerate take the plugin that it was given where processes have no GPU."""
    initialize = AcceleratorState.__init__

    def initialize_with_fsdp(self: Any, *given: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        initialize(self, *given, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = initialize_with_fsdp  # type: ignore[method-assign]
