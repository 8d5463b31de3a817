"""The image-segmentation pipeline with words of one's own: `candidate_labels=["cat", "sofa|couch"]`.

It is transformers' `ImageSegmentationPipeline` beside that: without candidate labels the checkpoint's own
vocabulary is segmented. A checkpoint carries this file, so `pipeline("image-segmentation", model=path,
trust_remote_code=True)` finds it.
"""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import ImageSegmentationPipeline
from transformers.image_utils import load_image


def parse_candidate_labels(candidate_labels: str | Iterable[str | Sequence[str]]) -> list[list[str]]:
    """Classes as a user types them -> a list of classes, each a list of synonyms ("|" or "," between them).

    candidate_labels: one string "cat, sofa|couch", or a list whose items are names, "sofa|couch" or lists of names.
    Raises ValueError where there is no class, an empty name, or something that is no name.
    """
    if isinstance(candidate_labels, str):
        candidate_labels = candidate_labels.split(",")
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


class ITAImageSegmentationPipeline(ImageSegmentationPipeline):
    """Masks of the things and stuff that `candidate_labels` name, or of the checkpoint's own classes.

    `candidate_labels` (see `parse_candidate_labels`) can be given at construction, at the call, or both (the call
    wins); `subtask` ("panoptic" by default, "instance", "semantic"), `threshold`, `mask_threshold`,
    `overlap_mask_area_threshold` and `timeout` are those of `ImageSegmentationPipeline`, and so are the results:
    for each image a list of {"score", "label", "mask"}. A label is the first name of its class. A picture is
    segmented as a person sees it: upright, transparency over white.
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

    def preprocess(  # type: ignore[override]
        self, image: Any, subtask: str | None = None, timeout: float | None = None
    ) -> Any:
        """A PIL image, a path, a URL or a base64 string -> the model's inputs and `target_size`."""
        if not isinstance(image, Image.Image) and not (isinstance(image, str) and os.path.isfile(image)):
            image = load_image(image, timeout=timeout)
        processor: Any = self.image_processor
        picture = processor.fetch_images(image)
        inputs = processor(images=[picture], return_tensors="pt").to(self.dtype)
        inputs["target_size"] = [(picture.height, picture.width)]
        return inputs

    def _forward(self, model_inputs: Any, vocabulary: list[list[str]] | None = None) -> Any:  # type: ignore[override]
        if vocabulary is not None:
            model_inputs["vocabulary"] = [vocabulary] * len(model_inputs["pixel_values"])
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
        255)}. Raises ValueError for an unknown subtask."""
        processor: Any = self.image_processor
        names: Any = self.model.config.id2label if labels is None else labels
        sizes = model_outputs["target_size"]
        if subtask == "semantic":
            [classes] = processor.post_process_semantic_segmentation(model_outputs, target_sizes=sizes)
            found = [(None, label, classes == label) for label in classes.unique().tolist()]
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
