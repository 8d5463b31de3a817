"""Segment images by any class names with an exported folder."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import postprocessing
from .images import NetworkInput, preprocess, read_image, stack
from .postprocessing import OnnxOutputs
from .vocabulary import (
    OTHER,
    Classes,
    ClipTokenizer,
    classes_among,
    distinct,
    is_duplicate,
    normalize_vocabulary,
    with_distractors,
)

IMAGE_NETWORK, TEXT_NETWORK, SETTINGS = "model.onnx", "text.onnx", "ita_onnx.json"
NAMES, EMBEDDINGS, TOKENIZER = "vocabulary.json", "vocabulary.safetensors", "tokenizer.json"
PROCESSOR = "preprocessor_config.json"
TEXT_INPUTS = ("prompt_embeds", "class_of_name", "name_embeds", "is_seen", "is_duplicate")
PROMPTS_PER_BATCH = 256
IMAGES_PER_BATCH = 8

Run = Callable[[str, Mapping[str, np.ndarray]], dict[str, np.ndarray]]
"""Runs a network, "text" or "image", on named arrays."""


@dataclass(frozen=True)
class EncodedVocabulary:
    """A vocabulary as the image network takes it.

    Attributes:
        classes: each a list of names.
        inputs: the arrays of `TEXT_INPUTS`.
        candidates: the names that the indices of dominant categories mean.
        padding: how many dominant categories it was filled up with, which are selected last.
    """

    classes: list[list[str]]
    inputs: dict[str, np.ndarray]
    candidates: list[str]
    padding: int


class OnnxSessions:
    """Runs the two networks of a folder by onnxruntime; the text network is loaded when new names come."""

    def __init__(self, folder: Path, providers: Sequence[str] | None = None):
        self.folder, self.providers = folder, list(providers or ["CPUExecutionProvider"])
        self._sessions: dict[str, Any] = {}

    def __call__(self, network: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a network."""
        session = self._sessions.get(network)
        if session is None:
            import onnxruntime

            if "CUDAExecutionProvider" in self.providers and hasattr(onnxruntime, "preload_dlls"):
                onnxruntime.preload_dlls()  # CUDA from Python packages
            file = self.folder / (TEXT_NETWORK if network == "text" else IMAGE_NETWORK)
            session = onnxruntime.InferenceSession(str(file), providers=self.providers)
            self._sessions[network] = session
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))


class OnnxPredictor:
    """Segment images by class names that are given at run time, without torch.

    Example:
        ```python
        predictor = OnnxPredictor("exported")
        label_map = predictor("photo.jpg", [["cat"], ["sofa", "couch"]])  # (H, W) int64
        ```

    Args:
        folder: what `ita export` wrote.
        providers: of onnxruntime; None for the CPU.
        run: what runs the networks in the place of onnxruntime, such as `triton.TritonRunner`.

    Attributes:
        vocabulary: the checkpoint's own classes, each a list of names.

    Raises:
        ValueError: a file of the folder is missing.
    """

    def __init__(self, folder: str | Path, providers: Sequence[str] | None = None, run: Run | None = None):
        self.folder = Path(folder)
        needed = [SETTINGS, NAMES, EMBEDDINGS, PROCESSOR]
        for name in needed if run else [IMAGE_NETWORK, *needed]:
            if not (self.folder / name).is_file():
                raise ValueError(f"{self.folder} is not an exported folder: it has no {name}")
        self.settings = self._read_json(SETTINGS)
        self.processor = self._read_json(PROCESSOR)
        self.vocabulary: list[list[str]] = self.settings["classes"]
        self._run = run or OnnxSessions(self.folder, providers)
        self._remote = run is not None
        self._tokenizer: ClipTokenizer | None = None
        arrays = read_safetensors(self.folder / EMBEDDINGS)
        rows = zip(arrays["prompt_embeds"], arrays["name_embeds"], strict=True)
        self._embeds = dict(zip(self._read_json(NAMES), rows, strict=True))
        self._encoded: dict[tuple, EncodedVocabulary] = {}

    # --- vocabularies ---

    def encode(self, classes: Classes | None = None) -> EncodedVocabulary:
        """Encode a vocabulary, or take it from memory.

        Args:
            classes: each a name or a list of synonyms; None for the checkpoint's own.

        Raises:
            ValueError: none, a malformed one, one with too few names for this network, or new names and no text
                network.
        """
        if classes is None and not self.vocabulary:
            raise ValueError("the exported checkpoint has no classes of its own: name the classes")
        vocabulary = normalize_vocabulary(self.vocabulary if classes is None else classes)
        key = tuple(map(tuple, vocabulary))
        if key not in self._encoded:
            if len(self._encoded) >= 16:
                self._encoded.pop(next(iter(self._encoded)))
            self._encoded[key] = self._fill_up(self._encode(vocabulary))
        return self._encoded[key]

    def _encode(self, vocabulary: list[list[str]]) -> EncodedVocabulary:
        names = [name for synonyms in vocabulary for name in synonyms]
        candidates = distinct([*names, OTHER])
        self._embed([*names, *candidates])
        trained = [name for synonyms in self.settings["train_vocabulary"] for name in synonyms]
        class_of_name = [index for index, synonyms in enumerate(vocabulary) for _ in synonyms]
        inputs = {
            "prompt_embeds": np.stack([self._embeds[name][0] for name in names]),
            "class_of_name": np.array(class_of_name, np.int64),
            "name_embeds": np.stack([self._embeds[name][1] for name in candidates]),
            "is_seen": np.array(classes_among(vocabulary, trained)),
            "is_duplicate": np.array(is_duplicate(vocabulary)),
        }
        selectable = names if self.settings["dominant_category_source"] == "cells" else candidates
        return EncodedVocabulary(vocabulary, inputs, selectable, 0)

    def _embed(self, names: Sequence[str]) -> None:
        """Encode the names that are not known yet, alone and in the prompt templates."""
        missing = [name for name in dict.fromkeys(names) if name not in self._embeds]
        templates = ["{}", *self.settings["templates"]]
        step = max(1, PROMPTS_PER_BATCH // len(templates))
        for start in range(0, len(missing), step):
            block = missing[start : start + step]
            prompts = [template.format(name) for name in block for template in templates]
            embeds = self._run("text", {"tokens": self._tokenize(prompts)})["embeds"]
            embeds = embeds.reshape(len(block), len(templates), -1)
            means = embeds[:, 1:].mean(axis=1)
            means /= np.linalg.norm(means, axis=-1, keepdims=True)
            self._embeds.update(zip(block, zip(means, embeds[:, 0], strict=True), strict=True))

    def _tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        if self._tokenizer is None:
            for name in (TOKENIZER,) if self._remote else (TOKENIZER, TEXT_NETWORK):
                if not (self.folder / name).is_file():
                    raise ValueError(f"new names need {name}, which {self.folder} does not have")
            length, padded = self.settings["context_length"], self.settings["pads_tokens"]
            self._tokenizer = ClipTokenizer(self.folder / TOKENIZER, length, padded)
        return self._tokenizer(prompts)

    def _fill_up(self, text: EncodedVocabulary) -> EncodedVocabulary:
        """Append what is selected last where a vocabulary has too little for the network's fixed number of queries."""
        by_class = self.settings["dominant_category_source"] == "cells"
        most = self.settings["num_dominant_categories"]
        inputs = dict(text.inputs)
        lacking = most - len(text.classes if by_class else inputs["name_embeds"]) if most else 0
        if lacking <= 0:
            return text
        if self.settings["decoder_self_attention"]:
            raise ValueError(
                f"the exported network of this model takes vocabularies of at least {most} names"
            )
        if not by_class:
            width = inputs["name_embeds"].shape[1]
            inputs["name_embeds"] = np.concatenate(
                [inputs["name_embeds"], np.zeros((lacking, width), np.float32)]
            )
            return EncodedVocabulary(text.classes, inputs, text.candidates, lacking)
        first = len(text.classes)
        for name in ("prompt_embeds", "is_seen"):
            inputs[name] = np.concatenate([inputs[name], np.repeat(inputs[name][-1:], lacking, axis=0)])
        inputs["class_of_name"] = np.append(inputs["class_of_name"], np.arange(first, first + lacking))
        inputs["is_duplicate"] = np.append(inputs["is_duplicate"], np.ones(lacking, bool))
        return EncodedVocabulary(text.classes, inputs, text.candidates, lacking)

    # --- images ---

    def outputs(
        self,
        images: Sequence[Any],
        classes: Classes | None = None,
        target_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[OnnxOutputs]:
        """Compute the network's outputs, for the functions of `postprocessing`.

        Images go through the network in batches of one padded size, so that each one's outputs are those that it has
        alone.

        Args:
            images: what `read_image` takes, of any sizes.
            classes: as for `encode`.
            target_sizes: (height, width) of each image's results; None for the images' own.

        Raises:
            ValueError: as for `encode` and `read_image`.
        """
        text = self.encode(classes)
        read = [read_image(image) for image in images]
        sizes = [(image.height, image.width) for image in read] if target_sizes is None else target_sizes
        inputs = [preprocess(image, self.processor) for image in read]
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, one in enumerate(inputs):
            groups.setdefault(one.valid.shape, []).append(index)
        found: dict[int, OnnxOutputs] = {}
        for indices in groups.values():
            for start in range(0, len(indices), IMAGES_PER_BATCH):
                batch = indices[start : start + IMAGES_PER_BATCH]
                parts = self.run_batch([inputs[index] for index in batch], text)
                for index, (class_logits, masks, dominant) in zip(batch, parts, strict=True):
                    found[index] = OnnxOutputs(
                        class_logits, masks, inputs[index].size, sizes[index], text.classes,
                        self._stuff_ids(text.classes), tuple(text.candidates[place] for place in dominant),
                    )  # fmt: skip
        return [found[index] for index in range(len(inputs))]

    def run_batch(
        self, inputs: Sequence[NetworkInput], text: EncodedVocabulary
    ) -> list[tuple[np.ndarray, np.ndarray, list[int]]]:
        """Run the image network once.

        Args:
            inputs: images of one padded size.
            text: the vocabulary.

        Returns:
            For each image its class logits (Q, K + 1), mask logits (Q, h, w) and dominant categories' indices.

        Raises:
            ValueError: padded sizes differ.
        """
        outputs = self._run("image", {**stack(inputs), **text.inputs})
        log_probs, masks = outputs["class_log_probabilities"], outputs["mask_logits"]
        dominant = outputs.get("dominant", np.zeros((len(inputs), 0), np.int64))
        if text.padding:  # its queries and classes are left out again
            selected = dominant.shape[1] - text.padding
            queries = [*range(selected), *range(dominant.shape[1], log_probs.shape[1])]
            log_probs = log_probs[:, queries][..., [*range(len(text.classes)), -1]]
            masks, dominant = masks[:, queries], dominant[:, :selected]
        if not (np.isfinite(masks).all() and not np.isnan(log_probs).any()):
            raise ValueError("the network's outputs are NaN: check its weights and inputs")
        return list(zip(log_probs, masks, dominant.tolist(), strict=True))

    def _stuff_ids(self, classes: list[list[str]]) -> frozenset[int]:
        is_stuff = classes_among(classes, self.settings["stuff_names"])
        return frozenset(index for index, is_one in enumerate(is_stuff) if is_one)

    def segment(
        self,
        images: Sequence[Any],
        classes: Classes | None = None,
        task: str = "semantic",
        distractors: bool = False,
        **options: Any,
    ) -> list[Any]:
        """Segment images of any sizes.

        Args:
            images: what `read_image` takes.
            classes: as for `encode`.
            task: "semantic", "panoptic" or "instance".
            distractors: let the checkpoint's other classes compete with the given ones without being reported, so
                that an image can show none of those.
            **options: of `semantic_map`, `panoptic_segments` or `instance_segments`.

        Returns:
            For each image, at its own size, a map (H, W) int64 of classes, or "segmentation" and "segments_info".

        Raises:
            ValueError: an unknown task, and as for `encode` and `read_image`.
        """
        functions: dict[str, Callable[..., Any]] = {
            "semantic": postprocessing.semantic_map,
            "panoptic": postprocessing.panoptic_segments,
            "instance": postprocessing.instance_segments,
        }
        if task not in functions:
            raise ValueError(f"the task is one of {', '.join(functions)}, got {task!r}")
        if distractors and classes is not None:
            classes = normalize_vocabulary(classes)
            options.setdefault("num_classes", len(classes))
            classes = with_distractors(
                classes, self.settings["own_classes"], self.settings["train_vocabulary"]
            )
        return [functions[task](outputs, **options) for outputs in self.outputs(images, classes)]

    def __call__(
        self, image: Any, classes: Classes | None = None, task: str = "semantic", **options: Any
    ) -> Any:
        """Segment one image; see `segment`."""
        return self.segment([image], classes, task, **options)[0]

    def _read_json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))


def read_safetensors(file: Path) -> dict[str, np.ndarray]:
    """Read the float32 arrays of a safetensors file."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    arrays = {}
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            values = np.frombuffer(content, np.float32, (last - first) // 4, start + first)
            arrays[name] = values.reshape(entry["shape"])
    return arrays
