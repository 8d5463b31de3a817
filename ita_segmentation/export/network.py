"""The model as two graphs: `torch.export` and ONNX, for images of any size and any vocabulary.

The image network takes padded images and a vocabulary's text embeddings; the text network makes embeddings of tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from ita_segmentation.export.ita_onnx.predictor import TEXT_INPUTS
from modeling_ita import TextEmbeddings

INPUTS = ("pixel_values", "valid", *TEXT_INPUTS)
OUTPUTS = ("class_log_probabilities", "mask_logits", "dominant")
TEXT_NETWORK_INPUT, TEXT_NETWORK_OUTPUT = "tokens", "embeds"
OPSET = 18


class ExportableNetwork(nn.Module):
    """A model's network at inference, with the ensemble weights of its configuration.

    Args:
        model: an `ITAForOpenVocabSegmentation`.

    Raises:
        ValueError: the model selects dominant categories by a thumbnail, which is made outside of the network.
    """

    def __init__(self, model: Any):
        super().__init__()
        check_exportable(model)
        self.model = model.eval()

    def forward(
        self,
        pixel_values: Tensor,
        valid: Tensor,
        prompt_embeds: Tensor,
        class_of_name: Tensor,
        name_embeds: Tensor,
        is_seen: Tensor,
        is_duplicate: Tensor,
    ) -> tuple[Tensor, ...]:
        """Segment images.

        Args:
            pixel_values: (B, 3, H, W) float32, normalized, H and W multiples of 32.
            valid: (B, H, W) bool, pixels that are not padding.
            prompt_embeds: (N, D), see `TextEmbeddings`.
            class_of_name: (N,) int64.
            name_embeds: (M, D).
            is_seen: (K,) bool.
            is_duplicate: (K,) bool.

        Returns:
            Log probabilities (B, Q, K + 1), mask logits (B, Q, H / 4, W / 4) and, for a model with dominant
            categories, the indices (B, k) of their names.
        """
        text = TextEmbeddings(prompt_embeds, class_of_name, name_embeds, is_seen, is_duplicate)
        result = self.model.segment(pixel_values, text, valid)
        outputs = result.log_probs, result.mask_logits[-1], result.dominant
        return tuple(output for output in outputs if output is not None)


def check_exportable(model: Any) -> None:
    """Check that a model's network is a graph."""
    if model.config.num_dominant_categories and model.config.dominant_category_source == "thumbnail":
        raise ValueError(
            "a model that takes dominant categories from a thumbnail cannot be exported: "
            'set dominant_category_source to "features"'
        )


def least_candidates(config: Any) -> dict[str, int]:
    """Give the least lengths of the inputs from which the graph selects dominant categories."""
    k = config.num_dominant_categories
    by_class = config.dominant_category_source == "cells"
    return {"name_embeds": max(2, 0 if by_class else k), "classes": max(1, k if by_class else 0)}


def export_network(model: Any) -> ExportedProgram:
    """Export the network for batches, sizes and vocabularies of any length.

    Args:
        model: an `ITAForOpenVocabSegmentation`.

    Raises:
        ValueError: as for `ExportableNetwork`.
    """
    network = ExportableNetwork(model)
    device, dtype, least = model.device, model.dtype, least_candidates(model.config)
    width, names = model.clip_backbone.embed_dim, 37 + least["classes"]
    classes, candidates = 29 + least["classes"], 42 + least["name_embeds"]
    # Sizes that have nothing in common, so that none is taken for another.
    example = (
        torch.randn(2, 3, 96, 160, device=device, dtype=dtype),
        torch.ones(2, 96, 160, dtype=torch.bool, device=device),
        torch.randn(names, width, device=device, dtype=dtype),
        (torch.arange(names, device=device) * classes) // names,
        torch.randn(candidates, width, device=device, dtype=dtype),
        torch.zeros(classes, dtype=torch.bool, device=device),
        torch.zeros(classes, dtype=torch.bool, device=device),
    )
    batch = Dim("batch", min=1, max=64)
    rows, columns = Dim("rows", min=1, max=256), Dim("columns", min=1, max=256)
    n, k = Dim("names", min=1), Dim("classes", min=least["classes"])
    m = Dim("candidates", min=least["name_embeds"])
    shapes = (
        {0: batch, 2: 32 * rows, 3: 32 * columns},
        {0: batch, 1: 32 * rows, 2: 32 * columns},
        {0: n},
        {0: n},
        {0: m},
        {0: k},
        {0: k},
    )
    with torch.no_grad():
        return torch.export.export(network, example, dynamic_shapes=shapes, strict=False)


def to_onnx(model: Any, path: Path) -> None:
    """Write the network as ONNX.

    Args:
        model: an `ITAForOpenVocabSegmentation`.
        path: file to write.

    Raises:
        ValueError: as for `ExportableNetwork`.
    """
    outputs = OUTPUTS if model.dominant_categories is not None else OUTPUTS[:2]
    _save(export_network(model), path, INPUTS, outputs)


def _save(network: ExportedProgram, path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    program = torch.onnx.export(
        network,
        dynamo=True,
        opset_version=OPSET,
        input_names=list(inputs),
        output_names=list(outputs),
        verbose=False,
    )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where in which source file a node comes from
    program.save(path)


class TextNetwork(nn.Module):
    """A model's text tower."""

    def __init__(self, model: Any):
        super().__init__()
        self.clip_backbone = model.eval().clip_backbone

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed prompts: tokens (n, L) int64, zeros after the end token -> (n, D), unit rows."""
        return F.normalize(self.clip_backbone.encode_tokens(tokens), dim=-1)


def text_to_onnx(model: Any, path: Path) -> None:
    """Write the text tower as ONNX, for any number of prompts and, where it is causal, of any length.

    Args:
        model: an `ITAForOpenVocabSegmentation`.
        path: file to write.
    """
    backbone = model.clip_backbone
    length = 11 if backbone._attends_causally else backbone.context_length
    tokens = torch.zeros(3, length, dtype=torch.int64, device=model.device)
    tokens[:, 0], tokens[:, 5] = backbone.tokenizer.sot_token_id, backbone.tokenizer.eot_token_id
    shape: dict[int, Any] = {0: Dim("prompts", min=1)}
    if backbone._attends_causally:
        shape[1] = Dim("tokens", min=2, max=backbone.context_length)
    with torch.no_grad():
        network = torch.export.export(TextNetwork(model), (tokens,), dynamic_shapes=(shape,), strict=False)
    _save(network, path, [TEXT_NETWORK_INPUT], [TEXT_NETWORK_OUTPUT])
