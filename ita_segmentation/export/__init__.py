"""The network beyond eager PyTorch: `torch.export`, ONNX, and what runs there.

Importing this package imports no torch: `ita_onnx`, which a copy of goes into each exported folder, needs none.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ita_segmentation.export.folder import write_onnx_folder, write_vocabulary
    from ita_segmentation.export.ita_onnx import OnnxPredictor
    from ita_segmentation.export.network import export_network, text_to_onnx, to_onnx

__all__ = [
    "OnnxPredictor",
    "export_network",
    "text_to_onnx",
    "to_onnx",
    "write_onnx_folder",
    "write_vocabulary",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "ita_onnx" if name == "OnnxPredictor" else "folder" if name.startswith("write") else "network"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
