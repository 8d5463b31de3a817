"""Batches of images that differ in size or vocabulary: cut into groups that do not, and merged again.

Each group goes through the network by itself, cropped to its own size rounded up to a multiple of 32, so what a batch
was padded to changes nothing.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import ModelOutput

from .dominant_categories import NO_OWN_CLASS
from .ops import IMAGE_STRIDE, MASK_STRIDE, integer_matrix, pad_to
from .set_criterion import Matches
from .text import Vocabulary, VocabularyKey, VocabularyLike, normalize_vocabulary


@dataclass
class ITAForOpenVocabSegmentationOutput(ModelOutput):
    """What the model says of a batch.

    In a batch with a vocabulary per image, classes are padded to the largest K with -inf (void stays last), and
    queries with rows that are certainly void.

    Attributes:
        loss: scalar, the sum of `loss_dict`, when labels are given.
        class_queries_logits: (B, Q, K + 1), void last. In eval mode log-probabilities of the ensemble, in training the
            decoder's logits.
        masks_queries_logits: (B, Q, H / 4, W / 4) of the padded image.
        loss_dict: the weighted losses by name: `loss_ce`, `loss_mask`, `loss_dice` of the last prediction, and the same
            with `_0`, `_1`, ... of the earlier ones.
        dominant_categories: for each image its dominant categories, nearest first; None in a graph being traced.
        image_sizes: (B, 2) int64, height and width of each image within the padded one.
        stuff_ids: for each image the indices of its classes that are stuff.
        vocabulary: for each image its classes, each a list of names.
        encoder_hidden_states: with `output_hidden_states` the features of the image tower at strides 4, 8, 16, 32,
            (B, C_l, H / s, W / s); the same for the next two.
        pixel_decoder_hidden_states: the enhanced features at strides 32, 16, 8, (B, C, H / s, W / s).
        transformer_decoder_hidden_states: the queries before the first layer of the decoder and after each, (B, Q, C).
        hidden_states: the same as `transformer_decoder_hidden_states`.
        attentions: with `output_attentions` the weights of each cross-attention (B, heads, Q, S) and, where there is
            any, self-attention (B, heads, Q, Q) of the decoder, in order.
    """

    loss: Tensor | None = None
    class_queries_logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    dominant_categories: list[list[str]] | None = None
    image_sizes: Tensor | None = None
    stuff_ids: list[list[int]] | None = None
    vocabulary: list[list[list[str]]] | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    pixel_decoder_hidden_states: tuple[Tensor, ...] | None = None
    transformer_decoder_hidden_states: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


HIDDEN_STATES = ("encoder_hidden_states", "pixel_decoder_hidden_states", "transformer_decoder_hidden_states")
"""Hidden states of the image tower, at strides 4, 8, 16, 32; of detail enhancement, at 32, 16, 8; of the decoder."""


@dataclass
class SegmentOutput:
    """What the network makes of images of one size with one vocabulary, or, merged, of a batch.

    Attributes:
        class_logits: of the decoder, (B, Q, K + 1) of each prediction, the last one last.
        mask_logits: (B, Q, H / 4, W / 4) of each prediction.
        log_probs: (B, Q, K + 1) of the ensemble; None in training.
        mask_embeds: (B, Q, C_mask) of each prediction; None after merging.
        mask_features: (B, C_mask, H / 4, W / 4); None after merging.
        dominant: (B, k) int64, indices of the selected names; None if there was no selection, or after merging.
        query_classes: (B, Q) int64, of `TextQueries.query_classes`.
        hidden_states: if asked for, by the names `HIDDEN_STATES`.
        attentions: of the decoder, if asked for.
    """

    class_logits: list[Tensor]
    mask_logits: list[Tensor]
    log_probs: Tensor | None = None
    mask_embeds: list[Tensor] | None = None
    mask_features: Tensor | None = None
    dominant: Tensor | None = None
    query_classes: Tensor | None = None
    hidden_states: dict[str, tuple[Tensor, ...]] | None = None
    attentions: tuple[Tensor, ...] | None = None

    def hidden_state_fields(self) -> dict[str, tuple[Tensor, ...]]:
        """Give hidden states as the model's output has them: those of the decoder under two names."""
        if self.hidden_states is None:
            return {}
        return self.hidden_states | {"hidden_states": self.hidden_states[HIDDEN_STATES[-1]]}


PADDED_MASK_LOGIT = -100.0
"""The mask logit of pixels and queries that a batch was padded with."""


@dataclass
class Group:
    """Images of a batch that go through the network together.

    Attributes:
        indices: their places in the batch.
        pixel_values: (b, 3, H, W), H and W multiples of 32, zero in the padding.
        valid: (b, H, W) bool, pixels that are not padding; None where all are.
        sizes: each image's own height and width.
        vocabulary: of all of them.
        dominant_categories: for each image the names given from outside, all of one number; None to select them.
    """

    indices: list[int]
    pixel_values: Tensor
    valid: Tensor | None
    sizes: list[tuple[int, int]]
    vocabulary: VocabularyKey
    dominant_categories: list[list[str]] | None


@torch.compiler.assume_constant_result
def batch_vocabularies(
    vocabulary: VocabularyLike | None,
    vocabularies: Sequence[VocabularyLike] | None,
    default: VocabularyLike | None,
    batch_size: int,
) -> list[VocabularyKey]:
    """Give each image of a batch its vocabulary, in hashable form; `default` where neither argument is given.

    Raises:
        ValueError: both are given, or none at all; one is malformed; or there are not as many as images.
    """
    if vocabulary is not None and vocabularies is not None:
        raise ValueError(
            "give vocabulary= (one for all images) or vocabularies= (one for each image), not both"
        )
    if vocabularies is not None:
        if isinstance(vocabularies, str | Vocabulary) or not isinstance(vocabularies, Sequence):
            raise ValueError(
                "vocabularies= is a list with one vocabulary for each image; for one use vocabulary="
            )
        if any(isinstance(entry, str) for entry in vocabularies):
            raise ValueError(
                "vocabularies= is a list with one vocabulary for each image, but it holds plain names: "
                "for one vocabulary use vocabulary="
            )
        if len(vocabularies) != batch_size:
            raise ValueError(f"vocabularies= has {len(vocabularies)} vocabularies for {batch_size} images")
        return [normalize_vocabulary(entry).key for entry in vocabularies]
    vocabulary = default if vocabulary is None else vocabulary
    if vocabulary is None:
        raise ValueError("no vocabulary: pass vocabulary=[...] or call set_vocabulary on the model first")
    return [normalize_vocabulary(vocabulary).key] * batch_size


@torch.compiler.assume_constant_result
def class_ids_of(vocabulary: VocabularyKey, names: Sequence[str]) -> list[int]:
    """Give the indices of the classes that have one of the names."""
    has_name = Vocabulary(vocabulary).shares_name_with(names)
    return [index for index, is_one in enumerate(has_name) if is_one]


def check_images(pixel_values: Tensor, pixel_mask: Tensor | None) -> list[tuple[int, int]]:
    """Check images (B, 3, H, W) and their mask (B, H, W), and find each one's height and width without padding.

    Raises:
        ValueError: wrong shapes or dtypes, no image, an image without a pixel, values that are NaN or infinite, or
            padding that is not at the bottom and on the right.
    """
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
        raise ValueError(f"pixel_values must be (batch, 3, height, width), got {tuple(pixel_values.shape)}")
    if not pixel_values.is_floating_point() or 0 in pixel_values.shape:
        raise ValueError(
            f"pixel_values must be floats of at least one image with pixels, got {pixel_values.dtype} of shape "
            f"{tuple(pixel_values.shape)}"
        )
    batch, _, height, width = pixel_values.shape
    if pixel_mask is not None and pixel_mask.shape != (batch, height, width):
        raise ValueError(f"pixel_mask must be {(batch, height, width)}, got {tuple(pixel_mask.shape)}")
    if torch.compiler.is_compiling():
        return [(height, width)] * batch
    # On an accelerator this would wait for the device; there, post-processing names results that are not finite.
    if pixel_values.device.type == "cpu" and not bool(pixel_values.isfinite().all()):
        raise ValueError("pixel_values has values that are NaN or infinite")
    if pixel_mask is None:
        return [(height, width)] * batch
    mask = pixel_mask.bool()
    heights, widths = (mask.any(dim=dim).sum(dim=1) for dim in (2, 1))
    # All that is asked of the mask crosses to the host at once, before the network has any work waiting.
    found = torch.stack([heights, widths, mask.sum(dim=(1, 2)), mask[:, 0, 0].long()], dim=1).tolist()
    sizes = [(height, width) for height, width, _, _ in found]
    if any(0 in size for size in sizes):
        raise ValueError("pixel_mask leaves an image without a single pixel")
    if any(area != height * width or not corner for height, width, area, corner in found):
        raise ValueError(
            "pixel_mask must be a rectangle at the top left: padding is at the bottom and on the right"
        )
    return sizes


def check_dominant_categories(names: Sequence | None, batch: int, most: int) -> list[list[str]] | None:
    """Give each image the dominant categories that come from outside: one list of names for all, or one per image.

    They are not looked at where the network takes none (`most` is 0).

    Raises:
        ValueError: not a list of names, too many of them, or not as many lists as images.
    """
    if names is None or not most:
        return None
    rows = [list(names)] * batch if all(isinstance(name, str) for name in names) else names
    if len(rows) != batch:
        raise ValueError(f"dominant_categories for {len(rows)} images, but there are {batch}")
    for row in rows:
        if not isinstance(row, list | tuple) or not all(
            isinstance(name, str) and name.strip() for name in row
        ):
            raise ValueError(
                f"dominant_categories are names, a list of them for each image, got {row!r:.100}"
            )
        if len(row) > most:
            raise ValueError(f"at most {most} dominant categories per image, got {len(row)}")
    return [list(row) for row in rows]


def group_images(
    pixel_values: Tensor,
    pixel_mask: Tensor | None,
    sizes: list[tuple[int, int]],
    vocabularies: list[VocabularyKey],
    dominant_categories: list[list[str]] | None = None,
) -> list[Group]:
    """Group images whose padded size, vocabulary and number of given dominant categories are the same.

    In a graph being traced, images stay padded to the batch's size, and padding is masked.
    """
    is_traced = torch.compiler.is_compiling()
    members: dict[tuple, list[int]] = {}
    for index, (size, vocabulary) in enumerate(zip(sizes, vocabularies, strict=True)):
        count = None if dominant_categories is None else len(dominant_categories[index])
        members.setdefault((None if is_traced else padded_size(size), vocabulary, count), []).append(index)
    groups = []
    for (_, vocabulary, _), indices in members.items():
        own = [sizes[index] for index in indices]
        padded = padded_size(own[0])
        is_whole = len(indices) == len(sizes)
        pixels = pixel_values if is_whole else pixel_values[indices]
        valid = valid_pixels(own, padded, pixel_values.device)
        if is_traced and pixel_mask is not None:
            mask = pixel_mask if is_whole else pixel_mask[indices]
            valid = pad_to(mask.bool(), padded)
        given = None if dominant_categories is None else [dominant_categories[index] for index in indices]
        groups.append(Group(indices, crop(pixels, padded, valid), valid, own, vocabulary, given))
    return groups


def padded_size(size: Sequence[int]) -> tuple[int, int]:
    """Round height and width up to multiples of 32."""
    height, width = (-(-side // IMAGE_STRIDE) * IMAGE_STRIDE for side in size)
    return height, width


def crop(pixel_values: Tensor, padded: tuple[int, int], valid: Tensor | None) -> Tensor:
    """Cut (or pad) images to one padded size, zero where they are not valid."""
    pixels = pad_to(pixel_values[:, :, : padded[0], : padded[1]], padded)
    return pixels if valid is None else pixels.masked_fill(~valid[:, None], 0)


def valid_pixels(
    sizes: list[tuple[int, int]], padded: tuple[int, int], device: torch.device
) -> Tensor | None:
    """Mark where images of these sizes lie in the padded one, (B, H, W) bool; None if all fill it."""
    if all(size == padded for size in sizes):
        return None
    own = integer_matrix(sizes, device)
    rows = torch.arange(padded[0], device=device)[None] < own[:, :1]
    columns = torch.arange(padded[1], device=device)[None] < own[:, 1:]
    return rows[:, :, None] & columns[:, None]


def valid_sizes(pixel_mask: Tensor | None, sizes: list[tuple[int, int]], device: torch.device) -> Tensor:
    """Give each image's height and width without padding, (B, 2) int64; in a graph being traced, of the mask."""
    if pixel_mask is None or not torch.compiler.is_compiling():
        return integer_matrix(sizes, device)
    return torch.stack([pixel_mask.bool().any(dim=dim).sum(dim=1) for dim in (2, 1)], dim=1)


def merge(parts: list[SegmentOutput], groups: list[Group], padded: tuple[int, int]) -> SegmentOutput:
    """Merge the groups' outputs to a batch of images padded to `padded`, in the batch's order.

    It is filled up with classes that are impossible, queries that are void, and pixels that belong to no mask.
    """
    size = padded[0] // MASK_STRIDE, padded[1] // MASK_STRIDE

    def each(of_parts: Iterable[Sequence[Tensor]], fill: float, size: tuple[int, ...] = ()) -> list[Tensor]:
        return [_merge(one, groups, fill, size) for one in zip(*of_parts, strict=True)]

    log_probs = [part.log_probs for part in parts if part.log_probs is not None]
    query_classes = [part.query_classes for part in parts if part.query_classes is not None]
    states = [part.hidden_states for part in parts if part.hidden_states is not None]
    attentions = [part.attentions for part in parts if part.attentions is not None]
    return SegmentOutput(
        [_merge_classes(one, groups) for one in zip(*(part.class_logits for part in parts), strict=True)],
        each((part.mask_logits for part in parts), PADDED_MASK_LOGIT, size),
        _merge_classes(log_probs, groups) if log_probs else None,
        query_classes=_merge(query_classes, groups, NO_OWN_CLASS)
        if len(query_classes) == len(parts)
        else None,
        hidden_states={name: tuple(each([own[name] for own in states], 0)) for name in HIDDEN_STATES}
        if states
        else None,
        attentions=tuple(each(attentions, 0)) if attentions else None,
    )


def _merge(parts: Sequence[Tensor], groups: list[Group], fill: float, size: tuple[int, ...] = ()) -> Tensor:
    """Merge (b, ...) to (B, ...), filled up to the largest sizes, the last dimensions to `size` where it is given."""
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    shape[len(shape) - len(size) :] = size
    if len(parts) == 1 and list(parts[0].shape[1:]) == shape:
        return parts[0]
    merged = parts[0].new_full((sum(map(len, parts)), *shape), fill)
    for part, group in zip(parts, groups, strict=True):
        place: Any = (group.indices, *map(slice, part.shape[1:]))
        merged[place] = part
    return merged


def _merge_classes(parts: Sequence[Tensor], groups: list[Group]) -> Tensor:
    """Merge (b, q, k + 1) to (B, Q, K + 1), void last."""
    if len(parts) == 1:
        return parts[0]
    classes = _merge([part[..., :-1] for part in parts], groups, float("-inf"))
    return torch.cat([classes, _merge([part[..., -1:] for part in parts], groups, 0)], dim=-1)


def dominant_names(
    parts: list[SegmentOutput], groups: list[Group], selectable_names: Callable[[Vocabulary], list[str]]
) -> list[list[str]] | None:
    """Give each image of the batch its dominant categories, nearest first; None in a graph being traced.

    The host waits here for the first time, when all groups are queued on the device.
    """
    if torch.compiler.is_compiling():
        return None
    placed: dict[int, list[str]] = {}
    for part, group in zip(parts, groups, strict=True):
        rows = group.dominant_categories or [[] for _ in group.indices]
        if part.dominant is not None:
            names = selectable_names(Vocabulary(group.vocabulary))
            rows = [[names[index] for index in row] for row in part.dominant.tolist()]
        placed.update(zip(group.indices, rows, strict=True))
    return [placed[index] for index in sorted(placed)]


def matched_mask_logits(
    parts: list[SegmentOutput], groups: list[Group], padded: tuple[int, int]
) -> Callable[[Matches], Tensor]:
    """Give a function that computes the mask logits of matched queries again, in float32, for the loss.

    Gradients then flow through the few masks that are matched, not through all. It maps `Matches` to (L, M, H / 4,
    W / 4), the images' masks one after the other, as `merge` would give them.
    """
    height, width = padded[0] // MASK_STRIDE, padded[1] // MASK_STRIDE

    def compute(matches: Matches) -> Tensor:
        masks: dict[int, Tensor] = {}
        for part, group in zip(parts, groups, strict=True):
            assert part.mask_embeds is not None and part.mask_features is not None
            by_image = torch.stack(part.mask_embeds, dim=1).unbind()
            for own, feature, index in zip(by_image, part.mask_features.unbind(), group.indices, strict=True):
                queries = matches.of(index)[0]
                rows = queries.clamp(max=own.shape[1] - 1)[..., None].expand(-1, -1, own.shape[2])
                with torch.autocast(own.device.type, enabled=False):
                    logits = torch.einsum("lmc,chw->lmhw", own.gather(1, rows).float(), feature.float())
                is_padding = queries >= own.shape[1]
                logits = logits.masked_fill(is_padding[..., None, None], PADDED_MASK_LOGIT)
                margin = (0, width - logits.shape[-1], 0, height - logits.shape[-2])
                masks[index] = F.pad(logits, margin, value=PADDED_MASK_LOGIT)
        return torch.cat([masks[index] for index in sorted(masks)], dim=1)

    return compute


def check_mask_labels(
    mask_labels: list[Tensor] | None,
    class_labels: list[Tensor] | None,
    sizes: list[tuple[int, int]],
    padded: Sequence[int],
    num_classes: list[int],
) -> list[Tensor] | None:
    """Check ground truth against images and vocabularies, and pad masks to cover the same area as mask logits.

    Args:
        mask_labels: for each image (n, H, W).
        class_labels: for each image (n,) int64.
        sizes: each image's own height and width.
        padded: height and width of the batch.
        num_classes: of each image's vocabulary.

    Returns:
        Masks padded to multiples of 32; None without labels.

    Raises:
        ValueError: one of the two is missing, there are not as many labels as images, masks are of neither the image's
            own nor the padded size, not as many classes as masks, or a class that the vocabulary does not have.
    """
    if mask_labels is None and class_labels is None:
        return None
    if mask_labels is None or class_labels is None:
        raise ValueError("losses need both mask_labels and class_labels")
    if not len(mask_labels) == len(class_labels) == len(sizes):
        raise ValueError(
            f"labels for {len(mask_labels)} and {len(class_labels)} images, but there are {len(sizes)}"
        )
    for masks, labels, size in zip(mask_labels, class_labels, sizes, strict=True):
        if masks.ndim != 3 or tuple(masks.shape[-2:]) not in (size, tuple(padded)):
            raise ValueError(f"mask_labels must be (n, {padded[0]}, {padded[1]}), got {tuple(masks.shape)}")
        if labels.shape != masks.shape[:1]:
            raise ValueError(f"{len(masks)} masks, but class_labels have shape {tuple(labels.shape)}")
    # One number crosses to the host, not one for each image.
    limits = torch.cat(
        [labels.new_full(labels.shape, k) for labels, k in zip(class_labels, num_classes, strict=True)]
    )
    classes = torch.cat(list(class_labels))
    if bool(((classes < 0) | (classes >= limits)).any()):
        raise ValueError(
            f"class_labels must be at least 0 and below the number of classes, got {classes.tolist()}"
        )
    return [pad_to(masks, padded_size(padded)) for masks in mask_labels]
