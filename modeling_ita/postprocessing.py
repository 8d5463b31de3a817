"""Turn the model's outputs into semantic maps, panoptic segments and instances.

These are the inference rules of Mask2Former (arXiv 2112.01527, section 3) and FC-CLIP (arXiv 2308.02487). Each query's
mask logits are resized to the requested size and scored there, a tile of rows at a time (`MaskTiles`), so that nothing
of size (queries, height, width) or (classes, height, width) is ever held.

Symbols: Q queries, K classes, (h, w) a mask's size, (H, W) the output's size, p_q(c) the probability of class c for
query q, m_q(x) the mask probability of query q at pixel x.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .mask_tiles import MaskTiles, fill_map
from .pixel_classifier import ROUNDING, PixelClassifier

DEFAULT_THRESHOLDS = {"semantic": 0.5, "panoptic": 0.8, "instance": 0.5}
"""Lowest score of a pixel (semantic) or segment that is reported; pipelines have transformers' own for segments."""
IGNORE_INDEX = 255
"""Label of pixels that show none of the classes."""

MAX_INSTANCES = 100  # (query, class) pairs considered as instances


@dataclass(frozen=True)
class ImageOutputs:
    """The model's outputs for one image.

    Attributes:
        class_logits: (Q, K + 1), void last.
        mask_logits: (Q, h, w).
        image_size: height and width of the image within the network input; None where unknown.
        target_size: height and width of the results; None for those of the network input.
        stuff_ids: classes that are stuff.
        labels: name of each class; None where unknown.
    """

    class_logits: Tensor
    mask_logits: Tensor
    image_size: tuple[int, int] | None
    target_size: tuple[int, int] | None
    stuff_ids: frozenset[int]
    labels: list[str] | None

    @property
    def logits_and_sizes(self) -> dict[str, Any]:
        """The arguments that all functions of this module share."""
        names = ("class_logits", "mask_logits", "image_size", "target_size")
        return {name: getattr(self, name) for name in names}

    def labeled(self, segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Add each segment's `label`, the name of its class, where names are known."""
        if self.labels is not None:
            for segment in segments:
                segment["label"] = self.labels[segment["label_id"]]
        return segments


def check_fractions(**values: Any) -> None:
    """Check that thresholds are numbers from 0 to 1; None is allowed.

    Raises:
        ValueError: one is not.
    """
    for name, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 <= value <= 1):
            raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}")


def split_outputs(outputs: Any, target_sizes: Any | None = None) -> list[ImageOutputs]:
    """Split the outputs of a batch by image.

    Args:
        outputs: the model's, as an object or a mapping; only the two logits are required.
        target_sizes: (height, width) of each image's results.

    Raises:
        ValueError: if there are not as many sizes as images, a size is no size, or logits are NaN.
    """

    def field(name: str) -> Any:
        return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)

    batch_classes, batch_masks = field("class_queries_logits"), field("masks_queries_logits")
    image_sizes = field("image_sizes")
    count = len(batch_classes)
    if target_sizes is not None and len(target_sizes) != count:
        raise ValueError(f"{count} images, but {len(target_sizes)} target sizes")
    images = []
    for index, (class_logits, mask_logits) in enumerate(zip(batch_classes, batch_masks, strict=True)):
        if class_logits.isnan().any() or mask_logits.sum(dtype=torch.float32).isnan():
            raise ValueError(f"the model's outputs for image {index} are NaN: check its weights and inputs")
        # In a batch of several vocabularies, classes are padded with -inf.
        real = (class_logits[:, :-1] > -math.inf).any(0).nonzero()
        num_classes = int(real[-1]) + 1 if len(real) else 1
        # Pipelines unbatch a list with an item for each image to the image's own item.
        stuff_ids, vocabulary = field("stuff_ids") or [], field("vocabulary")
        if stuff_ids and not isinstance(stuff_ids[0], int):
            stuff_ids = stuff_ids[index]
        if vocabulary and not isinstance(vocabulary[0][0], str):
            vocabulary = vocabulary[index]
        images.append(
            ImageOutputs(
                class_logits=torch.cat([class_logits[:, :num_classes], class_logits[:, -1:]], dim=1),
                mask_logits=mask_logits,
                image_size=None if image_sizes is None else _size(image_sizes[index]),
                target_size=None if target_sizes is None else _size(target_sizes[index]),
                stuff_ids=frozenset(stuff_ids),
                labels=[names[0] for names in vocabulary] if vocabulary else None,
            )
        )
    return images


def _size(size: Sequence[int]) -> tuple[int, int]:
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"a target size is (height, width) in pixels, got {tuple(size)}")
    return int(size[0]), int(size[1])


def class_probabilities(class_logits: Tensor) -> Tensor:
    """Return (Q, K + 1) float32 probabilities of (Q, K + 1) logits or log-probabilities, void last."""
    return class_logits.float().softmax(-1)


# --- semantic -----------------------------------------------------------------------------------------------------


def semantic_scores(
    class_logits: Tensor,
    mask_logits: Tensor,
    image_size: Sequence[int] | None = None,
    target_size: Sequence[int] | None = None,
) -> Tensor:
    """Score every class at every pixel: score(c, x) = sum over q of p_q(c) m_q(x), without void.

    Args:
        class_logits: (Q, K + 1), void last.
        mask_logits: (Q, h, w).
        image_size: as for `MaskTiles`.
        target_size: as for `MaskTiles`.

    Returns:
        (K, H, W) float32.
    """
    probabilities = class_probabilities(class_logits)[:, :-1]  # (Q, K)
    masks = MaskTiles(mask_logits, image_size, target_size)
    scores = probabilities.new_zeros(probabilities.shape[1], *masks.size)
    for rows, logits in masks.tiles(values_per_pixel=sum(probabilities.shape)):
        scores[:, rows] = (logits.sigmoid_() @ probabilities).permute(2, 0, 1)
    return scores


def semantic_map(
    class_logits: Tensor,
    mask_logits: Tensor,
    image_size: Sequence[int] | None = None,
    target_size: Sequence[int] | None = None,
    threshold: float | None = None,
    num_classes: int | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Find the class with the highest of the `semantic_scores` at each pixel.

    Args:
        class_logits: (Q, K + 1), void last.
        mask_logits: (Q, h, w).
        image_size: as for `MaskTiles`.
        target_size: as for `MaskTiles`.
        threshold: pixels whose best class has a probability below it get `ignore_index`. This is the probability
            that any query shows the class there, were queries independent: 1 - prod over q of (1 - p_q(c) m_q(x)).
            None: every pixel gets a class.
        num_classes: classes from this index on are distractors: pixels where one of them scores highest get
            `ignore_index`. None: there are none.
        ignore_index: label of pixels without a class.

    Returns:
        (H, W) int64.

    Raises:
        ValueError: if `ignore_index` is one of the classes.
    """
    total = class_logits.shape[1] - 1
    num_classes = total if num_classes is None else num_classes
    rejects = threshold is not None or num_classes < total
    if rejects and 0 <= ignore_index < num_classes:
        raise ValueError(
            f"ignore_index {ignore_index} is one of {num_classes} classes: choose another, such as -1"
        )
    classifier = PixelClassifier(class_probabilities(class_logits)[:, :-1])
    masks = MaskTiles(mask_logits[classifier.queries], image_size, target_size)
    if not classifier.is_possible:
        fill = ignore_index if rejects else 0
        return torch.full(masks.size, fill, dtype=torch.int64, device=mask_logits.device)
    rule = _SemanticRule(classifier, threshold, ignore_index)
    labels = fill_map(masks, rule, len(classifier.queries) * (1 if threshold is None else 2))
    if num_classes < total:
        labels[labels >= num_classes] = ignore_index
    return labels


@dataclass(frozen=True)
class _SemanticRule:
    """The best class of each pixel, where it reaches the threshold."""

    classifier: PixelClassifier
    threshold: float | None
    ignore_index: int

    def decide(self, lower: Tensor, upper: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        best, candidates = self.classifier.candidates(lower, upper)
        is_decided = candidates.sum(1) == 1
        if self.threshold is not None:
            least, most = (1 - self.classifier.misses(bound, best) for bound in (lower, upper))
            is_shown, is_hidden = least > self.threshold + ROUNDING, most < self.threshold - ROUNDING
            best, is_decided = (
                best.masked_fill(is_hidden, self.ignore_index),
                is_decided & (is_shown | is_hidden),
            )
        return best, is_decided, candidates

    def label(
        self, mask_probabilities: Tensor, is_pixel: Tensor | None = None, candidates: Tensor | None = None
    ) -> Tensor:
        best = self.classifier.best(mask_probabilities, candidates)
        if self.threshold is not None:
            best[1 - self.classifier.misses(mask_probabilities, best) < self.threshold] = self.ignore_index
        return best


# --- panoptic and instance ------------------------------------------------------------------------------------------


def panoptic_segments(
    class_logits: Tensor,
    mask_logits: Tensor,
    image_size: Sequence[int] | None = None,
    target_size: Sequence[int] | None = None,
    threshold: float = DEFAULT_THRESHOLDS["panoptic"],
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    stuff_ids: Collection[int] = (),
    num_classes: int | None = None,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Find segments that do not overlap.

    Queries whose best class is not void and has a probability above `threshold` compete: pixel x goes to the one
    with the highest p_q(c) m_q(x). A query's segment is what it won of its own pixels, those with m_q(x) >=
    `mask_threshold`. It is dropped if own, won or both are empty, or won / own < `overlap_mask_area_threshold`.

    Args:
        class_logits: (Q, K + 1), void last.
        mask_logits: (Q, h, w).
        image_size: as for `MaskTiles`.
        target_size: as for `MaskTiles`.
        threshold: see above.
        mask_threshold: see above.
        overlap_mask_area_threshold: see above.
        stuff_ids: classes whose segments are fused to one, with the highest of their scores.
        num_classes: classes from this index on are distractors: they compete, and their segments are dropped.

    Returns:
        Segment ids (H, W) int32, from 1, 0 being no segment; and `id`, `label_id`, `was_fused` and `score` of each.
    """
    num_classes = class_logits.shape[1] - 1 if num_classes is None else num_classes
    scores, labels = class_probabilities(class_logits).max(-1)
    kept = (labels != class_logits.shape[-1] - 1) & (scores > threshold)
    scores, label_list = scores[kept], labels[kept].tolist()
    masks = MaskTiles(mask_logits[kept], image_size, target_size)
    device, count = mask_logits.device, len(label_list)
    if count == 0:
        return torch.zeros(masks.size, dtype=torch.int32, device=device), []

    rule = _PanopticRule(scores, mask_threshold)
    found = fill_map(masks, rule, values_per_pixel=2 * count, dtype=torch.int32)
    areas = (
        found.flatten().bincount(minlength=2 * count).view(count, 2)
    )  # of each query, without and with its own
    won_areas, segment_areas = areas.sum(1).tolist(), areas[:, 1].tolist()

    segments: list[dict[str, Any]] = []
    fused: dict[int, dict[str, Any]] = {}
    ids = torch.zeros(count, 2, dtype=torch.int32)
    queries = zip(label_list, scores.tolist(), rule.own_areas.tolist(), won_areas, segment_areas, strict=True)
    for query, (label, score, own, won, segment_area) in enumerate(queries):
        if label >= num_classes or 0 in (own, won, segment_area) or won / own < overlap_mask_area_threshold:
            continue
        if label in fused:
            segment = fused[label]
            segment["score"] = max(segment["score"], round(score, 6))
        else:
            segment = _segment(len(segments) + 1, label, score, was_fused=label in stuff_ids)
            segments.append(segment)
            if segment["was_fused"]:
                fused[label] = segment
        ids[query, 1] = segment["id"]
    return ids.flatten().to(device).index_select(0, found.flatten()).view(masks.size), segments


class _PanopticRule:
    """The query with the highest score at each pixel, and whether the pixel is its own: twice the query, plus 1 if so.

    Attributes:
        own_areas: (Q,) int64, the pixels so far whose mask probability reaches the threshold.
    """

    def __init__(self, scores: Tensor, mask_threshold: float):
        self._scores, self._threshold = scores, mask_threshold
        self.own_areas = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)

    def decide(self, lower: Tensor, upper: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        least, best = (lower * self._scores).max(1, keepdim=True)
        can_win = upper * self._scores >= least * (1 - ROUNDING)
        is_own, is_other = lower > self._threshold + ROUNDING, upper < self._threshold - ROUNDING
        is_decided = (can_win.sum(1) == 1) & (is_own | is_other).all(1)
        self.own_areas += (pixels * is_decided) @ is_own.long()
        return (2 * best + is_own.gather(1, best))[:, 0], is_decided, None

    def label(
        self, mask_probabilities: Tensor, is_pixel: Tensor | None = None, candidates: Tensor | None = None
    ) -> Tensor:
        winner = (mask_probabilities * self._scores).argmax(-1, keepdim=True)
        is_own = mask_probabilities >= self._threshold
        counted = is_own if is_pixel is None else is_own & is_pixel[:, None]
        self.own_areas += counted.float().sum(0).long()
        return (2 * winner + is_own.gather(-1, winner))[:, 0]


def instance_segments(
    class_logits: Tensor,
    mask_logits: Tensor,
    image_size: Sequence[int] | None = None,
    target_size: Sequence[int] | None = None,
    threshold: float = DEFAULT_THRESHOLDS["instance"],
    mask_threshold: float = 0.5,
    stuff_ids: Collection[int] = (),
    num_classes: int | None = None,
    binary_maps: bool = False,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Find instances of things, which may overlap, best score first.

    Of the `MAX_INSTANCES` most probable (query, class) pairs those of thing classes are kept. An instance's mask is
    where m_q(x) > `mask_threshold`, its score p_q(c) times the mean of m_q(x) within the mask. Instances with an
    empty mask or a score below `threshold` are left out.

    Args:
        class_logits: (Q, K + 1), void last.
        mask_logits: (Q, h, w).
        image_size: as for `MaskTiles`.
        target_size: as for `MaskTiles`.
        threshold: see above.
        mask_threshold: see above.
        stuff_ids: classes without instances.
        num_classes: classes from this index on are distractors, whose instances are left out.
        binary_maps: return a mask for each instance.

    Returns:
        Instance ids (H, W) int32, from 1, 0 being none, the better of two instances hiding the other; or with
        `binary_maps` masks (n, H, W) bool; and `id`, `label_id`, `was_fused` and `score` of each instance.
    """
    probabilities = class_probabilities(class_logits)[:, :-1]
    total = probabilities.shape[1]
    num_classes = total if num_classes is None else num_classes
    class_scores, pairs = probabilities.flatten().topk(min(MAX_INSTANCES, probabilities.numel()))
    pair_labels = [pair % total for pair in pairs.tolist()]
    things = torch.tensor([label not in stuff_ids and label < num_classes for label in pair_labels])
    things = things.to(pairs.device) & (class_scores > 0)  # padding of a batch has probability 0
    class_scores, pairs = class_scores[things], pairs[things]
    queries, query_of_pair = (pairs // total).unique(return_inverse=True)

    masks = MaskTiles(mask_logits[queries], image_size, target_size)
    cut = math.log(mask_threshold / (1 - mask_threshold)) if 0 < mask_threshold < 1 else math.inf
    cut = -math.inf if mask_threshold <= 0 else cut
    regions = masks.regions(cut)
    areas, sums = torch.zeros(2, len(queries), dtype=torch.float64, device=pairs.device)
    for query, region in enumerate(regions):
        for _, logits in masks.of_query(query, region) if region else ():
            inside = F.threshold(logits, cut, -math.inf, inplace=True).sigmoid_()
            sums[query] += inside.sum()
            areas[query] += inside.ceil_().sum()
    scores = class_scores * (sums / areas.clamp(min=1)).float()[query_of_pair]

    order = scores.argsort(descending=True, stable=True)
    order = order[(areas[query_of_pair] > 0)[order] & (scores >= threshold)[order]]
    found = zip((pairs[order] % total).tolist(), scores[order].tolist(), strict=True)
    segments = [_segment(number, label, score) for number, (label, score) in enumerate(found, start=1)]
    count, query_of_instance = len(segments), query_of_pair[order]
    shape = (count, *masks.size) if binary_maps else masks.size
    segmentation = torch.zeros(shape, dtype=torch.bool if binary_maps else torch.int32, device=pairs.device)
    if count == 0:
        return segmentation, segments
    for instance, query in reversed(list(enumerate(query_of_instance.tolist()))):  # the best one last
        for place, logits in masks.of_query(query, regions[query]):
            if binary_maps:
                segmentation[instance][place] = logits > cut
            else:
                segmentation[place].masked_fill_(logits > cut, instance + 1)
    return segmentation, segments


def _segment(number: int, label: int, score: float, was_fused: bool = False) -> dict[str, Any]:
    return {"id": number, "label_id": label, "was_fused": was_fused, "score": round(score, 6)}


def binary_mask_to_rle(mask: Tensor) -> list[int]:
    """Encode a mask (H, W) bool by its runs in reading order: start (from 1) and length of each."""
    flat = F.pad(mask.flatten().to(torch.int8), (1, 1))
    edges = (flat[1:] != flat[:-1]).nonzero().flatten() + 1
    edges[1::2] -= edges[::2]
    return edges.tolist()
