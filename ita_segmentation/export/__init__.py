"""The network beyond eager PyTorch: `torch.export` and ONNX."""

from ita_segmentation.export.network import export_network, to_onnx
from ita_segmentation.export.onnx_predictor import OnnxPredictor, write_vocabulary

__all__ = ["OnnxPredictor", "export_network", "to_onnx", "write_vocabulary"]
