"""Set criterion: bipartite matching of queries to ground-truth masks, and the losses of the matched set.

Every prediction of the decoder (one before its first layer and one after each layer) is matched to the
ground truth anew and pays three losses: weighted cross-entropy over classes with void, and point-sampled
binary cross-entropy and dice over masks. Sources: DETR (arXiv 2005.12872, set prediction), PointRend
(arXiv 1912.08193, uncertain points), Mask2Former (arXiv 2112.01527, section 3.3, both together).

All costs of a step cross to the host together, once. Masks are only ever read at points. Everything is
computed in float32, whatever the precision of the predictions; only what is read is converted.

Shapes: L predictions, B images, Q queries, K classes, n_i masks of image i, m_i = min(Q, n_i) of them matched,
M = sum of m_i, P points.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .dominant_categories import ANY_CLASS

_OWN_CLASS_COST = -3.0  # a query that answers for a class is preferred for it, unless its mask is far worse
_OTHER_CLASS_COST = 1e5
_FINITE_COST = 1e6  # instead of a cost that is NaN or infinite: larger than any finite cost


@dataclass
class Matches:
    """Which query answers which ground-truth mask, in every prediction.

    Attributes:
        queries: (L, M) int64, the images' matched queries one after the other, as rows of (B * Q).
        targets: (L, M) int64, the masks that they are matched to, counted within their image, in rising order.
        sizes: m_i of each image.
        num_queries: Q.
    """

    queries: Tensor
    targets: Tensor
    sizes: list[int]
    num_queries: int

    def of(self, image: int) -> tuple[Tensor, Tensor]:
        """Queries and masks of one image: int64 (L, m_i) each, both counted within the image."""
        start = sum(self.sizes[:image])
        own = slice(start, start + self.sizes[image])
        return self.queries[:, own] - image * self.num_queries, self.targets[:, own]


MatchedMasks = Callable[[Matches], Tensor]
"""Computes the mask logits of matched queries: (L, M, h, w)."""


def draw_points(num_masks: int, count: int, device: torch.device | str) -> Tensor:
    """Draw points uniformly over the image: float32 (num_masks, count, 2), (x, y) in 0..1."""
    return torch.rand(num_masks, count, 2, device=device)


def sample_at_points(maps: Tensor, points: Tensor) -> Tensor:
    """Read maps bilinearly at points, zero outside.

    Args:
        maps: (N, h, w) of any type; read in float32.
        points: (N, P, 2), or (1, P, 2) for the same points in all maps; (x, y) in 0..1.

    Returns:
        (N, P) float32.
    """
    # Maps read at the same points share the arithmetic of a point, as channels: few, so that they stay in cache.
    channels = next(n for n in (5, 2, 1) if len(maps) % n == 0) if len(points) == 1 else 1
    groups = len(maps) // channels
    grid = (2.0 * points - 1.0).unsqueeze(1).expand(groups, -1, -1, -1)
    grouped = maps.float().unflatten(0, (groups, channels))
    values = F.grid_sample(grouped, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return values.flatten(0, 2)


def own_class_cost(query_classes: Tensor, target_classes: Tensor) -> Tensor:
    """Give what a pair of query (Q,) and target (n,) costs for not being of one class, (Q, n) float32.

    Targets go to queries of their own class, and to others only where free queries run out.
    """
    is_own = query_classes[:, None] == target_classes
    is_free = (query_classes == ANY_CLASS)[:, None].expand_as(is_own)
    cost = torch.where(is_own, _OWN_CLASS_COST, _OTHER_CLASS_COST)
    return cost.masked_fill(is_free, 0.0)


def sort_by_row(points: Tensor) -> Tensor:
    """Sort points (N, P, 2) by y: maps are then read along their memory, which is faster."""
    order = points[..., 1].argsort(dim=1)
    return points.gather(1, order[..., None].expand(-1, -1, 2))


def linear_assignment(cost: Tensor) -> tuple[list[int], list[int]]:
    """Find the cheapest one-to-one assignment of rows to columns of a host cost matrix (Q, n), in order of columns.

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


def mean_over_processes(totals: Tensor) -> Tensor:
    """Average sums over this process's batch over all processes, by one all-reduce."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(totals)
        totals = totals / torch.distributed.get_world_size()
    return totals


def check_lists(
    class_logits: list[Tensor],
    mask_logits: list[Tensor],
    mask_labels: list[Tensor],
    class_labels: list[Tensor],
) -> None:
    """Check that predictions pair with predictions, images with images and masks with classes."""
    if len(class_logits) != len(mask_logits) or not class_logits:
        raise ValueError(
            f"{len(class_logits)} class predictions do not pair with {len(mask_logits)} mask predictions"
        )
    batch_size = class_logits[-1].shape[0]
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


def assign(costs: list[Tensor], num_queries: int) -> Matches:
    """Match the queries of every prediction and image to masks at the lowest cost, (L, Q, n_i) of each image."""
    device, num_predictions = costs[0].device, len(costs[0])
    flat = torch.cat([cost.flatten() for cost in costs]).cpu()
    on_host = [
        part.view(cost.shape)
        for part, cost in zip(flat.split([c.numel() for c in costs]), costs, strict=True)
    ]
    sizes = [min(cost.shape[1:]) for cost in costs]
    queries, targets = [], []
    for prediction in range(num_predictions):
        for image, cost in enumerate(on_host):
            rows, columns = linear_assignment(cost[prediction])
            queries += [image * num_queries + row for row in rows]
            targets += columns
    both = torch.tensor([queries, targets], dtype=torch.int64).to(device)
    by_prediction = both.view(2, num_predictions, sum(sizes))
    return Matches(by_prediction[0], by_prediction[1], sizes, num_queries)


@torch.no_grad()
def labels_at_points(mask_labels: list[Tensor], matches: Matches, points: list[Tensor]) -> list[Tensor]:
    """Read the ground truth of every matched pair at points of its own: (M, P, 2) -> (M, P) float32, per prediction."""
    labels: list[list[Tensor]] = [[] for _ in points]
    for image, masks in enumerate(mask_labels):
        if not len(masks):
            continue
        maps = masks.float()  # once for all predictions, one image at a time
        for own_labels, targets, places in zip(labels, matches.of(image)[1], points, strict=True):
            # Where all masks are matched they are in order, and need not be copied.
            chosen = maps if len(maps) == len(targets) else maps[targets]
            own_labels.append(sample_at_points(chosen, places.split(matches.sizes)[image]))
    return [torch.cat(parts) for parts in labels]


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over masks the binary cross-entropy of logits (M, P) with labels in 0..1, its mean over points: a scalar."""
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1).sum()


def dice_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum the dice loss of logits (M, P) with labels in 0..1 over masks: a scalar."""
    probabilities = logits.sigmoid()
    overlap, area = (probabilities * labels).sum(1), probabilities.sum(1) + labels.sum(1)
    return (1.0 - (2.0 * overlap + 1.0) / (area + 1.0)).sum()


class SetCriterion:
    """Losses of all predictions against the ground truth of a batch.

    Args:
        config: has class_weight, mask_weight, dice_weight, no_object_weight, train_num_points (points per
            mask), oversample_ratio (candidates per uncertain point) and importance_sample_ratio (the share
            of points chosen by uncertainty; the rest are random).

    Attributes:
        matches: What the last call matched; None before the first one.
    """

    def __init__(self, config) -> None:
        self.class_weight = float(config.class_weight)
        self.mask_weight = float(config.mask_weight)
        self.dice_weight = float(config.dice_weight)
        self.no_object_weight = float(config.no_object_weight)
        self.num_points = int(config.train_num_points)
        self.num_candidates = int(self.num_points * config.oversample_ratio)
        self.num_uncertain = int(self.num_points * config.importance_sample_ratio)
        self.matches: Matches | None = None
        self._step_mask_counts: list[list[int]] = []

    def begin_step(self, mask_counts: list[list[int]]) -> None:
        """Normalize the next calls over all batches of an optimizer step, for gradient accumulation.

        A loss is a sum over masks (or queries) divided by their number. With the number in all batches of the
        step, k batches of b images give the loss and the gradients of one batch of k * b images, provided that
        the caller divides each batch's loss by k.

        Args:
            mask_counts: Number of masks of each image, one list per batch. With fewer than two batches every call
                is normalized by its own batch, as without this method.
        """
        self._step_mask_counts = mask_counts if len(mask_counts) > 1 else []

    def __call__(
        self,
        class_logits: list[Tensor],
        mask_logits: list[Tensor],
        mask_labels: list[Tensor],
        class_labels: list[Tensor],
        matched_masks: MatchedMasks | None = None,
        query_classes: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the weighted losses by name; their sum is the training loss.

        The sums that losses are divided by are averaged over processes: the mean over processes of losses and
        gradients is that of one process with all their images. A prediction that is NaN costs so much that it is
        matched last; where it is matched all the same, the loss is NaN, too.

        Args:
            class_logits: one (B, Q, K + 1) per prediction, void last, first prediction first.
            mask_logits: one (B, Q, h, w) per prediction.
            mask_labels: one (n_i, H, W) per image, bool, integer 0 and 1 or float in 0..1, covering the padded
                input; H and W may differ between images.
            class_labels: one int64 (n_i,) per image, values 0..K - 1; n_i may be 0.
            matched_masks: computes the mask logits of the matched queries again. Gradients then flow through these
                alone; otherwise backward makes a gradient as large as all mask logits for the sake of a few.
            query_classes: (B, Q) int64, the class that each query answers for, or `ANY_CLASS`, or `NO_OWN_CLASS`.

        Returns:
            `loss_ce`, `loss_mask`, `loss_dice` of the last prediction, and the same with suffix `_0`, `_1`,
            ... of the earlier ones in order: float32 scalars, already times their weights.

        Raises:
            ValueError: lists of different lengths, or masks that do not pair with classes.
            ImportError: scipy is not installed.
        """
        check_lists(class_logits, mask_logits, mask_labels, class_labels)
        device = class_logits[-1].device
        with torch.autocast(device_type=device.type, enabled=False):
            mask_labels = [masks.to(device) for masks in mask_labels]
            class_labels = [labels.to(device=device, dtype=torch.int64) for labels in class_labels]
            matches = self.matches = self.match(
                class_logits, mask_logits, mask_labels, class_labels, query_classes
            )
            num_masks, class_mass = self.normalizers(class_logits[-1], class_labels)
            weighted = {
                "ce": self.class_weight * self.class_losses(class_logits, class_labels, matches) / class_mass
            }
            if matched_masks is None:
                matched = [
                    maps.flatten(0, 1).index_select(0, queries)
                    for maps, queries in zip(mask_logits, matches.queries, strict=True)
                ]
            else:
                matched = list(matched_masks(matches).unbind())
            losses_mask, losses_dice = self.mask_losses(matched, mask_labels, matches)
            weighted["mask"] = self.mask_weight * losses_mask / num_masks
            weighted["dice"] = self.dice_weight * losses_dice / num_masks
        earlier = range(len(class_logits) - 1)
        return {
            f"loss_{part}{suffix}": losses[index]
            for index, suffix in [(-1, ""), *((i, f"_{i}") for i in earlier)]
            for part, losses in weighted.items()
        }

    def normalizers(self, class_logits: Tensor, class_labels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute what losses are divided by: the number of masks, at least 1, and the weight of queries in `loss_ce`.

        Both are averaged over processes, and over the batches of a step (see `begin_step`): float32 scalars.
        """
        batches = self._step_mask_counts or [list(map(len, class_labels))]
        counts = [count for batch in batches for count in batch]
        num_queries = class_logits.shape[1]
        num_matched = sum(min(num_queries, count) for count in counts)
        num_void = len(counts) * num_queries - num_matched
        totals = torch.tensor(
            [sum(counts), num_matched + self.no_object_weight * num_void],
            dtype=torch.float32,
            device=class_logits.device,
        )
        num_masks, class_mass = mean_over_processes(totals)
        class_mass = class_mass.clamp(min=torch.finfo(torch.float32).tiny)
        return num_masks.clamp(min=1.0) / len(batches), class_mass / len(batches)

    @torch.no_grad()
    def match(
        self,
        class_logits: list[Tensor],
        mask_logits: list[Tensor],
        mask_labels: list[Tensor],
        class_labels: list[Tensor],
        query_classes: Tensor | None = None,
    ) -> Matches:
        """Match every prediction and image by the Hungarian algorithm; arguments as of `__call__`, on one device.

        An image's points are the same for its predictions and its targets, in all predictions.
        """
        batch_size, num_queries = class_logits[-1].shape[:2]
        points = sort_by_row(draw_points(batch_size, self.num_points, class_logits[-1].device))
        costs = []
        for image, (masks, classes) in enumerate(zip(mask_labels, class_labels, strict=True)):
            if not len(masks):
                costs.append(points.new_zeros(len(class_logits), num_queries, 0))
                continue
            own_points = points[image : image + 1]
            target_points = sample_at_points(masks, own_points)
            layers = [
                self.pair_costs(
                    logits[image], sample_at_points(maps[image], own_points), classes, target_points
                )
                for logits, maps in zip(class_logits, mask_logits, strict=True)
            ]
            cost = torch.stack(layers)
            if query_classes is not None:
                cost = cost + own_class_cost(query_classes[image], classes)
            costs.append(cost)
        return assign(costs, num_queries)

    def pair_costs(
        self, class_logits: Tensor, mask_points: Tensor, target_classes: Tensor, target_points: Tensor
    ) -> Tensor:
        """Give the finite cost of each query and target, (Q, n) float32.

        Args:
            class_logits: (Q, K + 1).
            mask_points: (Q, P) mask logits at points; overwritten.
            target_classes: (n,) int64.
            target_points: (n, P) in 0..1.
        """
        cost_class = -class_logits.float().softmax(-1).index_select(1, target_classes)

        # Binary cross-entropy t * softplus(-x) + (1 - t) * softplus(x) is softplus(x) - t * x.
        cost_mask = F.softplus(mask_points).sum(1, keepdim=True) - mask_points @ target_points.T
        cost_mask = cost_mask / mask_points.shape[1]

        probabilities = mask_points.sigmoid_()
        areas = probabilities.sum(1, keepdim=True) + target_points.sum(1)
        cost_dice = 1.0 - (2.0 * (probabilities @ target_points.T) + 1.0) / (areas + 1.0)

        cost = self.class_weight * cost_class + self.mask_weight * cost_mask + self.dice_weight * cost_dice
        return cost.nan_to_num(nan=_FINITE_COST, posinf=_FINITE_COST, neginf=_FINITE_COST)

    def class_losses(
        self, class_logits: list[Tensor], class_labels: list[Tensor], matches: Matches
    ) -> Tensor:
        """Sum cross-entropy over classes and void over queries, void weighing no_object_weight: (L,)."""
        void = class_logits[-1].shape[-1] - 1
        own_targets = matches.targets.split(matches.sizes, dim=1)
        classes = torch.cat(
            [labels[targets] for labels, targets in zip(class_labels, own_targets, strict=True)], dim=1
        )
        flat = [logits.flatten(0, 1).float() for logits in class_logits]
        labels = classes.new_full((len(flat), len(flat[0])), void).scatter_(1, matches.queries, classes)
        weights = flat[0].new_ones(void + 1)
        weights[void] = self.no_object_weight
        return torch.stack(
            [
                F.cross_entropy(logits, own, weights, reduction="sum")
                for logits, own in zip(flat, labels, strict=True)
            ]
        )

    def mask_losses(
        self, matched: list[Tensor], mask_labels: list[Tensor], matches: Matches
    ) -> tuple[Tensor, Tensor]:
        """Sum binary cross-entropy and dice loss of matched mask logits, (M, h, w) each, at points: two of (L,)."""
        if not sum(matches.sizes):  # nothing to learn; the zeros still belong to the graph
            zeros = torch.stack([maps.float().sum() for maps in matched])
            return zeros, zeros
        points = [self.uncertain_points(maps.detach()) for maps in matched]
        labels = labels_at_points(mask_labels, matches, points)
        logits = [sample_at_points(maps, own) for maps, own in zip(matched, points, strict=True)]
        losses = (map(loss, logits, labels) for loss in (cross_entropy_sum, dice_sum))
        cross_entropy, dice = (torch.stack(list(of_layers)) for of_layers in losses)
        return cross_entropy, dice

    @torch.no_grad()
    def uncertain_points(self, mask_logits: Tensor) -> Tensor:
        """Choose points where masks are most uncertain, and random ones: (M, h, w) -> (M, P, 2) in 0..1.

        Uncertainty is -|logit|, greatest where a logit is NaN; candidates are drawn at random.
        """
        num_masks, device = len(mask_logits), mask_logits.device
        candidates = draw_points(num_masks, self.num_candidates, device)
        uncertainty = sample_at_points(mask_logits, candidates).abs_().neg_()
        chosen = uncertainty.topk(self.num_uncertain, dim=1, sorted=False).indices
        uncertain = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
        rest = draw_points(num_masks, self.num_points - self.num_uncertain, device)
        return torch.cat([uncertain, rest], dim=1)
