"""Fine-tuning on some classes without losing the others: the checkpoint as it was labels what the data leave out.

Labels of a few classes make every other object background, and a run on them alone unlearns it. Learning without
forgetting (Li and Hoiem, arXiv 1606.09282) keeps the answers of the network as it was before; here they become masks.
The words of the checkpoint are part of the training vocabulary, and in each augmented image the segments that the
checkpoint is sure of are targets beside the labelled ones, where these leave room for them.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modeling_ita import ITAForOpenVocabSegmentation
from modeling_ita.vocabulary import normalize_vocabulary

LEAST_SHARE = 0.5  # of a segment that labelled masks leave uncovered; below, the label has renamed it


def kept_classes(
    model: ITAForOpenVocabSegmentation, classes: Sequence[str | Sequence[str]]
) -> list[list[str]]:
    """The classes of a checkpoint's vocabulary that share no word with `classes`.

    Raises:
        ValueError: there are none.
    """
    taken = {word.casefold() for word in normalize_vocabulary(classes).names}
    own = model.default_vocabulary or ()
    kept = [list(names) for names in own if taken.isdisjoint(name.casefold() for name in names)]
    if not kept:
        raise ValueError("keep_vocabulary: the checkpoint has no classes but those of the data set")
    return kept


class KeptVocabulary:
    """A checkpoint as it was before training, and the classes of its own that are to be kept.

    Args:
        model: the checkpoint, on its device; a copy of it is made, which shares its CLIP where that is frozen.
        processor: its image processor.
        classes: the data set's. first_label: what the first class that is kept counts as; those of the data set that
            are learned come before.
        threshold: least score, 0..1, of a segment that becomes a target.
    """

    def __init__(
        self,
        model: ITAForOpenVocabSegmentation,
        processor: Any,
        classes: Sequence[str | Sequence[str]],
        first_label: int,
        threshold: float,
    ) -> None:
        self.classes = normalize_vocabulary(kept_classes(model, classes))
        backbone = model.clip_backbone
        shared = {} if backbone.is_trained else {id(backbone): backbone}
        self.model = copy.deepcopy(model, shared)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.model.eval()
        self.processor, self.first_label, self.threshold = processor, first_label, threshold

    @torch.no_grad()
    def complete(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A training batch with the checkpoint's own segments after the labelled masks.

        Args:
            batch: `pixel_values` (B, 3, H, W), perhaps `pixel_mask`; `mask_labels` (n, H, W) bool and `class_labels`
                (n,) of each image.
        """
        outputs = self.model(
            pixel_values=batch["pixel_values"], pixel_mask=batch.get("pixel_mask"), vocabulary=self.classes
        )
        found = self.processor.post_process_panoptic_segmentation(outputs, threshold=self.threshold)
        pairs = [
            self.add_segments(masks, labels, result["segmentation"], result["segments_info"])
            for masks, labels, result in zip(batch["mask_labels"], batch["class_labels"], found, strict=True)
        ]
        masks, labels = map(list, zip(*pairs, strict=True))
        return {**batch, "mask_labels": masks, "class_labels": labels}

    def add_segments(
        self, masks: Tensor, labels: Tensor, segmentation: Tensor, segments: list[dict[str, Any]]
    ) -> tuple[Tensor, Tensor]:
        """One image's labelled masks (n, H, W) and labels (n,), and after them the segments that they leave free.

        Args:
            segmentation: (h, w) ids of `segments`, h and w at most H and W.
            segments: {"id", "label_id"} of each.
        """
        free = ~masks.any(dim=0)
        height, width = segmentation.shape
        more, classes = [], []
        for segment in segments:
            own = segmentation.to(masks.device) == segment["id"]
            left = own & free[:height, :width]
            if left.sum() >= LEAST_SHARE * own.sum():
                more.append(left)
                classes.append(self.first_label + segment["label_id"])
        if not more:
            return masks, labels
        added = masks.new_zeros(len(more), *free.shape)
        added[:, :height, :width] = torch.stack(more)
        return torch.cat([masks, added]), torch.cat([labels, labels.new_tensor(classes)])
