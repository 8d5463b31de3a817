"""Batches of training and evaluation examples."""

from typing import Any

from torch.nn.functional import pad


class TrainingCollator:
    """Collate training examples into the model's arguments; the `ITAImageProcessor` normalizes and pads images.

    Returns `pixel_values`, `pixel_mask` (omitted where nothing is padded), `mask_labels` and `class_labels`, and for
    the trainer `image_names` and `skipped_images` (lists of str).
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate examples; masks are padded like their images, at the bottom and on the right."""
        images = [example["image"] for example in examples]
        batch = dict(self.processor(images=images, do_resize=False, return_tensors="pt"))
        height, width = batch["pixel_values"].shape[-2:]
        if bool(batch["pixel_mask"].all()):
            del batch["pixel_mask"]
        masks = [example["mask_labels"] for example in examples]
        batch["mask_labels"] = [pad(m, (0, width - m.shape[-1], 0, height - m.shape[-2])) for m in masks]
        batch["class_labels"] = [example["class_labels"] for example in examples]
        return batch | _names(examples)


class EvaluationCollator:
    """Collate evaluation examples into `{"inputs": model arguments, "labels": list of (H, W) arrays}` and names.

    Images are resized to the processor's size with `do_resize`, and keep their own otherwise.
    """

    def __init__(self, processor: Any, do_resize: bool) -> None:
        self.processor, self.do_resize = processor, do_resize

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate examples."""
        images = [example["image"] for example in examples]
        inputs = dict(self.processor(images=images, do_resize=self.do_resize, return_tensors="pt"))
        return {"inputs": inputs, "labels": [example["label"] for example in examples]} | _names(examples)


def _names(examples: list[dict[str, Any]]) -> dict[str, list[str]]:
    return {
        "image_names": [example.get("image_id", "") for example in examples],
        "skipped_images": [name for example in examples for name in example.get("skipped", [])],
    }
