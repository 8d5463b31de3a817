"""The set criterion as a training run needs it: one normaliser for a step of several batches, matches kept to look at.

A loss is a sum over masks (or queries) divided by how many there are. With gradient accumulation the count is that of
all batches of the optimiser's step, on all processes: k batches of b images give the loss and the gradients of one
batch of k b images, but for the random points at which masks are read.
"""

import torch
from torch import Tensor

from modeling_ita.set_criterion import Matches, SetCriterion, mean_over_processes


class StepCriterion(SetCriterion):
    """A `SetCriterion` that knows the whole step.

    Attributes:
        mask_counts: how many masks each image has, for each batch of the step; empty: only the batch at hand.
        matches: what the last call matched.
    """

    def __init__(self, config) -> None:
        super().__init__(config)
        self.mask_counts: list[list[int]] = []
        self.matches: Matches | None = None

    def match(self, *arguments, **keywords) -> Matches:
        self.matches = super().match(*arguments, **keywords)
        return self.matches

    def normalisers(
        self, class_logits: Tensor, class_labels: list[Tensor], matches: Matches
    ) -> tuple[Tensor, Tensor]:
        """As of `SetCriterion`, as means over the step's batches: the trainer divides the loss by their number."""
        if len(self.mask_counts) < 2:
            return super().normalisers(class_logits, class_labels, matches)
        num_queries = class_logits.shape[1]
        counts = [count for batch in self.mask_counts for count in batch]
        num_matched = sum(min(num_queries, count) for count in counts)
        num_void = len(counts) * num_queries - num_matched
        totals = torch.tensor(
            [sum(counts), num_matched + self.no_object_weight * num_void],
            dtype=torch.float32,
            device=class_logits.device,
        )
        num_masks, class_mass = mean_over_processes(totals)
        num_batches = len(self.mask_counts)
        return num_masks.clamp(min=1.0) / num_batches, class_mass / num_batches
