"""The network as a graph: `torch.export` and ONNX, with images of any size and any vocabulary as inputs.

Inputs of the graph are padded images and what the text tower makes of a vocabulary, so the text tower is not in it:
a vocabulary is exported beside it (`vocabulary.py`), and another one can be exported later without the network.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from modeling_ita.classification import TextEmbeddings

INPUTS = (
    "pixel_values", "valid", "prompt_embeds", "class_of_name", "name_embeds", "is_seen", "is_duplicate",
)  # fmt: skip
OUTPUTS = ("class_log_probabilities", "mask_logits", "dominant")
OPSET = 18


class ExportableNetwork(nn.Module):
    """A model's network at inference, with the ensemble's weights of its configuration.

    Raises:
        ValueError: a model that looks at a thumbnail of the image, which is made outside of the network.
    """

    def __init__(self, model: Any):
        super().__init__()
        if model.config.num_dominant_categories and model.config.dominant_category_source == "thumbnail":
            raise ValueError(
                "a model that takes dominant categories from a thumbnail cannot be exported: "
                'set dominant_category_source to "features"'
            )
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
        """Segments.

        Args:
            pixel_values: (B, 3, H, W) float32, normalised, H and W multiples of 32.
            valid: (B, H, W) bool, pixels that are no padding.
            prompt_embeds, class_of_name, name_embeds, is_seen, is_duplicate: of `TextEmbeddings`.

        Returns: log probabilities (B, Q, K + 1), mask logits (B, Q, H / 4, W / 4), and, if the model unearths dominant
        categories, the indices of the nearest candidates (B, k).
        """
        text = TextEmbeddings(prompt_embeds, class_of_name, name_embeds, is_seen, is_duplicate)
        result = self.model.segment(pixel_values, text, valid)
        outputs = result.log_probs, result.mask_logits[-1], result.dominant
        return tuple(output for output in outputs if output is not None)


def text_of(model: Any, vocabulary: Any | None = None) -> tuple[TextEmbeddings, list[list[str]], list[str]]:
    """What the graph needs of a vocabulary (None: the model's own), its classes, and the candidates' names.

    Raises:
        ValueError: no vocabulary, or a malformed one.
    """
    from modeling_ita import normalize_vocabulary

    classes = model.default_vocabulary if vocabulary is None else normalize_vocabulary(vocabulary)
    return (
        model.encode_vocabulary(classes),
        [list(names) for names in classes],
        model.selectable_names(classes),
    )


def export_network(model: Any) -> ExportedProgram:
    """The network as a graph of torch's, for batches, sizes and vocabularies of any length.

    Raises:
        ValueError: as for `ExportableNetwork`.
    """
    network = ExportableNetwork(model)
    device, dtype = model.device, model.dtype
    width, names, classes = model.clip_backbone.embed_dim, 37, 29
    # Sizes that have nothing in common, so that none is taken for another.
    example = (
        torch.randn(2, 3, 96, 160, device=device, dtype=dtype),
        torch.ones(2, 96, 160, dtype=torch.bool, device=device),
        torch.randn(names, width, device=device, dtype=dtype),
        (torch.arange(names, device=device) * classes) // names,
        torch.randn(names + model.config.num_dominant_categories + 5, width, device=device, dtype=dtype),
        torch.zeros(classes, dtype=torch.bool, device=device),
        torch.zeros(classes, dtype=torch.bool, device=device),
    )
    batch, rows, columns = (
        Dim("batch", min=1, max=64),
        Dim("rows", min=1, max=256),
        Dim("columns", min=1, max=256),
    )
    n, k = Dim("names", min=1), Dim("classes", min=1)
    m = Dim("candidates", min=max(2, model.config.num_dominant_categories))
    shapes = (
        {0: batch, 2: 32 * rows, 3: 32 * columns},
        {0: batch, 1: 32 * rows, 2: 32 * columns},
        {0: n}, {0: n}, {0: m}, {0: k}, {0: k},
    )  # fmt: skip
    with torch.no_grad():
        return torch.export.export(network, example, dynamic_shapes=shapes, strict=False)


def to_onnx(model: Any, path: Path) -> None:
    """Writes the network as ONNX. Raises ValueError as `ExportableNetwork`."""
    program = torch.onnx.export(
        export_network(model),
        dynamo=True,
        opset_version=OPSET,
        input_names=list(INPUTS),
        output_names=list(OUTPUTS if model.dominant_categories is not None else OUTPUTS[:2]),
        verbose=False,
    )
    assert program is not None
    program.save(path)
