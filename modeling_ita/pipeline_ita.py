"""The image-segmentation pipelines with words of one's own: `candidate_labels=["cat", "sofa|couch"]`.

"image-segmentation" is transformers' `ImageSegmentationPipeline` beside that: without candidate labels the
checkpoint's own vocabulary is segmented. "zero-shot-image-segmentation" asks for them, at each call or once. A
checkpoint carries this file, so `pipeline("image-segmentation", model=path, trust_remote_code=True)` finds it.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import pad
from torch.utils.data import DataLoader
from transformers import ImageSegmentationPipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator

from .image_processing_ita import read_image


def parse_candidate_labels(candidate_labels: str | Iterable[str | Sequence[str]]) -> list[list[str]]:
    """Classes as a user types them -> a list of classes, each a list of synonyms ("|" or "," between them).

    candidate_labels: one string "cat, sofa|couch", or a list whose items are names, "sofa|couch" or lists of names.
    Raises ValueError where there is no class, an empty name, or something that is no name.
    """
    if isinstance(candidate_labels, str):
        candidate_labels = candidate_labels.split(",")
    elif not isinstance(candidate_labels, Iterable):
        raise ValueError(f"candidate_labels is a text or a list of names, got {candidate_labels!r}")
    classes = []
    for label in candidate_labels:
        names = label.split("|") if isinstance(label, str) else label
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"a candidate label is a name, 'name|synonym' or a list of names, got {label!r}")
        names = [part.strip() for name in names for part in name.split(",")]
        if not names or not all(names):
            raise ValueError(f"a candidate label has an empty name: {label!r}")
        classes.append(names)
    if not classes:
        raise ValueError("candidate_labels is empty: give at least one")
    return classes


def collate_images(items: Sequence[Any]) -> dict[str, Any]:
    """Inputs of single images -> those of a batch, padded at the bottom and on the right to a common size.

    items: each {"pixel_values" (1, 3, h, w), "pixel_mask" (1, h, w), "target_size" [(height, width)]}.
    """
    sides = [item["pixel_values"].shape[-2:] for item in items]
    height, width = (max(side[axis] for side in sides) for axis in (0, 1))
    return {
        **{
            key: torch.cat(
                [
                    pad(item[key], (0, width - side[1], 0, height - side[0]))
                    for item, side in zip(items, sides, strict=True)
                ]
            )
            for key in ("pixel_values", "pixel_mask")
        },
        "target_size": [item["target_size"] for item in items],
    }


class ITAImageSegmentationPipeline(ImageSegmentationPipeline):
    """Masks of the things and stuff that `candidate_labels` name, or of the checkpoint's own classes.

    `candidate_labels` (see `parse_candidate_labels`) can be given at construction, at the call, or both (the call
    wins); `subtask` ("panoptic" by default, "instance", "semantic"), `threshold`, `mask_threshold`,
    `overlap_mask_area_threshold` and `timeout` are those of `ImageSegmentationPipeline`, and so are the results:
    for each image a list of {"score", "label", "mask"}. A label is the first name of its class. An image is
    segmented as a person sees it: upright, transparency over white (see `image_processing_ita.read_image`).

    An image is a PIL image, a path, a URL, base64 text or a file's bytes. A list gives a list; a generator or a
    `KeyDataset` of a `datasets` column gives an iterator that works as it is read. `batch_size` images go through
    the network together, whatever their sizes.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # The loader replaces the names of Auto classes in the configuration by the classes, which cannot be saved.
        for task in getattr(self.model.config, "custom_pipelines", {}).values():
            task["pt"] = [getattr(one, "__name__", one) for one in task.get("pt", ())]

    def check_model_type(self, supported_models: list[str] | dict) -> None:
        """Every model that a checkpoint brings with this pipeline is supported."""

    def _sanitize_parameters(  # type: ignore[override]
        self, candidate_labels: str | Iterable[str | Sequence[str]] | None = None, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if candidate_labels is not None:
            vocabulary = parse_candidate_labels(candidate_labels)
            forward["vocabulary"] = vocabulary
            postprocess["labels"] = [names[0] for names in vocabulary]
        return preprocess, forward, postprocess

    def get_iterator(  # type: ignore[override]
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Any:
        """As the base class's, with batches of images of any sizes."""
        if batch_size == 1:
            return super().get_iterator(
                inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params
            )
        sized = hasattr(inputs, "__len__")
        kind = PipelineDataset if sized else PipelineIterator
        loader = DataLoader(
            kind(inputs, self.preprocess, preprocess_params),
            num_workers=num_workers if sized else min(num_workers, 1),
            batch_size=batch_size,
            collate_fn=collate_images,
        )
        outputs = PipelineIterator(loader, self.forward, forward_params, loader_batch_size=batch_size)
        return PipelineIterator(outputs, self.postprocess, postprocess_params)

    def preprocess(  # type: ignore[override]
        self, image: Any, subtask: str | None = None, timeout: float | None = None
    ) -> Any:
        """An image -> the model's inputs and `target_size`. Errors are those of `read_image`."""
        processor: Any = self.image_processor
        pil_image = read_image(image, timeout)
        inputs = processor(images=[pil_image], return_tensors="pt").to(self.dtype)
        inputs["target_size"] = [(pil_image.height, pil_image.width)]
        return inputs

    def _forward(self, model_inputs: Any, vocabulary: list[list[str]] | None = None) -> Any:  # type: ignore[override]
        if vocabulary is not None:
            model_inputs["vocabulary"] = vocabulary
        return super()._forward(model_inputs)

    def postprocess(  # type: ignore[override]
        self,
        model_outputs: Any,
        labels: Sequence[str] | None = None,
        subtask: str | None = None,
        threshold: float = 0.9,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.5,
    ) -> list[dict[str, Any]]:
        """One image's outputs -> a list of {"score" (None for "semantic"), "label", "mask" (an "L" image of 0 and
        255)}. Raises ValueError for an unknown subtask.
        """
        processor: Any = self.image_processor
        names: Any = self.model.config.id2label if labels is None else labels
        sizes = model_outputs["target_size"]
        if subtask == "semantic":
            [classes] = processor.post_process_semantic_segmentation(model_outputs, target_sizes=sizes)
            # Counted: sorting all pixels, as `unique` does, would take several times their size.
            present = classes.flatten().bincount().nonzero().flatten().tolist()
            found = [(None, label, classes == label) for label in present]
        elif subtask == "instance":
            [result] = processor.post_process_instance_segmentation(
                model_outputs,
                threshold=threshold,
                mask_threshold=mask_threshold,
                target_sizes=sizes,
                return_binary_maps=True,
            )
            masks = result["segmentation"]
            found = [
                (segment["score"], segment["label_id"], mask)
                for segment, mask in zip(result["segments_info"], masks, strict=True)
            ]
        elif subtask in ("panoptic", None):
            [result] = processor.post_process_panoptic_segmentation(
                model_outputs,
                threshold=threshold,
                mask_threshold=mask_threshold,
                overlap_mask_area_threshold=overlap_mask_area_threshold,
                target_sizes=sizes,
            )
            found = [
                (segment["score"], segment["label_id"], result["segmentation"] == segment["id"])
                for segment in result["segments_info"]
            ]
        else:
            raise ValueError(f"subtask is 'panoptic', 'instance' or 'semantic', got {subtask!r}")
        return [
            {
                "score": score,
                "label": names[label],
                "mask": Image.fromarray(mask.numpy().astype(np.uint8) * 255),
            }
            for score, label, mask in found
        ]


class ITAZeroShotImageSegmentationPipeline(ITAImageSegmentationPipeline):
    """The same, for `candidate_labels` only: a call without them, at it or at construction, raises ValueError."""

    def _forward(self, model_inputs: Any, vocabulary: list[list[str]] | None = None) -> Any:  # type: ignore[override]
        if vocabulary is None:
            raise ValueError(
                'zero-shot-image-segmentation needs candidate_labels, such as candidate_labels=["cat", "sofa|couch"]'
            )
        return super()._forward(model_inputs, vocabulary)
