"""Pipelines that segment by given class names: `candidate_labels=["cat", "sofa|couch"]`.

"image-segmentation" is transformers' `ImageSegmentationPipeline` beside that: without candidate labels the
checkpoint's own vocabulary is segmented. "zero-shot-image-segmentation" requires them, at each call or once. A
checkpoint carries this file, so `pipeline("image-segmentation", model=path, trust_remote_code=True)` finds it; where
the package is imported, its own classes serve ITA models in both tasks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import ImageSegmentationPipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator

from .class_examples import encode_class_examples
from .image_io import read_image
from .ops import pad_to
from .postprocessing import DEFAULT_THRESHOLDS
from .text import normal_form, normalize_vocabulary, parse_classes, with_distractors
from .tiled_segmentation import TiledResult, segment_tiles
from .tiling import Tiling, tiling_of

NO_CLASS = -1
"""Label of pixels without a class in semantic maps of any number of classes."""
SEGMENT_THRESHOLD = 0.9  # as in `ImageSegmentationPipeline`


def parse_candidate_labels(candidate_labels: str | Iterable[str | Sequence[str]]) -> list[list[str]]:
    """Read classes as a user types them.

    Args:
        candidate_labels: one string "cat, sofa|couch", or a list whose items are names, "sofa|couch" or lists of names.

    Returns:
        A list of classes, each a list of synonyms.

    Raises:
        ValueError: if there is no class, an empty name, or something that is no name.
    """
    try:
        if isinstance(candidate_labels, str):
            return parse_classes(candidate_labels)
        if not isinstance(candidate_labels, Iterable) or isinstance(candidate_labels, Mapping):
            raise ValueError(f"a text or a list of names, got {candidate_labels!r}")
        return normalize_vocabulary(
            label.split("|") if isinstance(label, str) else label for label in candidate_labels
        )
    except ValueError as error:
        raise ValueError(f"candidate_labels: {error}") from error


def collate_images(items: Sequence[Any]) -> dict[str, Any]:
    """Batch the inputs of single images, padded at the bottom and on the right to a common size.

    Args:
        items: each {"pixel_values" (1, 3, h, w), "pixel_mask" (1, h, w), "target_size" [(height, width)]}.
    """
    height, width = (max(item["pixel_values"].shape[axis] for item in items) for axis in (-2, -1))
    batch: dict[str, Any] = {
        key: torch.cat([pad_to(item[key], (height, width)) for item in items])
        for key in ("pixel_values", "pixel_mask")
    }
    return batch | {"target_size": [item["target_size"] for item in items]}


INHERITED_PARAMETERS = {"subtask", "threshold", "mask_threshold", "overlap_mask_area_threshold", "timeout"}
"""Parameters of transformers' own image segmentation pipeline."""
MODEL_OPTIONS = ("vocabulary", "examples", "example_weight")
"""What `forward` adds to the inputs of the model."""


class ITAImageSegmentationPipeline(ImageSegmentationPipeline):
    """Masks of the things and stuff that `candidate_labels` name, or of the checkpoint's own classes.

    The results are those of `ImageSegmentationPipeline`: for each image a list of {"score", "label", "mask"}. A label
    is the first name of its class. An image is segmented as a person sees it: upright, transparency over white.

    An image is a PIL image, a path, a URL, base64 text or the bytes of a file (see `image_io.read_image`). A list gives
    a list; a generator or a `KeyDataset` of a `datasets` column gives an iterator that works as it is read. Of any
    sizes, `batch_size` images go through the network together.

    What shows none of the candidate labels is left out: where they are fewer than the checkpoint's own classes, those
    compete as distractors (see `text.with_distractors`), and pixels or segments with a score below `threshold`
    are dropped. With `threshold=0` and `distractors=False` every pixel gets a class in the subtask "semantic", which
    is the benchmarks' protocol.

    Args:
        candidate_labels: see `parse_candidate_labels`; like all the following at construction, at a call, or both.
        stuff_labels: those of the candidate labels (any of their names) that are stuff: their segments are fused, and
            they have no instances. By default the checkpoint's configuration says what is stuff.
        distractors: whether classes of the checkpoint compete with the candidate labels. Set it to False for names of
            whole groups, such as "animal", where the checkpoint knows dogs and cats.
        examples: for names of classes a list of (image, mask or box) that show them, in the images' own pixels; see
            `class_examples.region_of_image`. They are encoded once, at the call or at construction.
        example_weight: of a class's n examples beside its names, 0 to 1 (n / (n + 4)); at 1 the names say nothing.
        subtask: "panoptic" (default), "instance" or "semantic".
        threshold: lowest score of a segment, or of a pixel for "semantic", where the score is the probability of its
            class. By default 0.5 for "semantic", and 0.9, as in transformers, for the others.
        mask_threshold: as for `ImageSegmentationPipeline`.
        overlap_mask_area_threshold: as for `ImageSegmentationPipeline`.
        tiles: side in pixels of the tiles that larger images are cut into. The network sees each tile by itself, at the
            size that the image processor gives it; the results are merged across the borders.
        tile_overlap: pixels that neighboring tiles share, by default a quarter of `tiles`. Objects up to this size
            are whole in some tile.
        tiles_at_once: tiles that go through the network together (1).
        timeout: seconds that fetching an image may take in all (30).
        allow_private_addresses: whether URLs may lead to this machine or its network.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # transformers replaces the names of Auto classes in the configuration by classes, which cannot be saved.
        for task in getattr(self.model.config, "custom_pipelines", {}).values():
            task["pt"] = [getattr(one, "__name__", one) for one in task.get("pt", ())]

    def check_model_type(self, supported_models: list[str] | dict) -> None:
        """Accept every model: only models that this pipeline serves get here."""

    def _sanitize_parameters(  # type: ignore[override]
        self,
        candidate_labels: str | Iterable[str | Sequence[str]] | None = None,
        stuff_labels: str | Iterable[str] | None = None,
        distractors: bool | None = None,
        allow_private_addresses: bool | None = None,
        examples: Mapping[str, Sequence[tuple[Any, Any]]] | None = None,
        example_weight: float | None = None,
        tiles: int | None = None,
        tile_overlap: int | None = None,
        tiles_at_once: int | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        unknown = sorted(set(kwargs) - INHERITED_PARAMETERS)
        if unknown:
            raise TypeError(f"the pipeline has no parameter {', '.join(map(repr, unknown))}")
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if candidate_labels is not None:
            forward["classes"] = postprocess["classes"] = parse_candidate_labels(candidate_labels)
        if stuff_labels is not None:
            stuff_labels = stuff_labels.split(",") if isinstance(stuff_labels, str) else stuff_labels
            postprocess["stuff_labels"] = list(stuff_labels)
        if distractors is not None:
            forward["distractors"] = distractors
        if examples is not None:
            given = {"timeout": kwargs.get("timeout"), "allow_private_addresses": allow_private_addresses}
            forward["examples"] = self._encode_examples(examples, given)
        if example_weight is not None:
            forward["example_weight"] = example_weight
        if allow_private_addresses is not None:
            preprocess["allow_private_addresses"] = allow_private_addresses
        tiling = tiling_of(tiles, tile_overlap)
        if tiling is not None:
            preprocess["keep_image"] = True
            postprocess["tiling"] = tiling
        if tiles_at_once is not None:
            if tiles_at_once < 1:
                raise ValueError(f"tiles_at_once is at least 1, got {tiles_at_once}")
            postprocess["tiles_at_once"] = tiles_at_once
        return preprocess, forward, postprocess

    def get_iterator(  # type: ignore[override]
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Any:
        """As the base class's, with batches of images of any sizes; images in tiles come one by one."""
        batch_size = 1 if "tiling" in postprocess_params else batch_size
        if batch_size == 1:
            return super().get_iterator(
                inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params
            )
        sized = hasattr(inputs, "__len__")
        kind = PipelineDataset if sized else PipelineIterator
        loader = DataLoader(
            kind(inputs, self.preprocess, preprocess_params),
            num_workers=num_workers if sized else min(num_workers, 1),
            batch_size=batch_size,
            collate_fn=collate_images,
        )
        outputs = PipelineIterator(loader, self.forward, forward_params, loader_batch_size=batch_size)
        return PipelineIterator(outputs, self.postprocess, postprocess_params)

    def preprocess(  # type: ignore[override]
        self,
        image: Any,
        subtask: str | None = None,
        timeout: float | None = None,
        allow_private_addresses: bool = True,
        keep_image: bool = False,
    ) -> Any:
        """Read an image and make the model's inputs and `target_size` of it, or keep it. Raises as `read_image`."""
        pil_image = read_image(image, timeout, allow_private_addresses)
        if keep_image:
            return {"image": pil_image}
        inputs = self._inputs_of([pil_image])
        inputs["target_size"] = [(pil_image.height, pil_image.width)]
        return inputs

    def _inputs_of(self, images: list[Image.Image]) -> Any:
        processor: Any = self.image_processor
        return processor(images=images, return_tensors="pt").to(self.dtype)

    def _encode_examples(self, examples: Any, given: dict[str, Any]) -> dict[str, Tensor]:
        """Encode examples, and fetch their images as the call says or else the construction."""
        earlier = getattr(self, "_preprocess_params", {})
        fetching = {name: earlier[name] for name in given if name in earlier}
        fetching.update({name: value for name, value in given.items() if value is not None})
        with self.device_placement(), torch.inference_mode():
            try:
                return encode_class_examples(self.model, self.image_processor, examples, **fetching)
            except ValueError as error:
                raise ValueError(f"examples: {error}") from error

    def _forward(  # type: ignore[override]
        self,
        model_inputs: Any,
        classes: list[list[str]] | None = None,
        distractors: bool = True,
        **options: Any,
    ) -> Any:
        model_inputs.update(options)
        if classes is not None:
            model: Any = self.model
            if distractors:
                own, trained = model.default_vocabulary, model.config.train_vocabulary
                classes, _ = with_distractors(classes, own, trained)
            model_inputs["vocabulary"] = classes
        return model_inputs if "image" in model_inputs else super()._forward(model_inputs)

    def postprocess(  # type: ignore[override]
        self,
        model_outputs: Any,
        classes: list[list[str]] | None = None,
        stuff_labels: Sequence[str] | None = None,
        subtask: str | None = None,
        threshold: float | None = None,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.5,
        tiling: Tiling | None = None,
        tiles_at_once: int = 1,
    ) -> list[dict[str, Any]]:
        """Turn one image's outputs into segments.

        Args:
            model_outputs: of `forward`.
            classes: the candidate labels; None for the checkpoint's own classes.
            stuff_labels: as for the class, like all that follow.
            subtask: "panoptic", "instance" or "semantic".
            threshold: lowest score.
            mask_threshold: as for the class.
            overlap_mask_area_threshold: as for the class.
            tiling: how the image is cut into tiles; None where it went through the network in `forward`.
            tiles_at_once: as for the class.

        Returns:
            A list of {"score" (None for "semantic"), "label", "mask" (an "L" image of 0 and 255)}.

        Raises:
            ValueError: for an unknown subtask, and stuff labels that are no candidate labels.
        """
        if subtask not in (*DEFAULT_THRESHOLDS, None):
            raise ValueError(f"subtask is one of {list(DEFAULT_THRESHOLDS)}, got {subtask!r}")
        model, processor = cast(Any, self.model), cast(Any, self.image_processor)
        names: Any = model.config.id2label if classes is None else [synonyms[0] for synonyms in classes]
        if threshold is None:
            threshold = DEFAULT_THRESHOLDS["semantic"] if subtask == "semantic" else SEGMENT_THRESHOLD
        num_classes = None if classes is None else len(classes)
        options: dict[str, Any] = {"threshold": threshold, "num_classes": num_classes}
        if subtask == "semantic":
            options["ignore_index"] = NO_CLASS
        else:
            options["mask_threshold"] = mask_threshold
            options["overlap_mask_area_threshold"] = overlap_mask_area_threshold
            if stuff_labels is not None:
                options["label_ids_to_fuse"] = _indices(stuff_labels, classes or model.default_vocabulary)
        if tiling is not None:
            segments, masks = self._segment_tiles(
                model_outputs, tiling, subtask or "panoptic", tiles_at_once, options
            )
        else:
            options["target_sizes"] = model_outputs["target_size"]
            if subtask == "semantic":
                [labels] = processor.post_process_semantic_segmentation(model_outputs, **options)
                segments, masks = _semantic_segments(labels)
            elif subtask == "instance":
                [result] = processor.post_process_instance_segmentation(
                    model_outputs, return_binary_maps=True, **options
                )
                segments, masks = result["segments_info"], result["segmentation"]
            else:
                [result] = processor.post_process_panoptic_segmentation(model_outputs, **options)
                segments, masks = result["segments_info"], _masks_of_ids(result)
        return [
            {"score": segment["score"], "label": names[segment["label_id"]], "mask": _mask_image(mask)}
            for segment, mask in zip(segments, masks, strict=True)
        ]

    def _segment_tiles(
        self, inputs: Any, tiling: Tiling, task: str, tiles_at_once: int, options: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], Iterable[Tensor]]:
        """Segment the image that `forward` left as it is; gives segments, and their masks one by one."""
        call = {name: inputs[name] for name in MODEL_OPTIONS if name in inputs}

        def run(tiles: list[Image.Image]) -> Any:
            return self.model(**self._inputs_of(tiles).to(self.device), **call)

        with self.device_placement(), torch.inference_mode():
            result = segment_tiles(run, inputs["image"], tiling, task, at_once=tiles_at_once, **options)
        if task == "semantic":
            return _semantic_segments(result.segmentation)
        if task == "instance":
            return result.segments_info, _masks_of_boxes(result)
        return result.segments_info, _masks_of_ids(vars(result))


def _semantic_segments(labels: Tensor) -> tuple[list[dict[str, Any]], Iterable[Tensor]]:
    """List the classes of a map (H, W) as segments without scores, and give their masks one by one."""
    # Counted, because `unique` sorts all pixels and takes several times their memory.
    present = (labels - NO_CLASS).flatten().bincount()[1:].nonzero().flatten().tolist()
    return [{"score": None, "label_id": label} for label in present], (labels == label for label in present)


def _masks_of_ids(result: Mapping[str, Any]) -> Iterable[Tensor]:
    """Give the masks of panoptic segments one by one."""
    return (result["segmentation"] == segment["id"] for segment in result["segments_info"])


def _masks_of_boxes(result: TiledResult) -> Iterator[Tensor]:
    """Give the masks of instances that were found in tiles one by one."""
    for (top, left, bottom, right), mask in result.masks or ():
        whole = torch.zeros(result.segmentation.shape, dtype=torch.bool)
        whole[top:bottom, left:right] = torch.from_numpy(mask)
        yield whole


def _mask_image(mask: Tensor) -> Image.Image:
    """Make an "L" image of 0 and 255 of a mask (H, W) bool, whose memory the image takes over."""
    return Image.fromarray(mask.view(torch.uint8).mul_(255).numpy())


def _indices(names: Sequence[str], classes: Sequence[Sequence[str]]) -> set[int]:
    """Give the indices of the classes that have one of the names. Raises ValueError for a name that none has."""
    index_of = {normal_form(name): index for index, synonyms in enumerate(classes) for name in synonyms}
    unknown = [name for name in names if not isinstance(name, str) or normal_form(name) not in index_of]
    if unknown:
        raise ValueError(f"stuff_labels are among the candidate labels, got {unknown[0]!r}")
    return {index_of[normal_form(name)] for name in names}


class ITAZeroShotImageSegmentationPipeline(ITAImageSegmentationPipeline):
    """The same, with candidate labels only: a call without them, at it or at construction, raises ValueError."""

    def _forward(  # type: ignore[override]
        self, model_inputs: Any, classes: list[list[str]] | None = None, **options: Any
    ) -> Any:
        if classes is None:
            raise ValueError(
                'zero-shot-image-segmentation needs candidate_labels, such as candidate_labels=["cat", "sofa|couch"]'
            )
        return super()._forward(model_inputs, classes, **options)
