"""Fine-tuning on some classes without forgetting the others: self-distillation through pseudo-labels.

With labels of a few classes every other object is background, and a run on them alone unlearns it. Learning without
forgetting (Li and Hoiem, arXiv 1606.09282) keeps the original network's predictions as targets; here they are masks.
The checkpoint's classes stay in the training vocabulary, and in each augmented image the segments that the original
checkpoint predicts with a high score become targets beside the labeled ones, where those leave pixels free.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ita_segmentation.errors import UsageError
from modeling_ita import ITAForOpenVocabSegmentation
from modeling_ita.text import normalize_vocabulary

MIN_FREE_SHARE = 0.5
"""Share of a segment outside of labeled masks below which it is dropped: the label has renamed it."""


def kept_classes(
    model: ITAForOpenVocabSegmentation, classes: Sequence[str | Sequence[str]]
) -> list[list[str]]:
    """List the classes of a checkpoint's vocabulary that share no name with `classes`; UsageError if there are none."""
    own = model.default_vocabulary
    taken = [] if own is None else own.shares_name_with(normalize_vocabulary(classes).names)
    kept = [list(names) for names, is_taken in zip(own or [], taken, strict=True) if not is_taken]
    if not kept:
        raise UsageError("keep_vocabulary: the checkpoint has no classes but those of the dataset")
    return kept


class PseudoLabeler:
    """A checkpoint as it was before training, which labels its own classes in training batches.

    Args:
        model: The checkpoint, on its device; it is copied, and shares its CLIP where that is frozen.
        processor: Its image processor.
        classes: The dataset's classes. All others of the checkpoint are kept, and are the attribute `classes`.
        first_label: Training label of the first kept class, after the dataset's trained classes.
        threshold: Least score, 0..1, of a segment that becomes a target.
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
    def add_pseudo_labels(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Append the checkpoint's segments to the labeled masks of a training batch (a `TrainingCollator`'s)."""
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
        """Append the segments of one image that its labeled masks leave free.

        Masks are (n, H, W) bool with labels (n,) int64; the segmentation (h, w) may be smaller than they are. Returns
        more masks (n + m, H, W) and labels (n + m,), the labeled ones first.
        """
        free = ~masks.any(dim=0)
        height, width = segmentation.shape
        more, classes = [], []
        for segment in segments:
            own = segmentation.to(masks.device) == segment["id"]
            left = own & free[:height, :width]
            if left.sum() >= MIN_FREE_SHARE * own.sum():
                more.append(left)
                classes.append(self.first_label + segment["label_id"])
        if not more:
            return masks, labels
        added = masks.new_zeros(len(more), *free.shape)
        added[:, :height, :width] = torch.stack(more)
        return torch.cat([masks, added]), torch.cat([labels, labels.new_tensor(classes)])
