"""Metrics as `torchmetrics` states and as modules of `evaluate`."""
