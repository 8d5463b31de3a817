"""Segment batches of images with one checkpoint, vocabulary and task."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.prediction.segments import Segment, areas_and_boxes, as_array, iterate_segments
from ita_segmentation.visualization import resize_labels
from modeling_ita.ops import MASK_STRIDE
from modeling_ita.pipeline_ita import NO_CLASS
from modeling_ita.postprocessing import DEFAULT_THRESHOLDS
from modeling_ita.text import normal_form, normalize_vocabulary, with_distractors
from modeling_ita.tiling import Tiling

TASKS = tuple(DEFAULT_THRESHOLDS)
MAX_GUESSES = 3


@dataclass(frozen=True)
class SegmentedImage:
    """The segments of one image.

    Attributes:
        label_map: (H, W), uint8 or uint16. Semantic: class indices, and the highest value (255 or 65,535) where no
            class reaches the threshold; otherwise segment ids from 1, and 0 where there is no segment.
        task: "semantic", "panoptic" or "instance".
        vocabulary: the classes, each a list of names.
        segments: "id", "label", "label_id", "score" (None where the task gives none), "area" in pixels and "bbox"
            [x, y, width, height] of each segment, largest first.
        dominant_categories: names that the image as a whole resembles most, in order.
        best_guesses: where there is no segment, the most probable classes as (name, score).
        result: what `post_process_*` gave, as `segments_of` takes it; instances overlap here if the segmenter keeps
            overlaps.
    """

    label_map: np.ndarray
    task: str
    vocabulary: list[list[str]]
    segments: list[dict[str, Any]]
    dominant_categories: list[str] = field(default_factory=list)
    best_guesses: list[tuple[str, float]] = field(default_factory=list)
    result: Any = None

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self.label_map.shape[1]

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self.label_map.shape[0]

    def masks(self) -> Iterator[Segment]:
        """Yield the segments with their masks, one at a time."""
        return iterate_segments(self.result)

    def document(self) -> dict[str, Any]:
        """Return the image's size, dominant categories and segments, as JSON can hold them."""
        return {
            "width": self.width,
            "height": self.height,
            "dominant_categories": self.dominant_categories,
            "segments": self.segments,
        }


class Segmenter:
    """A checkpoint with a vocabulary and a task.

    Args:
        model: `ITAForOpenVocabSegmentation` in eval mode.
        processor: its `ITAImageProcessor`.
        vocabulary: classes, each a list of synonyms; None for the checkpoint's own. It is encoded once.
        task: "semantic", "panoptic" or "instance".
        threshold: minimum score of a segment, or of the class of a pixel; None for the task's own (semantic 0.5,
            panoptic 0.8, instance 0.5).
        stuff: names of the classes that are stuff (not countable); None for what the checkpoint says.
        keep_overlaps: keep what one instance hides of another in `SegmentedImage.result`.
        tiling: how larger images are cut into tiles, which the network sees one by one; None to leave them whole.
        tiles_at_once: tiles in one pass.
        distractors: let the checkpoint's own classes compete with the given ones, without being reported, so that
            an image can show none of the given ones.
        examples: for names of classes a list of (image, mask or box) that show them, see
            `modeling_ita.class_examples.encode_class_examples`. They are encoded once.
        example_weight: of a class's n examples beside its names, 0 to 1; None for n / (n + 4).

    Raises:
        ITAError: there is no vocabulary at all, a name of `stuff` or `examples` is not in it, or an example cannot be
            used.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        vocabulary: Sequence[Sequence[str]] | None = None,
        task: str = "semantic",
        threshold: float | None = None,
        stuff: Sequence[str] | None = None,
        keep_overlaps: bool = False,
        distractors: bool = True,
        tiling: Tiling | None = None,
        tiles_at_once: int = 1,
        examples: Mapping[str, Sequence[tuple[Any, Any]]] | None = None,
        example_weight: float | None = None,
    ):
        if vocabulary is None and model.default_vocabulary is None:
            raise ITAError("the checkpoint has no classes of its own: name the classes")
        self.model, self.processor, self.task = model, processor, task
        self.vocabulary = None if vocabulary is None else normalize_vocabulary(vocabulary)
        self.threshold = DEFAULT_THRESHOLDS.get(task) if threshold is None else threshold
        self.stuff_ids = None if stuff is None else self._ids_of(stuff)
        self.keep_overlaps = keep_overlaps
        self.tiling, self.tiles_at_once = tiling, tiles_at_once
        self._competing = self.vocabulary
        if distractors and self.vocabulary is not None:
            pools = model.default_vocabulary, model.config.train_vocabulary
            self._competing, _ = with_distractors(self.vocabulary, *pools)
        self._example_options: dict[str, Any] = {}
        if examples is not None:
            rows = self._encode_examples(examples)
            self._example_options = {"examples": rows, "example_weight": example_weight}

    @property
    def classes(self) -> list[list[str]]:
        """The vocabulary that images are segmented with."""
        chosen = self.model.default_vocabulary if self.vocabulary is None else self.vocabulary
        return [[names] if isinstance(names, str) else list(names) for names in chosen]

    @property
    def settings(self) -> dict[str, Any]:
        """What results depend on beside the image and the checkpoint, as JSON can hold it."""
        size = {key: value for key, value in dict(self.processor.size).items() if value is not None}
        return {
            "task": self.task,
            "threshold": self.threshold,
            "distractors": self._competing != self.vocabulary,
            "size": size,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "tiles": None
            if self.tiling is None
            else {"size": self.tiling.size, "stride": self.tiling.stride},
            "stuff_ids": None if self.stuff_ids is None else sorted(self.stuff_ids),
            "vocabulary": self.classes,
            "examples": self._example_settings(),
        }

    @property
    def encoded_classes(self) -> list[list[str]]:
        """The vocabulary with its distractors: what is encoded before an image can be segmented."""
        return [list(names) for names in self._competing or self.classes]

    def encode(self, classes: Sequence[Sequence[str]]) -> None:
        """Encode some of the classes ahead of `segment`, in a step of its own."""
        import torch

        with torch.inference_mode():
            self.model.encode_vocabulary([list(names) for names in classes])

    def segment_images(self, images: Sequence[Image.Image]) -> list[SegmentedImage | ITAError]:
        """Segment RGB images of any sizes in one pass.

        A batch that memory does not hold is done image by image.

        Args:
            images: RGB images.

        Returns:
            for each image its segments, or what was wrong with it.
        """
        if not images:
            return []
        try:
            return list(self._segment(images))
        except ITAError as error:
            if len(images) == 1:
                return [error]
        return [result for image in images for result in self.segment_images([image])]

    def _encode_examples(self, examples: Mapping[str, Sequence[tuple[Any, Any]]]) -> dict[str, Any]:
        import torch

        from modeling_ita.class_examples import check_example_names, encode_class_examples

        try:
            check_example_names(examples, [normalize_vocabulary(self.classes).key])
            with torch.inference_mode():
                return encode_class_examples(self.model, self.processor, examples)
        except ValueError as error:
            raise ITAError(one_line(error)) from error

    def _example_settings(self) -> dict[str, Any] | None:
        """Say which examples there are, by the digest of their embeddings."""
        if not self._example_options:
            return None
        from modeling_ita.text_cache import digest_of

        rows, weight = self._example_options["examples"], self._example_options["example_weight"]
        digest = digest_of(list(rows), list(rows.values()))
        return {"digest": digest, "weight": weight}

    def _ids_of(self, stuff: Sequence[str]) -> set[int]:
        names = {normal_form(name): index for index, names in enumerate(self.classes) for name in names}
        unknown = [name for name in stuff if normal_form(name) not in names]
        if unknown:
            raise ITAError(f"{unknown[0]!r} is named as stuff but is not among the classes")
        return {names[normal_form(name)] for name in stuff}

    def _segment(self, images: Sequence[Image.Image]) -> list[SegmentedImage]:
        import torch

        sizes = [(image.height, image.width) for image in images]
        try:
            if self.tiling is not None:
                return [self._segment_tiles(image, self.tiling) for image in images]
            with torch.inference_mode():
                outputs = self._run(images)
                results = self._post_process(outputs, sizes)
                overlapping = (
                    self._post_process(outputs, sizes, return_binary_maps=True)
                    if self.keep_overlaps and self.task == "instance"
                    else results
                )
        except (MemoryError, RuntimeError) as error:
            # A GPU out of memory has an error of its own; without one torch says it in the message.
            of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
            if not (of_memory or "allocate memory" in str(error)):
                raise
            height, width = max(sizes)
            raise ITAError(f"not enough memory for an image of {width} x {height}") from error
        stuff: Any = outputs.stuff_ids or [()] * len(images)
        return [
            self._segmented(
                result,
                whole,
                outputs.dominant_categories[index] if outputs.dominant_categories else (),
                outputs.class_queries_logits[index].float().softmax(-1)[:, :-1].amax(0).tolist(),
                stuff[index] if self.stuff_ids is None else self.stuff_ids,
            )
            for index, (result, whole) in enumerate(zip(results, overlapping, strict=True))
        ]

    def _run(self, images: Sequence[Image.Image]) -> Any:
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.model.device)
        return self.model(**inputs, vocabulary=self._competing, **self._example_options)

    def _segment_tiles(self, image: Image.Image, tiling: Tiling) -> SegmentedImage:
        import torch

        from modeling_ita.tiled_segmentation import segment_tiles

        with torch.inference_mode():
            found = segment_tiles(
                self._run,
                image,
                tiling,
                self.task,
                self.threshold,
                at_once=self.tiles_at_once,
                num_classes=len(self.classes),
                label_ids_to_fuse=self.stuff_ids,
                ignore_index=NO_CLASS,
            )
        result = {
            "segmentation": found.segmentation,
            "segments_info": found.segments_info,
            "masks": found.masks,
        }
        if self.task == "semantic":
            result = {"segmentation": found.segmentation, "scores": found.scores}
        elif not self.keep_overlaps:
            del result["masks"]
        stuff_ids = found.stuff_ids if self.stuff_ids is None else self.stuff_ids
        highest = found.class_probabilities.tolist()
        return self._segmented(result, result, found.dominant_categories, highest, stuff_ids)

    def _post_process(self, outputs: Any, sizes: list[tuple[int, int]], **options: Any) -> list[Any]:
        common = {"target_sizes": sizes, "threshold": self.threshold, "num_classes": len(self.classes)}
        if self.task == "semantic":
            maps = self.processor.post_process_semantic_segmentation(outputs, ignore_index=NO_CLASS, **common)
            return [
                {"segmentation": ids, "scores": self._mean_scores(outputs, index, ids)}
                for index, ids in enumerate(map(as_array, maps))
            ]
        post_process = getattr(self.processor, f"post_process_{self.task}_segmentation")
        return post_process(outputs, label_ids_to_fuse=self.stuff_ids, **common, **options)

    def _mean_scores(self, outputs: Any, index: int, ids: np.ndarray) -> dict[int, float]:
        """The mean of each class's probability over its pixels, at the size of the network's masks.

        The probability that any query shows the class c at the pixel x is 1 - prod over q of (1 - p_q(c) m_q(x)).
        """
        import torch

        probabilities = outputs.class_queries_logits[index].float().softmax(-1)
        height, width = (math.ceil(int(side) / MASK_STRIDE) for side in outputs.image_sizes[index])
        masks = outputs.masks_queries_logits[index, :, :height, :width].float().sigmoid()
        small = torch.from_numpy(resize_labels(ids, (height, width)).astype(np.int64)).to(masks.device)
        scores = {}
        for one in np.unique(ids).tolist():
            if one != NO_CLASS:
                inside = small == one
                if not inside.any():  # too thin for the masks: scored by its best place there
                    inside = torch.ones_like(inside)
                shown = 1 - (1 - probabilities[:, one, None] * masks[:, inside]).prod(0)
                score = shown.mean() if (small == one).any() else shown.max()
                scores[one] = round(float(score), 6)
        return scores

    def _segmented(
        self,
        result: Any,
        overlapping: Any,
        dominant_categories: Sequence[str],
        highest: Sequence[float],
        stuff_ids: Collection[int],
    ) -> SegmentedImage:
        """Describe a result; `highest` has each class's highest probability in any query."""
        classes = self.classes
        ids = as_array(result["segmentation"])
        if self.task == "semantic":
            entries = [
                {"id": one, "label_id": one, "score": score} for one, score in result["scores"].items()
            ]
        else:
            entries = result["segments_info"]
        label_map = _narrow(ids, max((entry["id"] for entry in entries), default=0))
        segments = describe_segments(label_map, classes, entries)
        known = {name for names in classes for name in names}
        return SegmentedImage(
            label_map=label_map,
            task=self.task,
            vocabulary=classes,
            segments=segments,
            dominant_categories=[name for name in dominant_categories if name in known],
            best_guesses=[] if segments else self._best_guesses(highest, stuff_ids),
            result=overlapping,
        )

    def _best_guesses(self, highest: Sequence[float], stuff_ids: Collection[int]) -> list[tuple[str, float]]:
        """The classes that the task can find with the highest probability in any query."""
        hidden = set(stuff_ids) if self.task == "instance" else set()
        found = [(names[0], round(score, 4)) for names, score in zip(self.classes, highest, strict=False)]
        kept = [guess for class_id, guess in enumerate(found) if class_id not in hidden]
        return sorted(kept, key=lambda guess: -guess[1])[:MAX_GUESSES]


def _narrow(ids: np.ndarray, highest: int) -> np.ndarray:
    """(H, W) ids -> uint8, or uint16 where an id does not fit; `NO_CLASS` becomes the highest value of the type."""
    for kind in (np.uint8, np.uint16):
        reserved = int(ids.min(initial=0) < 0)
        if highest + reserved <= np.iinfo(kind).max:
            return ids.astype(kind)  # -1 wraps to the highest value
    raise ITAError(f"the id {highest} is more than a label map of 16 bits can hold")


def describe_segments(
    label_map: np.ndarray, classes: Sequence[Sequence[str]], entries: Sequence[Any]
) -> list[dict[str, Any]]:
    """Describe the segments that have pixels in the map, largest first.

    Args:
        label_map: (H, W) ids.
        classes: the vocabulary.
        entries: "id", "label_id" and "score" of each segment.

    Returns:
        id, label, label_id, score, area in pixels and bbox [x, y, width, height] of each.
    """
    measured = areas_and_boxes(label_map)
    segments = []
    for entry in entries:
        if entry["id"] not in measured:
            continue
        area, box = measured[entry["id"]]
        segments.append(
            {
                "id": entry["id"],
                "label": classes[entry["label_id"]][0],
                "label_id": entry["label_id"],
                "score": entry["score"],
                "area": area,
                "bbox": list(box),
            }
        )
    return sorted(segments, key=lambda segment: -segment["area"])
