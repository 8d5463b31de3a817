"""The small CLIP of Scenes, trained from scratch (`ita train-clip`)."""

from ita_segmentation.training.scenes_clip.recipe import ScenesClipRecipe
from ita_segmentation.training.scenes_clip.trainer import ScenesClipTrainer, load_clip

__all__ = ["ScenesClipRecipe", "ScenesClipTrainer", "load_clip"]
