"""A model repository of Triton Inference Server, with what a client needs beside it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ita_segmentation.export.ita_onnx.predictor import IMAGE_NETWORK, TEXT_NETWORK
from ita_segmentation.files import write_files

REPOSITORY = "model_repository"
MODELS = {"ita_image": IMAGE_NETWORK, "ita_text": TEXT_NETWORK}

Shapes = Mapping[str, tuple[str, Sequence[int]]]
"""Triton's data type and the dimensions, -1 where free, of each input or output."""

_TYPES = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64", "tensor(bool)": "TYPE_BOOL"}
_CONFIG = """\
name: "{name}"
backend: "onnxruntime"
max_batch_size: 0  # the batch is among the dimensions: a vocabulary's inputs have none
{inputs}{outputs}"""


def arrange_for_triton(folder: Path) -> None:
    """Move the networks of a folder that `write_onnx_folder` wrote into a model repository.

    The rest stays where it is, for clients: `OnnxPredictor(folder, run=TritonRunner(url))`.

    Args:
        folder: has the networks; gets `model_repository`.

    Raises:
        ITAError: a file cannot be written.
        OSError: the same.
    """
    import onnxruntime

    for name, file in MODELS.items():
        session = onnxruntime.InferenceSession(str(folder / file), providers=["CPUExecutionProvider"])
        config = model_config(name, _shapes(session.get_inputs()), _shapes(session.get_outputs()))
        write_files({folder / REPOSITORY / name / "config.pbtxt": config.encode()})
        version = folder / REPOSITORY / name / "1"
        version.mkdir(parents=True, exist_ok=True)
        weights = f"{file}.data"
        if (folder / weights).exists():  # the graph names this file
            os.replace(folder / weights, version / weights)
        os.replace(folder / file, version / "model.onnx")


def model_config(name: str, inputs: Shapes, outputs: Shapes) -> str:
    """Write a `config.pbtxt`."""
    return _CONFIG.format(
        name=name, inputs=_tensor_list("input", inputs), outputs=_tensor_list("output", outputs)
    )


def _tensor_list(field: str, shapes: Shapes) -> str:
    return "".join(
        f'{field} {{\n  name: "{name}"\n  data_type: {kind}\n  dims: {list(dims)}\n}}\n'
        for name, (kind, dims) in shapes.items()
    )


def _shapes(values: Sequence) -> dict[str, tuple[str, list[int]]]:
    return {
        value.name: (_TYPES[value.type], [side if isinstance(side, int) else -1 for side in value.shape])
        for value in values
    }
