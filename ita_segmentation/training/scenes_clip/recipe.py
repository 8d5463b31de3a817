"""The settings of a training run of the small CLIP of Scenes."""

from dataclasses import dataclass, field
from typing import Any

from ita_segmentation.errors import UsageError


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


def _setting(default: Any, text: str) -> Any:
    if callable(default):
        return field(default_factory=default, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class ScenesClipRecipe:
    """The settings of a run; `minutes` or `max_steps`, whichever ends first, drives the schedule. Raises UsageError."""

    clip: dict[str, Any] = _setting(_default_clip, "open_clip's configuration, as JSON")
    seed: int = _setting(0, "random seed")
    minutes: float = _setting(35.0, "minutes of the vision stages; the text stage comes before")
    max_steps: int = _setting(1_000_000, "most steps of the vision stages")
    text_steps: int = _setting(450, "steps of the text stage")
    text_batch_size: int = _setting(192, "captions in a batch of the text stage")
    text_learning_rate: float = _setting(2e-3, "peak learning rate of the text stage")
    learning_rate: float = _setting(2e-3, "peak learning rate of the vision stages")
    weight_decay: float = _setting(0.05, "weight decay of the vision stages")
    warmup: float = _setting(0.05, "share of the schedule in which the learning rate rises")
    single_share: float = _setting(
        0.35, "share of the schedule that trains on single things and textures alone"
    )
    fixed_statistics_from: float = _setting(
        0.85, "share of the schedule after which BatchNorm's statistics are measured once and kept"
    )
    pixels_per_batch: int = _setting(96 * 64 * 64, "pixels in a batch, whatever the size of its images")
    single_sizes: tuple[int, ...] = _setting((64,), "sides of single images")
    captioned_sizes: tuple[int, ...] = _setting((64, 96, 128, 160), "sides of captioned images")
    region_sizes: tuple[int, ...] = _setting((128, 160, 192, 256), "sides of images with regions")
    caption_weight: float = _setting(0.5, "weight of the contrastive loss")
    dense_weight: float = _setting(0.5, "weight of the loss on cells of the dense feature")
    calibration_batches: int = _setting(60, "batches that BatchNorm's statistics are measured on")
    evaluation_size: int = _setting(192, "side of the images that regions are scored on")
    evaluation_images: int = _setting(400, "images that are scored")
    num_threads: int = _setting(2, "threads")

    def __post_init__(self) -> None:
        if not (self.minutes > 0 and self.max_steps >= 1):
            raise UsageError("minutes and max_steps must be positive")
        if not (0 <= self.single_share <= 1 and 0 <= self.warmup < 1):
            raise UsageError("single_share and warmup are shares of the schedule, between 0 and 1")
        sizes = (*self.single_sizes, *self.captioned_sizes, *self.region_sizes, self.evaluation_size)
        if any(size < 32 or size % 32 for size in sizes):
            raise UsageError(f"image sizes must be multiples of 32, got {sizes}")
        missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in self.clip]
        if missing:
            raise UsageError(f"the clip configuration lacks {', '.join(missing)}")

    def batch_size(self, size: int) -> int:
        """Compute how many images of side `size` are in a batch: equally many pixels at every size."""
        return max(self.pixels_per_batch // (size * size), 2)
