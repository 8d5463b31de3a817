"""Segment images with an exported folder: onnxruntime in the place of the network.

predictor = OnnxPredictor("exported")
label_map = predictor(image)  # (H, W) int64, indices into predictor.vocabulary
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ita_segmentation.errors import ITAError
from ita_segmentation.export.network import TEXT_INPUTS, least_candidates
from ita_segmentation.files import atomic_path, write_files
from modeling_ita import ITAForOpenVocabSegmentationOutput, ITAImageProcessor, normalize_vocabulary

NETWORK, EMBEDDINGS, CLASSES = "model.onnx", "vocabulary.safetensors", "vocabulary.json"


def write_vocabulary(model: Any, folder: Path, vocabulary: Any | None = None) -> None:
    """Write what a graph needs of a vocabulary.

    The graph selects a fixed number of dominant categories, so a vocabulary with fewer names is filled up with names
    that are selected last, whose queries `OnnxPredictor` leaves out again.

    Args:
        model: the checkpoint that was exported.
        folder: where to write.
        vocabulary: classes; None takes the model's own.

    Raises:
        ITAError: a file cannot be written.
        ValueError: no vocabulary, a malformed one, or one with too few names for a model whose queries attend to each
            other.
    """
    classes = model.default_vocabulary if vocabulary is None else normalize_vocabulary(vocabulary)
    text = model.encode_vocabulary(classes)
    tensors = {name: getattr(text, name).detach().cpu() for name in TEXT_INPUTS}
    least = least_candidates(model.config)
    by_class = model.config.dominant_category_source == "cells"
    lacking = least["classes"] - len(classes) if by_class else least["name_embeds"] - len(text.name_embeds)
    if lacking > 0 and model.config.num_dominant_categories:
        if model.config.decoder_self_attention:
            least_names = max(least.values())
            raise ValueError(
                f"the exported network of this model takes vocabularies of at least {least_names} names"
            )
        _fill_up(tensors, lacking, by_class)
    document = {
        "vocabulary": [list(names) for names in classes],
        "candidates": list(model.selectable_names(classes)),
        "stuff_ids": model.stuff_ids(classes),
        "padding": max(lacking, 0),
    }
    with atomic_path(folder / EMBEDDINGS) as temporary:
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, temporary)
    text_of_document = json.dumps(document, indent=1, ensure_ascii=False)
    write_files({folder / CLASSES: f"{text_of_document}\n".encode()})


def _fill_up(tensors: dict[str, Tensor], count: int, by_class: bool) -> None:
    """Append names that are selected last: rows of zeros, or, `by_class`, classes that are marked as duplicates."""
    if not by_class:
        embeds = tensors["name_embeds"]
        tensors["name_embeds"] = torch.cat([embeds, embeds.new_zeros(count, embeds.shape[1])])
        return
    first = len(tensors["is_seen"])
    for name in ("prompt_embeds", "is_seen"):
        tensors[name] = _repeat_last(tensors[name], count)
    tensors["class_of_name"] = torch.cat([tensors["class_of_name"], torch.arange(first, first + count)])
    tensors["is_duplicate"] = torch.cat([tensors["is_duplicate"], torch.ones(count, dtype=torch.bool)])


def _repeat_last(tensor: Tensor, count: int) -> Tensor:
    return torch.cat([tensor, tensor[-1:].expand(count, *tensor.shape[1:])])


class OnnxPredictor:
    """Segment images with an exported network and vocabulary.

    Args:
        folder: what `ita export` wrote.
        providers: of onnxruntime, such as ["CUDAExecutionProvider"]; None for the CPU.

    Attributes:
        vocabulary: the classes, each a list of names.

    Raises:
        ITAError: a file of the folder is missing.
    """

    def __init__(self, folder: str | Path, providers: list[str] | None = None):
        folder = Path(folder)
        for name in (NETWORK, EMBEDDINGS, CLASSES, "preprocessor_config.json"):
            if not (folder / name).is_file():
                raise ITAError(f"{folder} is not an exported folder: it has no {name}")
        import onnxruntime

        self.session = onnxruntime.InferenceSession(
            str(folder / NETWORK), providers=providers or ["CPUExecutionProvider"]
        )
        self.processor = ITAImageProcessor.from_pretrained(folder)
        document = json.loads((folder / CLASSES).read_text(encoding="utf-8"))
        self.vocabulary: list[list[str]] = document["vocabulary"]
        self._candidates, self._stuff_ids = document["candidates"], document["stuff_ids"]
        self._padding: int = document["padding"]
        self._text = {name: tensor.numpy() for name, tensor in load_file(folder / EMBEDDINGS).items()}

    def outputs(self, pixel_values: Tensor, pixel_mask: Tensor) -> ITAForOpenVocabSegmentationOutput:
        """Compute the model's outputs, for the processor's `post_process_*`.

        Images of a batch share the batch's padded size, while the model's own `forward` crops each one to its own.

        Args:
            pixel_values: (B, 3, H, W) float, padded to multiples of 32.
            pixel_mask: (B, H, W), 1 for pixels and 0 for padding.
        """
        mask = pixel_mask.bool()
        names = [value.name for value in self.session.get_outputs()]
        inputs = {"pixel_values": pixel_values.float().numpy(), "valid": mask.numpy(), **self._text}
        found = {
            name: torch.from_numpy(value)
            for name, value in zip(names, self.session.run(None, inputs), strict=True)
        }
        sizes = [[int(one.any(1).sum()), int(one.any(0).sum())] for one in mask]
        log_probs, masks = found["class_log_probabilities"], found["mask_logits"]
        dominant = found.get("dominant", torch.zeros(len(sizes), 0, dtype=torch.int64))
        if self._padding:
            log_probs, masks, dominant = self._leave_out_padding(log_probs, masks, dominant)
        return ITAForOpenVocabSegmentationOutput(
            class_queries_logits=log_probs,
            masks_queries_logits=masks,
            dominant_categories=[[self._candidates[index] for index in row] for row in dominant.tolist()],
            image_sizes=torch.tensor(sizes),
            stuff_ids=[self._stuff_ids] * len(sizes),
            vocabulary=[self.vocabulary] * len(sizes),
        )

    def _leave_out_padding(
        self, log_probs: Tensor, masks: Tensor, dominant: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Drop the queries and classes of the names that a vocabulary was filled up with; they were selected last."""
        selected = dominant.shape[1] - self._padding
        queries = [*range(selected), *range(dominant.shape[1], log_probs.shape[1])]
        columns = [*range(len(self.vocabulary)), -1]
        return log_probs[:, queries][..., columns], masks[:, queries], dominant[:, :selected]

    def __call__(self, image: Any, task: str = "semantic", **options: Any) -> Any:
        """Segment one image.

        Args:
            image: a path, a URL or a PIL image.
            task: "semantic", "panoptic" or "instance".
            **options: of the processor's `post_process_*` method.

        Returns:
            What the processor's method gives at the image's own size: a map (H, W) int64 of classes, or a dictionary.
        """
        image = self.processor.fetch_images(image)
        inputs = self.processor(images=image, return_tensors="pt")
        outputs = self.outputs(inputs["pixel_values"], inputs["pixel_mask"])
        post_process = getattr(self.processor, f"post_process_{task}_segmentation")
        return post_process(outputs, target_sizes=[(image.height, image.width)], **options)[0]
