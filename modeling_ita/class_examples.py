"""Classes given by examples: regions of images instead of a class's names or beside them.

CLIP embeds a region of an image, the dense feature pooled over a mask, in the space of names. (Ours; the paper has
names alone.) But images and names lie apart there (the modality gap, Liang et al., arXiv 2203.02053), and images are
much nearer to each other than to names. An example is therefore the direction in which its region differs from the
rest of its image, and the mean direction of a class's examples, at a length that gives the logits of a name, is added
to the mean of the vocabulary's text embeddings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .batching import PADDED_MASK_LOGIT, check_images, crop, padded_size, valid_pixels
from .classification import HardMaskPooling, MaskClassifier
from .clip_backbone import ClipBackbone
from .configuration_ita import check_number
from .image_io import printable, read_image, read_label_map
from .ops import IMAGE_STRIDE, MASK_STRIDE, pad_to
from .text import TextEmbeddings, Vocabulary, VocabularyKey, normal_form

NAME_WORTH = 4
"""Names count as much as so many examples: n examples have the weight n / (n + 4), unless a call says otherwise."""
EXAMPLE_LOGIT = 13.0
"""Logit of an embedding that points where the examples do, above the mean of the vocabulary's. Found on Scenes."""


@dataclass
class ClassExamples:
    """Examples of some of the classes.

    Attributes:
        rows: class name in normal form -> (D,), the unit mean of its examples.
        weights: of the examples beside the names, 0..1, in the same order.
    """

    rows: dict[str, Tensor]
    weights: dict[str, float]

    def add_to(self, text: TextEmbeddings, vocabulary: VocabularyKey, scale: Tensor) -> TextEmbeddings:
        """Mix examples into the embeddings of a vocabulary's names; their classes count as unseen.

        Examples of other classes are ignored.
        """
        class_of = Vocabulary(vocabulary).class_of_normal_form
        own_rows = {name: row for name, row in self.rows.items() if name in class_of and self.weights[name]}
        if not own_rows:
            return text
        rows = {class_of[name]: (row, self.weights[name]) for name, row in own_rows.items()}
        given = {normal_form(name) for index in rows for name in vocabulary[index]}
        candidates = list(map(normal_form, Vocabulary(vocabulary).candidate_names))
        device, is_seen = text.is_seen.device, text.is_seen.clone()
        prompts, names = text.prompt_embeds.clone(), text.name_embeds.clone()
        has_example = torch.isin(text.class_of_name, torch.tensor(list(rows), device=device))
        prompt_mean = _mean_of_others(prompts, has_example)
        name_mean = _mean_of_others(names, torch.tensor([one in given for one in candidates], device=device))
        for index, (row, weight) in rows.items():
            offset = EXAMPLE_LOGIT / scale * row.to(prompts)
            _mix(prompts, text.class_of_name == index, prompt_mean + offset, weight)
            own = set(map(normal_form, vocabulary[index]))
            is_own = torch.tensor([one in own for one in candidates], device=device)
            _mix(names, is_own, name_mean + offset, weight)
            is_seen[index] = False
        return replace(text, prompt_embeds=prompts, name_embeds=names, is_seen=is_seen)


def _mix(embeds: Tensor, is_own: Tensor, example: Tensor, weight: float) -> None:
    embeds[is_own] = weight * example + (1 - weight) * embeds[is_own]


def _mean_of_others(embeds: Tensor, has_example: Tensor) -> Tensor:
    """Average the embeddings of names without examples; of all where there are none."""
    return embeds[has_example.all() | ~has_example].mean(dim=0)


def check_examples(
    examples: Mapping[str, Tensor] | None,
    weight: float | None,
    vocabularies: Sequence[VocabularyKey],
    embed_dim: int,
) -> ClassExamples | None:
    """Check the examples and their weight, as `forward` takes them, and average those of each class.

    Args:
        examples: class name -> (n, D).
        weight: 0..1.
        vocabularies: of the images. A name has to be in one of them.
        embed_dim: D.

    Raises:
        ValueError: not such a mapping, a name that is in no vocabulary, a class with examples under two of its names,
            embeddings of another shape, or a weight that is not from 0 to 1.
    """
    if weight is not None:
        check_number("example_weight", weight, 0, 1)
    if examples is None:
        return None
    if not isinstance(examples, Mapping):
        raise ValueError(f"examples= maps names of classes to embeddings, got {type(examples).__name__}")
    for name, embeds in examples.items():
        shape: Any = tuple(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
        if not isinstance(embeds, Tensor) or shape[1:] != (embed_dim,) or not shape[0]:
            raise ValueError(
                f"examples of {name!r:.100} are embeddings (n, {embed_dim}) of encode_examples, got {shape}"
            )
    check_example_names(examples, vocabularies)
    shown = ClassExamples({}, {})
    for name, embeds in examples.items():
        shown.rows[normal_form(name)] = F.normalize(embeds.float().mean(dim=0), dim=-1)
        own_weight = len(embeds) / (len(embeds) + NAME_WORTH) if weight is None else weight
        shown.weights[normal_form(name)] = own_weight
    return shown


def check_example_names(
    names: Sequence[str] | Mapping[str, Any], vocabularies: Sequence[VocabularyKey]
) -> None:
    """Check that each class with examples is in one of the vocabularies, under one name; else raise ValueError."""
    tables = [Vocabulary(vocabulary).class_of_normal_form for vocabulary in dict.fromkeys(vocabularies)]
    for table in tables:
        owners: dict[int, str] = {}
        for name in names:
            index = table.get(normal_form(name)) if isinstance(name, str) else None
            if index is not None and owners.setdefault(index, name) != name:
                raise ValueError(
                    f"one class has examples under two names, {owners[index]!r:.100} and {name!r:.100}: "
                    "give all of them under one"
                )
    for name in names:
        if not isinstance(name, str) or not any(normal_form(name) in table for table in tables):
            raise ValueError(f"examples are given for {name!r:.100}, which is not among the classes")


class ExamplesMixin:
    """`encode_examples` of a model that has CLIP and classifies masks by it."""

    config: Any
    clip_backbone: ClipBackbone
    mask_classifier: MaskClassifier

    @torch.no_grad()
    def encode_examples(
        self, pixel_values: Tensor, mask_labels: Sequence[Tensor], pixel_mask: Tensor | None = None
    ) -> list[Tensor]:
        """Embed regions of images as examples of classes, for `examples=` of a call.

        Regions are pooled like the masks that the network predicts. A region that covers half of no cell of the pooled
        feature has the cell of which it covers most.

        Args:
            pixel_values: (B, 3, H, W) float, normalized RGB, padded at the bottom and on the right.
            mask_labels: for each image (n, H, W), its n regions: 1 inside, 0 outside, or shares of pixels between.
            pixel_mask: (B, H, W), 1 for pixels and 0 for padding; None if nothing is padded.

        Returns:
            For each image (n, D) float32, a unit row for each region.

        Raises:
            ValueError: images as for `forward`, not as many masks as images, masks of another size, or an empty mask.
        """
        sizes = check_images(pixel_values, pixel_mask)
        masks = _check_regions(mask_labels, sizes, pixel_values.shape[-2:])
        rows = []
        for image, regions, size in zip(pixel_values, masks, sizes, strict=True):
            padded = padded_size(size)
            valid = valid_pixels([size], padded, image.device)
            filled = pad_to(regions, padded).to(image.device)
            rows.append(self._embed_regions(crop(image[None], padded, valid), filled, valid))
        return rows

    def _embed_regions(self, pixel_values: Tensor, regions: Tensor, valid: Tensor | None) -> Tensor:
        """Embed regions (n, H, W) of one image (1, 3, H, W): (n, D)."""
        clip, classifier = self.clip_backbone, self.mask_classifier
        valid = valid if self.config.mask_padding else None
        dense = clip(pixel_values).dense
        height, width = dense.shape[-2:]
        pooling = classifier.pooling
        factor = pooling.upsample if isinstance(pooling, HardMaskPooling) else IMAGE_STRIDE // MASK_STRIDE
        logits = _mask_logits(F.adaptive_avg_pool2d(regions, (factor * height, factor * width)))
        cell_embeds = classifier.embed_cells(clip, dense) if classifier.needs_cell_embeds else None
        surely_shown = dense.new_tensor([0.0, float("-inf")]).expand(1, len(regions), 2)
        embeds, _ = pooling(dense, cell_embeds, logits[None].to(dense), valid, surely_shown, clip=clip)
        # What the rest of the image has in common with the region says nothing of the class.
        cells, is_valid = clip.embed_cells(dense, valid)
        outside = (1 - F.adaptive_avg_pool2d(regions, (height, width)).flatten(1)) * is_valid
        rest = outside @ F.normalize(cells[0].float(), dim=-1) / is_valid.sum()
        return F.normalize(F.normalize(embeds[0].float(), dim=-1) - rest, dim=-1)


def _mask_logits(coverage: Tensor) -> Tensor:
    """Make mask logits (n, h, w) of the shares of cells that regions cover; every mask has a cell."""
    most = coverage.flatten(1).amax(dim=1)[:, None, None]
    covered = (coverage > 0.5) | ((most <= 0.5) & (coverage >= most))
    return torch.where(covered, -PADDED_MASK_LOGIT, PADDED_MASK_LOGIT)


def _check_regions(
    mask_labels: Sequence[Tensor], sizes: Sequence[tuple[int, int]], padded: Sequence[int]
) -> list[Tensor]:
    """Check the regions of images, and cut padding off: (n, h, w) float of each."""
    if len(mask_labels) != len(sizes):
        raise ValueError(f"masks for {len(mask_labels)} images, but there are {len(sizes)}")
    regions = []
    for index, (masks, size) in enumerate(zip(mask_labels, sizes, strict=True)):
        if masks.ndim != 3 or tuple(masks.shape[-2:]) not in (tuple(size), tuple(padded)):
            raise ValueError(
                f"mask_labels of image {index} must be (n, {size[0]}, {size[1]}), got {tuple(masks.shape)}"
            )
        own = masks[:, : size[0], : size[1]].float().clamp(0, 1)
        if not bool(own.flatten(1).any(dim=1).all()):
            raise ValueError(f"mask_labels of image {index} have a mask without a pixel")
        regions.append(own)
    return regions


# --- examples in images' own pixels ---


def encode_class_examples(
    model: Any,
    processor: Any,
    examples: Mapping[str, Sequence[tuple[Any, Any]]],
    timeout: float | None = None,
    allow_private_addresses: bool = True,
) -> dict[str, Tensor]:
    """Embed examples of classes, given as images with a mask or box each.

    Args:
        model: `ITAForOpenVocabSegmentation`.
        processor: its image processor.
        examples: for each class name a list of pairs: an image, as `read_image` takes it, and a mask or box in the
            pixels of the image as a person sees it (upright). See `region_of_image`.
        timeout: seconds that fetching an image may take in all.
        allow_private_addresses: whether a URL may lead to this machine or its network.

    Returns:
        Class name -> (n, D), for `examples=` of a call.

    Raises:
        ValueError: examples of another form, or an image or region that cannot be used; the message says which.
    """
    if not isinstance(examples, Mapping):
        raise ValueError(f"examples map names of classes to lists of pairs, got {type(examples).__name__}")
    rows = {}
    for name, pairs in examples.items():
        if isinstance(pairs, str | bytes | Mapping) or not isinstance(pairs, Sequence) or not len(pairs):
            raise ValueError(
                f"examples of {name!r:.100} are a list of (image, mask or box), got {pairs!r:.100}"
            )
        embeds = []
        for number, pair in enumerate(pairs, start=1):
            try:
                if not isinstance(pair, list | tuple) or len(pair) != 2:
                    raise ValueError(f"it is (image, mask or box), got {pair!r:.100}")
                image = read_image(pair[0], timeout, allow_private_addresses)
                embeds += _encode_region(model, processor, image, region_of_image(pair[1], image.size))
            except (TypeError, ValueError) as error:
                raise ValueError(f"example {number} of {name!r:.100}: {error}") from error
        rows[name] = torch.cat(embeds)
    return rows


def _encode_region(model: Any, processor: Any, image: Image.Image, region: Tensor) -> list[Tensor]:
    inputs = processor(images=[image], return_tensors="pt").to(model.device, model.dtype)
    [size] = check_images(inputs["pixel_values"].cpu(), inputs["pixel_mask"].cpu())
    # Shares of pixels: what is smaller than a pixel of the network's input is not lost.
    mask = F.interpolate(region[None, None], size=size, mode="area")[0]
    return model.encode_examples(inputs["pixel_values"], [mask], inputs["pixel_mask"])


def region_of_image(region: Any, size: tuple[int, int]) -> Tensor:
    """Make a mask (H, W) float, 1 inside, of a mask or box.

    Args:
        region: a mask of the image's size, whose pixels that are not 0 are inside (PIL image, array or tensor), or a
            box of four numbers (left, top, right, bottom) in pixels, right and bottom exclusive.
        size: (width, height) of the image.

    Raises:
        ValueError: neither a mask nor a box, an empty mask or one of another size, or a box that is empty or not
            inside the image.
    """
    width, height = size
    if isinstance(region, np.ndarray | Tensor) and region.ndim == 1:
        region = region.tolist()
    if isinstance(region, list | tuple) and len(region) == 4 and not isinstance(region[0], list | tuple):
        left, top, right, bottom = _check_box(region, width, height)
        mask = torch.zeros(height, width)
        mask[int(top) : -int(-bottom // 1), int(left) : -int(-right // 1)] = 1
        return mask
    if not isinstance(region, Image.Image | np.ndarray | Tensor):
        raise ValueError(
            f"a mask is an image or array, a box is (left, top, right, bottom), got {_shown(region)}"
        )
    mask = (read_label_map(region) != 0).float()
    if mask.shape != (height, width):
        raise ValueError(
            f"the mask is {mask.shape[1]} x {mask.shape[0]} pixels, but the image is {width} x {height}"
        )
    if not bool(mask.any()):
        raise ValueError("the mask is empty")
    return mask


def _check_box(box: Sequence[Any], width: int, height: int) -> tuple[float, float, float, float]:
    numbers = [isinstance(one, int | float) and not isinstance(one, bool) for one in box]
    shown = f"the box {_shown(list(box))}"
    if not all(numbers):
        raise ValueError(f"{shown} is not four numbers")
    left, top, right, bottom = map(float, box)
    if not (0 <= left <= right <= width and 0 <= top <= bottom <= height):
        raise ValueError(f"{shown} is not inside the image of {width} x {height} pixels")
    if left == right or top == bottom:
        raise ValueError(f"{shown} is empty")
    return left, top, right, bottom


def _shown(value: Any) -> str:
    return printable(f"{value!r:.100}")
