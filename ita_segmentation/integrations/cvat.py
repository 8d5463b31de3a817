"""Automatic annotation in CVAT: a checkpoint as an auto-annotation function (`pip install cvat-sdk`).

    cvat-cli task auto-annotate 137 --function-module ita_segmentation.integrations.cvat \
        -p model=str:models/ita-tiny -p classes=str:"cat, sofa|couch" --allow-unmatched-labels

The same parameters serve an agent: `cvat-cli function create-native` and `function run-agent`. A label of CVAT's is
matched with a class by its name.
"""

from __future__ import annotations

from typing import Any

from cvat_sdk import auto_annotation
from cvat_sdk.masks import encode_mask
from PIL import Image

from ita_segmentation.errors import ITAError
from ita_segmentation.integrations.polygons import mask_polygons
from ita_segmentation.prediction.segmenter import Segmenter


class CVATFunction:
    """An auto-annotation function, as CVAT's tools call it.

    Args:
        segmenter: what segments the images.
    """

    def __init__(self, segmenter: Segmenter):
        self.segmenter = segmenter
        self._default_threshold = segmenter.threshold

    @property
    def spec(self) -> auto_annotation.DetectionFunctionSpec:
        """The labels: a class's first name, and its index as id."""
        return auto_annotation.DetectionFunctionSpec(
            labels=[
                auto_annotation.label_spec(names[0], index)
                for index, names in enumerate(self.segmenter.classes)
            ]
        )

    def detect(self, context: auto_annotation.DetectionFunctionContext, image: Image.Image) -> list[Any]:
        """Segment one image.

        Args:
            context: `conf_threshold` is the minimum score, None for the task's own; `conv_mask_to_poly` asks for
                polygons in the place of masks.
            image: any mode.

        Returns:
            CVAT's shapes, largest segment first.

        Raises:
            ITAError: the image cannot be segmented.
        """
        threshold = context.conf_threshold
        self.segmenter.threshold = self._default_threshold if threshold is None else threshold
        [result] = self.segmenter.segment_images([image.convert("RGB")])
        if isinstance(result, ITAError):
            raise result
        shapes = []
        for segment in sorted(result.masks(), key=lambda one: -one.area):
            if threshold is not None and segment.score is not None and segment.score < threshold:
                continue
            if context.conv_mask_to_poly:
                shapes += [
                    auto_annotation.polygon(segment.label_id, ring.ravel().astype(float).tolist())
                    for ring in mask_polygons(segment.mask)
                ]
            else:
                shapes.append(auto_annotation.mask(segment.label_id, encode_mask(segment.mask)))
        return shapes


def create(
    model: str,
    classes: str | None = None,
    task: str = "instance",
    stuff: str | None = None,
    device: str | None = None,
) -> CVATFunction:
    """Load a checkpoint for CVAT's tools, which pass their `-p` parameters here.

    Args:
        model: checkpoint folder or Hub id.
        classes: such as "cat, sofa|couch"; None for the checkpoint's own.
        task: "semantic", "panoptic" or "instance".
        stuff: which of the classes are not countable, such as "sky, wall"; "" for none.
        device: such as "cpu" or "cuda:0".

    Raises:
        ITAError: the checkpoint or the classes cannot be used.
    """
    from ita_segmentation.checkpoints import load_checkpoint
    from modeling_ita.text import parse_classes

    network, processor = load_checkpoint(model, device)
    vocabulary = None if classes is None else parse_classes(classes)
    given = parse_classes(stuff) if stuff and stuff.strip() else []
    uncountable = None if stuff is None else [name for names in given for name in names]
    segmenter = Segmenter(network, processor, vocabulary, task=task, stuff=uncountable, keep_overlaps=True)
    return CVATFunction(segmenter)
