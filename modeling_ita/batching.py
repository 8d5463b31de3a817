"""Batches of images that differ in size or vocabulary: cut into groups that do not, and put together again.

Each group goes through the network by itself, cropped to its own size rounded up to a multiple of 32, so what a batch
was padded to changes nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .vocabulary import WordTensors

SIZE_DIVISOR = 32
"""The image tower's largest stride: images are padded to multiples of it."""

NO_MASK = -100.0
"""The mask logit of pixels and queries that a batch was padded with."""


def round_up(size: int) -> int:
    return -(-size // SIZE_DIVISOR) * SIZE_DIVISOR


def image_sizes_of(pixel_values: Tensor, pixel_mask: Tensor | None) -> list[tuple[int, int]]:
    """Each image's height and width without padding."""
    if pixel_mask is None:
        return [tuple(pixel_values.shape[-2:])] * len(pixel_values)  # type: ignore[list-item]
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


def crop(pixel_values: Tensor, sizes: list[tuple[int, int]], padded: tuple[int, int]) -> Tensor:
    """Images cut (or padded) to one padded size, zero outside of each one's own."""
    height, width = padded
    pixels = pixel_values[:, :, :height, :width]
    pixels = F.pad(pixels, (0, width - pixels.shape[-1], 0, height - pixels.shape[-2]))
    valid = valid_pixels(sizes, padded, pixels.device)
    return pixels if valid is None else pixels.masked_fill(~valid[:, None], 0)


def valid_pixels(
    sizes: list[tuple[int, int]], padded: tuple[int, int], device: torch.device
) -> Tensor | None:
    """(B, H, W) bool, where images of these sizes lie in the padded one; None if all fill it."""
    if all(size == padded for size in sizes):
        return None
    own = torch.tensor(sizes, device=device)
    rows = torch.arange(padded[0], device=device)[None] < own[:, :1]
    columns = torch.arange(padded[1], device=device)[None] < own[:, 1:]
    return rows[:, :, None] & columns[:, None]


def dominant_of_batch(names: Sequence | None, batch: int) -> list[list[str]] | None:
    """Dominant categories from outside, a list of names per image."""
    if names is None:
        return None
    rows = [list(names)] * batch if all(isinstance(name, str) for name in names) else names
    if len(rows) != batch:
        raise ValueError(f"dominant_categories for {len(rows)} images, but there are {batch}")
    for row in rows:
        if not isinstance(row, list | tuple) or not all(
            isinstance(name, str) and name.strip() for name in row
        ):
            raise ValueError(f"dominant_categories are names, a list of them for each image, got {row!r}")
    return [list(row) for row in rows]


class DominantNames:
    """A group's dominant names, which stay indices on the device until they are read.

    The copy to the host is queued behind the network and waited for in `read`, when all groups are queued.

    Args:
        given: the names, if they came from outside. nearest: (B, k) int64, indices into `candidates`, if they did not.
    """

    def __init__(
        self, given: list[list[str]] | None, nearest: Tensor | None, candidates: list[str], batch: int
    ):
        self.given = given if given is not None else [[] for _ in range(batch)]
        self.candidates = candidates
        self.nearest, self.copied = nearest, None
        if nearest is not None and nearest.is_cuda:
            self.nearest = nearest.to("cpu", non_blocking=True)  # into pinned memory
            self.copied = torch.cuda.Event()
            self.copied.record()

    def read(self) -> list[list[str]]:
        """For each image its names, nearest first."""
        if self.nearest is None:
            return self.given
        if self.copied is not None:
            self.copied.synchronize()
        return [[self.candidates[index] for index in row] for row in self.nearest.tolist()]


def channels_last(pixel_values: Tensor) -> Tensor:
    """Images in the layout that convolutions of an accelerator are fastest in; as they are on a CPU."""
    if pixel_values.device.type == "cpu":
        return pixel_values
    return pixel_values.contiguous(memory_format=torch.channels_last)


def mark_sizes(pixel_values: Tensor, valid: Tensor | None, words: WordTensors) -> Tensor:
    """Tells the compiler what varies from call to call, and gives the valid pixels, also where all are valid.

    A vocabulary's length varies; and so that images with and without padding share a graph, `valid` is a tensor.
    """
    for tensor in (words.templated, words.class_of_name, words.candidates, words.seen, words.repeats):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    if valid is None:
        batch, _, height, width = pixel_values.shape
        valid = torch.ones(batch, height, width, dtype=torch.bool, device=pixel_values.device)
    return valid


def scatter(parts: list[list], members: list[list[int]]) -> list:
    """Items of groups -> items in the batch's order."""
    placed = {
        index: item
        for part, group in zip(parts, members, strict=True)
        for index, item in zip(group, part, strict=True)
    }
    return [placed[index] for index in sorted(placed)]


def merge_classes(parts: list[Tensor], members: list[list[int]]) -> Tensor:
    """Groups' (b, q, k + 1) -> (B, Q, K + 1), padded with classes that are impossible and queries that are void."""
    if len(parts) == 1:
        return parts[0]
    queries, classes = (max(part.shape[dim] for part in parts) for dim in (1, 2))
    merged = parts[0].new_full((sum(map(len, members)), queries, classes), float("-inf"))
    merged[..., -1] = 0
    for part, group in zip(parts, members, strict=True):
        rows = F.pad(part[..., :-1], (0, classes - part.shape[-1]), value=float("-inf"))
        rows = torch.cat([rows, part[..., -1:]], dim=-1)
        merged[group, : part.shape[1]] = rows
    return merged


def merge_masks(parts: list[Tensor], members: list[list[int]], canvas: tuple[int, int]) -> Tensor:
    """Groups' (b, q, h, w) -> (B, Q, H / 4, W / 4), padded with pixels and queries that are no mask."""
    height, width = canvas[0] // 4, canvas[1] // 4
    if len(parts) == 1 and parts[0].shape[-2:] == (height, width):
        return parts[0]
    queries = max(part.shape[1] for part in parts)
    merged = parts[0].new_full((sum(map(len, members)), queries, height, width), NO_MASK)
    for part, group in zip(parts, members, strict=True):
        merged[group, : part.shape[1], : part.shape[2], : part.shape[3]] = part
    return merged


def remake_masks(
    factors: list[tuple[list[Tensor], Tensor]],
    members: list[list[int]],
    queries: list[Tensor],
    canvas: tuple[int, int],
) -> Tensor:
    """Some of the mask logits that `merge_masks` gives, made anew in float32: only they take part in a gradient.

    Args:
        factors: each group's mask embeddings (b, q, C), one of each of L predictions, and mask features (b, C, h, w).
        queries: of each image int64 (L, m); q and above are those that `merge_masks` added.

    Returns: (L, M, H / 4, W / 4), the images' masks one after the other.
    """
    height, width = canvas[0] // 4, canvas[1] // 4
    masks: dict[int, Tensor] = {}
    for (embeddings, features), group in zip(factors, members, strict=True):
        by_image = torch.stack(embeddings, dim=1).unbind()
        for own, feature, index in zip(by_image, features.unbind(), group, strict=True):
            rows = queries[index].clamp(max=own.shape[1] - 1)[..., None].expand(-1, -1, own.shape[2])
            with torch.autocast(own.device.type, enabled=False):
                logits = torch.einsum("lmc,chw->lmhw", own.gather(1, rows).float(), feature.float())
            added = queries[index] >= own.shape[1]
            logits = logits.masked_fill(added[..., None, None], NO_MASK)
            padding = (0, width - logits.shape[-1], 0, height - logits.shape[-2])
            masks[index] = F.pad(logits, padding, value=NO_MASK)
    return torch.cat([masks[index] for index in sorted(masks)], dim=1)


def check_labels(
    mask_labels: list[Tensor],
    class_labels: list[Tensor],
    sizes: list[tuple[int, int]],
    padded: tuple[int, int],
    num_classes: list[int],
) -> None:
    """Checks ground truth against images and vocabularies.

    Raises:
        ValueError: not as many labels as images, masks of neither the image's own nor the padded size, not as many
            classes as masks, or a class that the vocabulary does not have.
    """
    if not len(mask_labels) == len(class_labels) == len(sizes):
        raise ValueError(
            f"labels for {len(mask_labels)} and {len(class_labels)} images, but there are {len(sizes)}"
        )
    for masks, labels, size in zip(mask_labels, class_labels, sizes, strict=True):
        if masks.ndim != 3 or tuple(masks.shape[-2:]) not in (size, padded):
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


def pad_labels(masks: Tensor, canvas: tuple[int, int]) -> Tensor:
    """Masks (n, H, W) padded to the canvas, so that they and the mask logits cover the same area."""
    return F.pad(masks, (0, canvas[1] - masks.shape[-1], 0, canvas[0] - masks.shape[-2]))
