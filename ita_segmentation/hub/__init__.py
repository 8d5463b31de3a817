"""The Hub and published checkpoints: scores in model cards, the registry, downloads."""

from ita_segmentation.hub.registry import PublishedCheckpoint, published_checkpoint, published_checkpoints

__all__ = ["PublishedCheckpoint", "published_checkpoint", "published_checkpoints"]
