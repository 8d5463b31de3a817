"""The network beyond eager PyTorch: `torch.export`, ONNX, quantised towers."""
