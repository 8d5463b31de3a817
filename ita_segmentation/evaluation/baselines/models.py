"""Other transformers models as predictors, with their own post-processing."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import MaskFormerImageProcessor
from transformers.image_transforms import get_size_with_aspect_ratio

from ita_segmentation.evaluation.baselines.labels import LabelMatch
from ita_segmentation.evaluation.baselines.postprocessing import (
    BaselinePredictor,
    Network,
    best_labels,
    fuse_stuff,
    logits_of_labels,
    replace_fields,
    to_device,
)
from ita_segmentation.evaluation.predictors import EVALUATION_TASKS, ImagePrediction, Instances

MASK2FORMER_SIDE = 384
"""transformers' post-processing resizes Mask2Former's masks to this height and width first."""

MAX_INSTANCES = 100  # of an image, as COCO's mask AP counts them


class SemanticPredictor(BaselinePredictor):
    """A model with one logit for each label and pixel (SegFormer, UperNet, DPT, BEiT, ...).

    Labels without a class are left out: the best of the others is a pixel's label.
    """

    def __init__(self, network: Network, image_processor: Any, match: LabelMatch) -> None:
        self.network, self.image_processor, self.match = network, image_processor, match
        self.notes = match.notes

    def _predict(self, image: Image.Image, size: tuple[int, int], tasks: frozenset[str]) -> ImagePrediction:
        return ImagePrediction(semantic=self._semantic(self.network(image), image, size))

    def _semantic(self, outputs: SimpleNamespace, image: Image.Image, size: tuple[int, int]) -> np.ndarray:
        """Return (H, W) int32 class indices."""

        def scores_of(labels: Sequence[int]) -> Tensor:
            return self._scores(outputs, labels, image, size)

        device, pixels = self.network.model.device, self._intermediate_pixels(outputs)
        positions, _ = best_labels(scores_of, self.match.labels, size, device, pixels)
        return np.array(self.match.classes, dtype=np.int32)[positions.cpu().numpy()]

    def _intermediate_pixels(self, outputs: SimpleNamespace) -> int:
        """Return how many values per label the post-processing makes before it resizes them to the image."""
        return 0

    def _scores(
        self, outputs: SimpleNamespace, labels: Sequence[int], image: Image.Image, size: tuple[int, int]
    ) -> Tensor:
        """Return the scores of some labels in each pixel, (n, H, W)."""
        some = replace_fields(outputs, logits=outputs.logits[:, list(labels)])
        return self._label_scores(some, size)

    def _label_scores(self, outputs: SimpleNamespace, target: tuple[int, int], **settings: Any) -> Tensor:
        post_process = self.image_processor.post_process_semantic_segmentation
        found = post_process(outputs, target_sizes=[target], return_segmentation_scores=True, **settings)
        return found[0].segmentation_scores


class UniversalPredictor(SemanticPredictor):
    """A model of queries with a mask and a class each (Mask2Former, MaskFormer, DETR).

    A query's probability of labels without a class goes to "no object". Where `is_thing` (K,) is not known, only the
    semantic task is left.
    """

    class_field, mask_field = "class_queries_logits", "masks_queries_logits"
    panoptic_options: Mapping[str, Any] = {"label_ids_to_fuse": set()}

    def __init__(
        self, network: Network, image_processor: Any, match: LabelMatch, is_thing: Sequence[bool] | None
    ):
        super().__init__(network, image_processor, match)
        self.things = frozenset(i for i, thing in enumerate(is_thing or ()) if thing)
        self.stuff = frozenset(i for i, thing in enumerate(is_thing or ()) if not thing)
        self.tasks = self._abilities() if is_thing is not None else frozenset({"semantic"})

    def _abilities(self) -> frozenset[str]:
        return frozenset(EVALUATION_TASKS)

    @property
    def instance_processor(self) -> Any:
        """The image processor that finds instances."""
        return self.image_processor

    def _predict(self, image: Image.Image, size: tuple[int, int], tasks: frozenset[str]) -> ImagePrediction:
        outputs = self._outputs(image, tasks)
        panoptic, segments = None, list[dict[str, Any]]()
        if "panoptic" in tasks:
            panoptic, segments = self._panoptic(self._with_labels(outputs["panoptic"]), size)
        return ImagePrediction(
            semantic=self._semantic(outputs["semantic"], image, size) if "semantic" in tasks else None,
            panoptic=panoptic,
            segments=segments,
            instances=self._instances(outputs["instance"], size) if "instance" in tasks else None,
        )

    def _outputs(self, image: Image.Image, tasks: frozenset[str]) -> dict[str, SimpleNamespace]:
        """Return the network's outputs for each task."""
        return dict.fromkeys(tasks, self.network(image))

    def _with_labels(self, outputs: SimpleNamespace, labels: Sequence[int] | None = None) -> SimpleNamespace:
        """Keep the outputs of some labels (by default those with a class)."""
        logits = getattr(outputs, self.class_field)
        chosen = logits_of_labels(logits, self.match.labels if labels is None else labels)
        return replace_fields(outputs, **{self.class_field: chosen})

    def _intermediate_pixels(self, outputs: SimpleNamespace) -> int:
        return max(MASK2FORMER_SIDE**2, getattr(outputs, self.mask_field)[0, 0].numel())

    def _scores(
        self, outputs: SimpleNamespace, labels: Sequence[int], image: Image.Image, size: tuple[int, int]
    ) -> Tensor:
        return self._label_scores(self._with_labels(outputs, labels), size)

    def _panoptic(
        self, outputs: SimpleNamespace, size: tuple[int, int]
    ) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Post-process with the default thresholds, stuff fused: (H, W) int32 ids and their segments."""
        post_process = self.image_processor.post_process_panoptic_segmentation
        found = post_process(outputs, target_sizes=[size], **self.panoptic_options)[0]
        return fuse_stuff(found["segmentation"], found["segments_info"], self.match.classes, self.stuff)

    def _instances(self, outputs: SimpleNamespace, size: tuple[int, int]) -> Instances:
        """Return the best things, which may overlap, without a threshold: average precision ranks them all."""
        on_cpu = SimpleNamespace(**{name: to_device(value, "cpu") for name, value in vars(outputs).items()})
        masks, infos = self._instance_masks(self._with_labels(on_cpu), size)
        classes = [self.match.classes[info["label_id"]] for info in infos]
        scores = np.array([info["score"] for info in infos], dtype=np.float64)
        order = [index for index in np.argsort(-scores, kind="stable") if classes[index] in self.things]
        kept = order[:MAX_INSTANCES]
        empty = np.zeros((0, *size), dtype=bool)
        return Instances(
            scores=scores[kept],
            labels=np.array([classes[index] for index in kept], dtype=np.int64),
            masks=np.stack([np.asarray(masks[index]) > 0 for index in kept]) if kept else empty,
        )

    def _instance_masks(
        self, outputs: SimpleNamespace, size: tuple[int, int]
    ) -> tuple[Any, list[dict[str, Any]]]:
        """Return masks (n, H, W), above 0 inside, and the "label_id" (index in `match.labels`) and "score" of each."""
        post_process = self.instance_processor.post_process_instance_segmentation
        found = post_process(outputs, threshold=0.0, target_sizes=[size], return_binary_maps=True)[0]
        return found["segmentation"], found["segments_info"]


class DetrPredictor(UniversalPredictor):
    """DETR's panoptic head: its post-processing has no overlapping instances, so those are not scored."""

    class_field, mask_field = "logits", "pred_masks"

    def _abilities(self) -> frozenset[str]:
        return frozenset({"semantic", "panoptic"})


class OneFormerPredictor(UniversalPredictor):
    """OneFormer, which is given the task: one pass through the network for each.

    Its own instance post-processing draws all instances into one map, where they cannot overlap, and compares logits
    with thresholds for probabilities; average precision needs them ranked and complete, so MaskFormer's is used.
    """

    def _outputs(self, image: Image.Image, tasks: frozenset[str]) -> dict[str, SimpleNamespace]:
        return {task: self.network(image, task_inputs=[task]) for task in sorted(tasks)}

    @property
    def instance_processor(self) -> Any:
        """MaskFormer's."""
        return MaskFormerImageProcessor()


class EomtPredictor(UniversalPredictor):
    """EoMT. Its processor decides what it can do: windows of the image (semantic), or a padded image.

    The semantic post-processing does not remove the padding of a padded image, while the two others do; here it is
    removed before. Instances are processed query by query, as they would otherwise be drawn over one another.
    """

    panoptic_options: Mapping[str, Any] = {}

    def _abilities(self) -> frozenset[str]:
        return frozenset({"semantic"}) if self.image_processor.do_split_image else frozenset(EVALUATION_TASKS)

    def _intermediate_pixels(self, outputs: SimpleNamespace) -> int:
        height, width = self._network_size()
        return len(outputs.masks_queries_logits) * height * width

    def _network_size(self) -> tuple[int, int]:
        size = self.image_processor.size
        return size["shortest_edge"], size["longest_edge"] or size["shortest_edge"]

    def _scores(
        self, outputs: SimpleNamespace, labels: Sequence[int], image: Image.Image, size: tuple[int, int]
    ) -> Tensor:
        some = self._with_labels(outputs, labels)
        if not self.image_processor.do_pad or self.image_processor.do_split_image:
            return self._label_scores(some, size)
        edges = self.image_processor.size["shortest_edge"], self.image_processor.size["longest_edge"]
        height, width = get_size_with_aspect_ratio((image.height, image.width), *edges)
        masks = interpolate(some.masks_queries_logits, size=self._network_size(), mode="bilinear")
        without = replace_fields(some, masks_queries_logits=masks[..., :height, :width], patch_offsets=None)
        return self._label_scores(without, size, size={"shortest_edge": height, "longest_edge": width})

    def _instance_masks(
        self, outputs: SimpleNamespace, size: tuple[int, int]
    ) -> tuple[Any, list[dict[str, Any]]]:
        masks, infos = [], []
        post_process = self.image_processor.post_process_instance_segmentation
        for query in range(outputs.class_queries_logits.shape[1]):
            fields = {
                name: getattr(outputs, name)[:, query : query + 1]
                for name in (self.class_field, self.mask_field)
            }
            found = post_process(replace_fields(outputs, **fields), target_sizes=[size], threshold=0.0)[0]
            for info in found["segments_info"]:
                masks.append(found["segmentation"] == info["id"])
                infos.append(info)
        return masks, infos
