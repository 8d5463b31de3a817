"""Image processor of ITA: images to network inputs, and the model's outputs to segments.

Preprocessing follows `Mask2FormerImageProcessor`: resize the short side, rescale, normalize with CLIP's color
statistics, pad at the bottom and on the right to a common multiple of 32. Before that, every kind of image (EXIF
orientation, gray, palette, alpha, CMYK, 16 bits) becomes the RGB that a person sees (`image_io`). Post-processing is
in `postprocessing`.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.image_processing_utils import BatchFeature, get_size_dict
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs
from transformers.utils import logging

from .image_io import array_to_rgb, image_to_rgb, read_image, read_label_maps
from .ops import common_size, label_masks, output_size, pad_to, resize_label_map
from .postprocessing import (
    DEFAULT_THRESHOLDS,
    IGNORE_INDEX,
    binary_mask_to_rle,
    check_fractions,
    instance_segments,
    panoptic_segments,
    semantic_map,
    semantic_scores,
    split_outputs,
)

logger = logging.get_logger(__name__)

REDUCED_PIXELS = 2**25  # larger images are first reduced by a whole factor, before they become floats


class ITAImageProcessorKwargs(ImagesKwargs, total=False):
    """Arguments beyond those of every image processor.

    Attributes:
        ignore_index: label of pixels that belong to no mask; None (default): every label makes a mask.
        do_reduce_labels: label 0 is background: it becomes `ignore_index`, and all others are decremented by 1.
        size_divisor: height and width are padded to multiples of this many pixels (32).
    """

    ignore_index: int | None
    do_reduce_labels: bool
    size_divisor: int


class ITAImageProcessor(TorchvisionBackend):
    """Makes the model's inputs from images, and segments from its outputs.

    The arguments are those of `Mask2FormerImageProcessor`; the defaults fit CLIP. Call it with `images` (PIL images,
    arrays, tensors, paths or URLs, of any sizes) to get

    - `pixel_values` (B, 3, H, W) float32 and `pixel_mask` (B, H, W) int64 (1: image, 0: padding), H and W being the
      smallest multiples of `size_divisor` that hold every image; and, with `segmentation_maps`,
    - `mask_labels`, a list of (n, H, W) float32 (0 in the padding), and `class_labels`, a list of (n,) int64.

    Raises:
        ValueError: in one line, if an argument has a wrong type or an impossible value.
    """

    valid_kwargs = ITAImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_mask"]

    resample = PILImageResampling.BILINEAR
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"shortest_edge": 800, "longest_edge": 1333}
    default_to_square = False
    do_resize = True
    do_rescale = True
    do_normalize = True
    rescale_factor = 1 / 255
    size_divisor = 32
    do_reduce_labels = False
    ignore_index = None

    def __init__(self, **kwargs: Any):
        max_size = kwargs.pop("max_size", None)
        size = kwargs.pop("size", None)
        if size is None:
            size = dict(self.size) if max_size is None else {**self.size, "longest_edge": max_size}
        check_settings({**kwargs, "size": size, "max_size": max_size})
        kwargs["size"] = get_size_dict(size, max_size=max_size, default_to_square=False)
        super().__init__(**kwargs)

    def preprocess(  # type: ignore[override]
        self,
        images: Any,
        segmentation_maps: Any | None = None,
        instance_id_to_semantic_id: Sequence[Mapping[int, int]] | Mapping[int, int] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Make network inputs; see the class.

        Args:
            images: one image or a (nested) sequence of images.
            segmentation_maps: a map (H, W) of labels for each image (PIL image, array, tensor or path).
            instance_id_to_semantic_id: class of each label, for all images or for each; by default labels are classes.
            **kwargs: settings that replace the processor's own for this call.

        Raises:
            ValueError: for anything that is no image, maps that do not fit their images, and impossible settings.
        """
        check_settings(kwargs)
        return super().preprocess(images, segmentation_maps, instance_id_to_semantic_id, **kwargs)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Read PIL images, paths, URLs and base64 strings as RGB; arrays and tensors stay. Raises as `read_image`."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(one) for one in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, os.PathLike, Image.Image)):
            return read_image(image_url_or_urls)
        return image_url_or_urls

    def process_image(  # type: ignore[override]
        self,
        image: Any,
        *,
        input_data_format: str | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Convert one image to (3, H, W), RGB, uint8 or float32. Raises ValueError if it is no image."""
        if isinstance(image, Image.Image):
            tensor = torch.from_numpy(np.array(image_to_rgb(image))).permute(2, 0, 1).contiguous()
        else:
            tensor = array_to_rgb(image, input_data_format)
        return tensor if device is None else tensor.to(device)

    def _preprocess_image_like_inputs(  # type: ignore[override]
        self,
        images: Any,
        segmentation_maps: Any | None,
        instance_id_to_semantic_id: Sequence[Mapping[int, int]] | Mapping[int, int] | None,
        *,
        input_data_format: str | None = None,
        device: str | torch.device | None = None,
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        size_divisor: int | None,
        pad_size: SizeDict | None,
        ignore_index: int | None,
        do_reduce_labels: bool,
        return_tensors: str | None,
        **kwargs: Any,
    ) -> BatchFeature:
        sources = _flat_list(self.fetch_images(images))
        if not sources:
            raise ValueError("no images given: the list is empty")
        tensors: list[Tensor] = []
        sizes: list[tuple[int, int]] = []
        for source in sources:
            image, target = source, None
            if do_resize and segmentation_maps is None and isinstance(source, Image.Image):
                target = output_size((source.height, source.width), size)
                image = _reduced(source, target)
            tensor = self.process_image(image, input_data_format=input_data_format, device=device)
            if do_resize and target is None:
                target = output_size(tensor.shape[-2:], size)
            tensors.append(tensor)
            sizes.append(target or (tensor.shape[-2], tensor.shape[-1]))
        if do_rescale and any(tensor.is_floating_point() and tensor.max() <= 1 for tensor in tensors):
            logger.warning_once(
                "a float image of 0..1 is taken as 0..255: pass `do_rescale=False` to keep it"
            )
        maps = read_label_maps(segmentation_maps, tensors)
        if do_resize and maps is not None:
            maps = [resize_label_map(labels, target) for labels, target in zip(maps, sizes, strict=True)]

        padded = common_size(sizes, pad_size, size_divisor or 1)
        pixels, pixel_masks = [], []
        for tensor, (height, width) in zip(tensors, sizes, strict=True):
            resized = tensor
            if do_resize:
                resized = self.resize(tensor, SizeDict(height=height, width=width), resample=resample)
            values = self.rescale_and_normalize(
                resized, do_rescale, rescale_factor, do_normalize, image_mean, image_std
            )
            pixels.append(pad_to(values, padded))
            pixel_masks.append(pad_to(torch.ones_like(values[0], dtype=torch.int64), padded))
        data = {"pixel_values": torch.stack(pixels), "pixel_mask": torch.stack(pixel_masks)}
        features = BatchFeature(data, tensor_type=return_tensors)
        if maps is not None:
            ids = instance_id_to_semantic_id
            ids = ids if isinstance(ids, Sequence) else [ids] * len(maps)  # type: ignore[list-item]
            if len(ids) != len(maps):
                raise ValueError(
                    f"{len(maps)} segmentation maps, but {len(ids)} `instance_id_to_semantic_id`"
                )
            pairs = zip(maps, ids, strict=True)
            labels = [label_masks(one, own, ignore_index, do_reduce_labels) for one, own in pairs]
            features["mask_labels"] = [pad_to(masks, padded) for masks, _ in labels]
            features["class_labels"] = [classes for _, classes in labels]
        return features

    @torch.no_grad()
    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Any | None = None,
        return_segmentation_scores: bool = False,
        threshold: float | None = None,
        num_classes: int | None = None,
        ignore_index: int = IGNORE_INDEX,
    ) -> list[Tensor] | list[SemanticSegmentationPostProcessorOutput]:
        """Find the class of each pixel. By default this is the benchmarks' protocol: every pixel gets a class.

        Args:
            outputs: the model's.
            target_sizes: (height, width) of each image's result; by default the network input's.
            return_segmentation_scores: return the scores of all classes, too, which take much memory.
            threshold: pixels whose best class has a probability below it get `ignore_index`; see `semantic_map`.
            num_classes: classes from this index on are distractors (see `text.with_distractors`), whose pixels
                get `ignore_index`.
            ignore_index: label of pixels that show none of the classes.

        Returns:
            A map (H, W) int64 for each image; or with `return_segmentation_scores` the map as `segmentation` and
            (K, H, W) float32 `segmentation_scores`.

        Raises:
            ValueError: if there are not as many sizes as images, or `ignore_index` is one of the classes.
        """
        check_fractions(threshold=threshold)
        results: list[Any] = []
        for image in split_outputs(outputs, target_sizes):
            options: dict[str, Any] = {
                "threshold": threshold,
                "num_classes": num_classes,
                "ignore_index": ignore_index,
            }
            result: Any = semantic_map(**image.logits_and_sizes, **options)
            if return_segmentation_scores:
                scores = semantic_scores(**image.logits_and_sizes)[:num_classes]
                result = SemanticSegmentationPostProcessorOutput(
                    {"segmentation": result, "segmentation_scores": scores}
                )
            results.append(result)
        return results

    @torch.no_grad()
    def post_process_panoptic_segmentation(
        self,
        outputs: Any,
        threshold: float = DEFAULT_THRESHOLDS["panoptic"],
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        label_ids_to_fuse: set[int] | None = None,
        target_sizes: Any | None = None,
        num_classes: int | None = None,
    ) -> list[dict[str, Any]]:
        """Find segments that do not overlap; see `panoptic_segments`.

        Args:
            outputs: the model's.
            threshold: segments have a score above it. FC-CLIP's protocol has 0.8, `Mask2FormerImageProcessor` 0.5.
            mask_threshold: a query's own pixels have at least this mask probability.
            overlap_mask_area_threshold: lowest share of its own pixels that a segment has to win.
            label_ids_to_fuse: classes that are stuff, whose segments are fused; by default those of the outputs.
            target_sizes: (height, width) of each image's result; by default the network input's.
            num_classes: classes from this index on are distractors, whose segments are dropped.

        Returns:
            For each image `segmentation` (H, W) int32 (ids from 1; 0: no segment) and `segments_info`, a list of
            {"id", "label_id", "was_fused", "score", "label"}.

        Raises:
            ValueError: if there are not as many sizes as images.
        """
        fractions: dict[str, Any] = {
            "threshold": threshold,
            "mask_threshold": mask_threshold,
            "overlap_mask_area_threshold": overlap_mask_area_threshold,
        }
        check_fractions(**fractions)
        results = []
        for image in split_outputs(outputs, target_sizes):
            segmentation, segments = panoptic_segments(
                **image.logits_and_sizes,
                **fractions,
                stuff_ids=image.stuff_ids if label_ids_to_fuse is None else label_ids_to_fuse,
                num_classes=num_classes,
            )
            results.append({"segmentation": segmentation, "segments_info": image.labeled(segments)})
        return results

    @torch.no_grad()
    def post_process_instance_segmentation(
        self,
        outputs: Any,
        threshold: float = DEFAULT_THRESHOLDS["instance"],
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        target_sizes: Any | None = None,
        return_coco_annotation: bool = False,
        return_binary_maps: bool = False,
        label_ids_to_fuse: set[int] | None = None,
        num_classes: int | None = None,
    ) -> list[dict[str, Any]]:
        """Find instances of things, which may overlap, best first; see `instance_segments`.

        Args:
            outputs: the model's.
            threshold: lowest score of an instance. Benchmarks of average precision take 0.
            mask_threshold: an instance's pixels have a mask probability above it.
            overlap_mask_area_threshold: without effect, as in `Mask2FormerImageProcessor`.
            target_sizes: (height, width) of each image's result; by default the network input's.
            return_coco_annotation: return run-length encodings of the masks, in the order of `segments_info`.
            return_binary_maps: return a mask for each instance, (n, H, W) bool.
            label_ids_to_fuse: classes that are stuff, which have no instances; by default those of the outputs.
            num_classes: classes from this index on are distractors, whose instances are left out.

        Returns:
            For each image `segmentation` (H, W) int32 (ids from 1; 0: none; the better of two instances hides the
            other), or the form asked for, and `segments_info` as for panoptic segmentation.

        Raises:
            ValueError: if there are not as many sizes as images, or both forms are asked for.
        """
        if return_coco_annotation and return_binary_maps:
            raise ValueError("return_coco_annotation and return_binary_maps can not be both set to True.")
        check_fractions(
            threshold=threshold,
            mask_threshold=mask_threshold,
            overlap_mask_area_threshold=overlap_mask_area_threshold,
        )
        results = []
        for image in split_outputs(outputs, target_sizes):
            segmentation: Any
            segmentation, segments = instance_segments(
                **image.logits_and_sizes,
                threshold=threshold,
                mask_threshold=mask_threshold,
                stuff_ids=image.stuff_ids if label_ids_to_fuse is None else label_ids_to_fuse,
                num_classes=num_classes,
                binary_maps=return_binary_maps or return_coco_annotation,
            )
            if return_coco_annotation:
                segmentation = [binary_mask_to_rle(mask) for mask in segmentation]
            results.append({"segmentation": segmentation, "segments_info": image.labeled(segments)})
        return results


# --- images and settings ---------------------------------------------------------------------------------------


def _flat_list(images: Any) -> list[Any]:
    """Flatten one image, a (nested) sequence of them or a stacked batch. Raises ValueError for anything else."""
    if isinstance(images, (list, tuple)):
        return [one for image in images for one in _flat_list(image)]
    if isinstance(images, (str, os.PathLike, Image.Image)):
        return [images]
    if isinstance(images, (np.ndarray, Tensor)):
        return list(images) if images.ndim == 4 else [images]
    raise ValueError(f"an image is a PIL image, an array, a tensor or a path, got {type(images).__name__}")


def _reduced(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    """Reduce an image of more than `REDUCED_PIXELS` by a whole factor, to no less than twice the `target`."""
    factor = min(image.height // (2 * target[0]), image.width // (2 * target[1]))
    if image.width * image.height <= REDUCED_PIXELS or factor < 2:
        return image
    return image.reduce(factor)


MIN_SIZE, MAX_SIZE = 4, 16_384  # of `size` and `pad_size`
SIZE_KEYS = (
    {"shortest_edge", "longest_edge"},
    {"shortest_edge"},
    {"longest_edge"},
    {"height", "width"},
    {"max_height", "max_width"},
)


def _is_number(value: Any, least: float, most: float) -> bool:
    kinds = (int, float, np.integer, np.floating)
    return isinstance(value, kinds) and not isinstance(value, bool) and bool(least <= value <= most)


def _is_integer(value: Any, least: int = MIN_SIZE, most: int = MAX_SIZE) -> bool:
    return isinstance(value, (int, np.integer)) and _is_number(value, least, most)


def _is_size(value: Any) -> bool:
    if isinstance(value, (SizeDict, Mapping)):
        sides = {key: side for key, side in dict(value).items() if side is not None}
        return set(sides) in SIZE_KEYS and all(map(_is_integer, sides.values()))
    if isinstance(value, (list, tuple)):
        return len(value) == 2 and all(map(_is_integer, value))
    return _is_integer(value)


def _is_color(value: Any, least: float) -> bool:
    values = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
    return len(values) in (1, 3) and all(_is_number(one, least, 1e6) for one in values)


SETTINGS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (
        ("do_resize", "do_rescale", "do_normalize", "do_reduce_labels", "default_to_square"),
        lambda value: isinstance(value, bool),
        "true or false",
    ),
    (
        ("size", "pad_size"),
        _is_size,
        "an integer, {height, width}, {shortest_edge, longest_edge} or {max_height, max_width} "
        f"of {MIN_SIZE}..{MAX_SIZE}",
    ),
    (("max_size",), _is_integer, f"an integer of {MIN_SIZE}..{MAX_SIZE}"),
    (("size_divisor",), lambda value: _is_integer(value, 1, 1024), "an integer of 1..1024"),
    (
        ("resample",),
        lambda value: isinstance(value, InterpolationMode) or _is_integer(value, 0, 5),
        "one of Pillow's resampling filters, 0..5",
    ),
    (("rescale_factor",), lambda value: _is_number(value, 1e-6, 1e6), "a number of 0.000001..1000000"),
    (("image_mean",), lambda value: _is_color(value, -1e6), "1 or 3 numbers"),
    (("image_std",), lambda value: _is_color(value, 1e-6), "1 or 3 positive numbers"),
    (("ignore_index",), lambda value: _is_integer(value, -(2**31), 2**31), "an integer"),
)
"""Names of settings, what tells whether a value is possible, and what to say if it is not."""


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check the arguments of a processor, whether they come from a call or from `preprocessor_config.json`.

    Args:
        settings: values by name; None and unknown names are ignored.

    Raises:
        ValueError: in one line that names the first one with a wrong type or an impossible value.
    """
    for names, fits, expected in SETTINGS:
        for name in names:
            value = settings.get(name)
            if value is not None and not fits(value):
                shown = ascii(value)
                shown = shown if len(shown) <= 100 else f"{shown[:99]}…"
                raise ValueError(f"image processor: {name} is {expected}, got {shown}")


ITAImageProcessor.register_for_auto_class()
