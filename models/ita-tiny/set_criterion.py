"""Set criterion: bipartite matching of queries to ground-truth masks, and the losses of the matched set.

Every prediction of the decoder (one before its first layer and one after each layer) is matched to the
ground truth anew and pays three losses: weighted cross-entropy over classes with void, and point-sampled
binary cross-entropy and dice over masks. Sources: DETR (arXiv 2005.12872, set prediction), PointRend
(arXiv 1912.08193, uncertain points), Mask2Former (arXiv 2112.01527, section 3.3, both together).

Shapes: L predictions, B images, Q queries, K classes, n_i masks of image i, N masks of the batch, P points.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_FINITE_COST = 1e6  # what a cost that is not a number, or not finite, becomes


def draw_points(num_masks: int, count: int, device: torch.device | str) -> Tensor:
    """Random points, uniform over the picture: float32 (num_masks, count, 2), (x, y) in 0..1."""
    return torch.rand(num_masks, count, 2, device=device)


def sample_at_points(maps: Tensor, points: Tensor) -> Tensor:
    """Read maps bilinearly at points: (M, C, h, w) float and (M, P, 2) (x, y) in 0..1 -> (M, C, P)."""
    grid = (2.0 * points - 1.0).unsqueeze(1)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False).squeeze(2)


def linear_assignment(cost: Tensor) -> tuple[list[int], list[int]]:
    """Cheapest one-to-one assignment of rows to columns of a host cost matrix (Q, n), by column order.

    Returns row and column indices, each of length min(Q, n).

    Raises:
        ImportError: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("training losses match queries to masks with scipy: pip install scipy") from error
    rows, columns = linear_sum_assignment(cost.numpy())
    pairs = sorted(zip(columns.tolist(), rows.tolist(), strict=True))
    return [row for _, row in pairs], [column for column, _ in pairs]


class SetCriterion:
    """Losses of all predictions against the ground truth of a batch.

    Args:
        config: has class_weight, mask_weight, dice_weight, no_object_weight, train_num_points (points per
            mask), oversample_ratio (candidates per uncertain point) and importance_sample_ratio (the share
            of points chosen by uncertainty; the rest are random).
    """

    def __init__(self, config) -> None:
        self.class_weight = float(config.class_weight)
        self.mask_weight = float(config.mask_weight)
        self.dice_weight = float(config.dice_weight)
        self.no_object_weight = float(config.no_object_weight)
        self.num_points = int(config.train_num_points)
        self.num_candidates = int(self.num_points * config.oversample_ratio)
        self.num_uncertain = int(self.num_points * config.importance_sample_ratio)

    def __call__(
        self,
        class_logits: list[Tensor],
        mask_logits: list[Tensor],
        mask_labels: list[Tensor],
        class_labels: list[Tensor],
    ) -> dict[str, Tensor]:
        """Weighted losses by name; their sum is the training loss.

        Args:
            class_logits: one (B, Q, K + 1) per prediction, void last, first prediction first.
            mask_logits: one (B, Q, h, w) per prediction.
            mask_labels: one (n_i, H, W) per image, bool or float in 0..1, covering the padded input.
            class_labels: one int64 (n_i,) per image, values 0..K - 1; n_i may be 0.

        Returns:
            `loss_ce`, `loss_mask`, `loss_dice` of the last prediction, and the same with suffix `_0`, `_1`,
            ... of the earlier ones in order: float32 scalars, already times their weights.

        Raises:
            ValueError: lists of different lengths.
            ImportError: scipy is not installed.
        """
        if len(class_logits) != len(mask_logits) or not class_logits:
            raise ValueError(
                f"{len(class_logits)} class predictions do not pair with {len(mask_logits)} mask predictions"
            )
        batch_size, device = class_logits[-1].shape[0], class_logits[-1].device
        if len(mask_labels) != batch_size or len(class_labels) != batch_size:
            raise ValueError(
                f"{batch_size} images need as many mask_labels and class_labels, "
                f"not {len(mask_labels)} and {len(class_labels)}"
            )
        for masks, classes in zip(mask_labels, class_labels, strict=True):
            if masks.ndim != 3 or len(masks) != len(classes):
                raise ValueError(
                    f"mask_labels of shape {tuple(masks.shape)} need (n, H, W) and one class label per mask, "
                    f"not {len(classes)}"
                )
        with torch.autocast(device_type=device.type, enabled=False):
            class_logits = [logits.float() for logits in class_logits]
            mask_logits = [logits.float() for logits in mask_logits]
            mask_labels = [masks.to(device=device, dtype=torch.float32) for masks in mask_labels]
            class_labels = [labels.to(device=device, dtype=torch.int64) for labels in class_labels]
            num_masks = self.mean_num_masks(mask_labels)
            matches = self.match(class_logits, mask_logits, mask_labels, class_labels)
            losses: dict[str, Tensor] = {}
            last = len(class_logits) - 1
            for index in [last, *range(last)]:
                suffix = "" if index == last else f"_{index}"
                match = matches[index]
                loss_ce = self.class_loss(class_logits[index], class_labels, match)
                loss_mask, loss_dice = self.mask_losses(mask_logits[index], mask_labels, match, num_masks)
                losses[f"loss_ce{suffix}"] = self.class_weight * loss_ce
                losses[f"loss_mask{suffix}"] = self.mask_weight * loss_mask
                losses[f"loss_dice{suffix}"] = self.dice_weight * loss_dice
        return losses

    @staticmethod
    def mean_num_masks(mask_labels: list[Tensor]) -> Tensor:
        """Ground-truth masks of the batch, averaged over processes, at least 1: float32 scalar."""
        count = torch.tensor(float(sum(len(masks) for masks in mask_labels)), device=mask_labels[0].device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(count)
            count = count / torch.distributed.get_world_size()
        return count.clamp(min=1.0)

    @torch.no_grad()
    def match(
        self,
        class_logits: list[Tensor],
        mask_logits: list[Tensor],
        mask_labels: list[Tensor],
        class_labels: list[Tensor],
    ) -> list[list[tuple[Tensor, Tensor]]]:
        """Hungarian matching of every prediction and image.

        Arguments as of `__call__`, in float32. An image's points are the same for its predictions and its
        targets, in all layers. Costs are computed on the device and cross to the host together, once.

        Returns:
            [prediction][image] -> (query indices, target indices), int64 (min(Q, n_i),), in target order.
        """
        device, counts = class_logits[-1].device, [len(masks) for masks in mask_labels]
        points = draw_points(len(counts), self.num_points, device)
        targets = [
            sample_at_points(masks[None], points[i : i + 1])[0]
            if counts[i]
            else masks.new_zeros(0, self.num_points)
            for i, masks in enumerate(mask_labels)
        ]
        # (B, n, P) and (B, n) for n = the most masks of an image; columns past an image's own are cut off.
        target_points = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True)
        target_classes = torch.nn.utils.rnn.pad_sequence(class_labels, batch_first=True)
        costs = torch.stack(
            [
                self.pair_costs(classes, sample_at_points(masks, points), target_classes, target_points)
                for classes, masks in zip(class_logits, mask_logits, strict=True)
            ]
        ).cpu()
        pairs = [
            linear_assignment(costs[i, b, :, :n]) for i in range(len(costs)) for b, n in enumerate(counts)
        ]
        lengths = [len(side) for pair in pairs for side in pair]
        indices = torch.tensor(
            [index for pair in pairs for side in pair for index in side], dtype=torch.int64
        )
        sides = iter(indices.to(device).split(lengths))
        return [[(next(sides), next(sides)) for _ in counts] for _ in costs]

    def pair_costs(
        self, class_logits: Tensor, mask_points: Tensor, target_classes: Tensor, target_points: Tensor
    ) -> Tensor:
        """Finite cost of each query and target: (B, Q, K + 1), (B, Q, P), (B, n), (B, n, P) -> (B, Q, n)."""
        index = target_classes[:, None].expand(-1, class_logits.shape[1], -1)
        cost_class = -class_logits.softmax(-1).gather(2, index)

        target_columns = target_points.transpose(1, 2)
        # Binary cross-entropy t * softplus(-x) + (1 - t) * softplus(x) is softplus(x) - t * x.
        cost_mask = F.softplus(mask_points).sum(-1, keepdim=True) - mask_points @ target_columns
        cost_mask = cost_mask / mask_points.shape[-1]

        probabilities = mask_points.sigmoid()
        areas = probabilities.sum(-1)[:, :, None] + target_points.sum(-1)[:, None]
        cost_dice = 1.0 - (2.0 * probabilities @ target_columns + 1.0) / (areas + 1.0)

        cost = self.class_weight * cost_class + self.mask_weight * cost_mask + self.dice_weight * cost_dice
        return cost.nan_to_num(nan=_FINITE_COST, posinf=_FINITE_COST, neginf=-_FINITE_COST)

    def class_loss(
        self, class_logits: Tensor, class_labels: list[Tensor], match: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Cross-entropy over classes and void, void weighing no_object_weight: mean by weight, a scalar."""
        void = class_logits.shape[-1] - 1
        labels = torch.full(class_logits.shape[:2], void, dtype=torch.int64, device=class_logits.device)
        for row, classes, (queries, targets) in zip(labels, class_labels, match, strict=True):
            row[queries] = classes[targets]
        weights = class_logits.new_ones(void + 1)
        weights[void] = self.no_object_weight
        return F.cross_entropy(class_logits.transpose(1, 2), labels, weights)

    def mask_losses(
        self,
        mask_logits: Tensor,
        mask_labels: list[Tensor],
        match: list[tuple[Tensor, Tensor]],
        num_masks: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Binary cross-entropy and dice loss of the matched masks of (B, Q, h, w) at points: two scalars."""
        matched = torch.cat([masks[queries] for masks, (queries, _) in zip(mask_logits, match, strict=True)])
        if len(matched) == 0:  # nothing to learn; the zeros still belong to the graph
            return matched.sum(), matched.sum()
        matched = matched[:, None]
        points = self.uncertain_points(matched.detach())
        logits = sample_at_points(matched, points).squeeze(1)
        with torch.no_grad():
            sizes = [len(queries) for queries, _ in match]
            labels = torch.cat(
                [
                    sample_at_points((masks if len(masks) == size else masks[targets])[:, None], own_points)
                    for masks, (_, targets), size, own_points in zip(
                        mask_labels, match, sizes, points.split(sizes), strict=True
                    )
                    if size
                ]
            ).squeeze(1)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
        probabilities = logits.sigmoid()
        overlap, area = (probabilities * labels).sum(1), probabilities.sum(1) + labels.sum(1)
        dice = 1.0 - (2.0 * overlap + 1.0) / (area + 1.0)
        return cross_entropy.sum() / num_masks, dice.sum() / num_masks

    @torch.no_grad()
    def uncertain_points(self, mask_logits: Tensor) -> Tensor:
        """Points where the masks are least sure, and random ones: (N, 1, h, w) -> (N, P, 2) in 0..1.

        Uncertainty is -|logit|. The uncertain ones are the top of oversampled random candidates.
        """
        num_masks, device = len(mask_logits), mask_logits.device
        candidates = draw_points(num_masks, self.num_candidates, device)
        uncertainty = -sample_at_points(mask_logits, candidates).squeeze(1).abs()
        chosen = uncertainty.topk(self.num_uncertain, dim=1, sorted=False).indices
        uncertain = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
        rest = draw_points(num_masks, self.num_points - self.num_uncertain, device)
        return torch.cat([uncertain, rest], dim=1)
