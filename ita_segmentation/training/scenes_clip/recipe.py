"""What decides a training run of the small CLIP of Scenes."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


def _default_clip() -> dict[str, Any]:
    return {
        "embed_dim": 128,
        "vision_cfg": {
            "timm_model_name": "resnet10t",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 192,
        },
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3},
    }


@dataclass
class ScenesClipRecipe:
    """Everything that decides a training run; `minutes` or `max_steps`, whichever ends first, drive the schedule."""

    clip: dict[str, Any] = field(default_factory=_default_clip)
    """open_clip's model configuration: `embed_dim`, `vision_cfg` (a timm trunk), `text_cfg`."""
    seed: int = 0
    minutes: float = 35.0
    """Wall-clock minutes of the vision stages; the text stage comes on top."""
    max_steps: int = 1_000_000
    text_steps: int = 450
    text_batch_size: int = 192
    text_learning_rate: float = 2e-3
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    """Share of the schedule in which the learning rate rises."""
    single_share: float = 0.35
    """Share of the schedule that trains on single things and textures alone."""
    fixed_statistics_from: float = 0.85
    """From this share of the schedule on, BatchNorm's statistics are measured once and kept."""
    pixels_per_batch: int = 96 * 64 * 64
    single_sizes: tuple[int, ...] = (64,)
    captioned_sizes: tuple[int, ...] = (64, 96, 128, 160)
    region_sizes: tuple[int, ...] = (128, 160, 192, 256)
    caption_weight: float = 0.5
    dense_weight: float = 0.5
    calibration_batches: int = 60
    evaluation_size: int = 192
    evaluation_images: int = 400
    num_threads: int = 2

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ScenesClipRecipe:
        """A recipe from a YAML or JSON mapping.

        Raises:
            ValueError: an unknown key, or a value out of range.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        recipe = cls(**values)
        recipe.check()
        return recipe

    def check(self) -> None:
        """Raises ValueError with one clear line if a value cannot serve."""
        if self.minutes <= 0 or self.max_steps < 1:
            raise ValueError("minutes and max_steps must be positive")
        if not 0 <= self.single_share <= 1 or not 0 <= self.warmup < 1:
            raise ValueError("single_share and warmup are shares of the schedule, between 0 and 1")
        sizes = (*self.single_sizes, *self.captioned_sizes, *self.region_sizes, self.evaluation_size)
        if any(size < 32 or size % 32 for size in sizes):
            raise ValueError(f"image sizes must be multiples of 32, got {sizes}")
        missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in self.clip]
        if missing:
            raise ValueError(f"the clip configuration lacks {', '.join(missing)}")

    def batch_size(self, size: int) -> int:
        """Images of side `size` in a batch: as many pixels at every size."""
        return max(self.pixels_per_batch // (size * size), 2)
