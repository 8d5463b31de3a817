"""The networks on a Triton Inference Server, in the place of onnxruntime: needs `tritonclient[grpc]`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

TYPES = {"float32": "FP32", "int64": "INT64", "bool": "BOOL"}


class TritonRunner:
    """Runs the networks of a served model repository, for `OnnxPredictor(folder, run=TritonRunner(url))`.

    Args:
        url: host and port of the server's gRPC, such as "localhost:8001".
        options: of `tritonclient.grpc.InferenceServerClient`, such as `ssl=True`.
    """

    def __init__(self, url: str, **options: Any):
        from tritonclient import grpc

        self._grpc: Any = grpc
        self._client: Any = grpc.InferenceServerClient(url, **options)

    def __call__(self, network: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a network.

        Args:
            network: "text" or "image".
            inputs: arrays by name.

        Raises:
            ValueError: the server cannot be reached, or refuses.
        """
        tensors = []
        for name, array in inputs.items():
            tensor = self._grpc.InferInput(name, list(array.shape), TYPES[str(array.dtype)])
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
        try:
            result = self._client.infer(f"ita_{network}", tensors)
        except self._triton_error() as error:
            raise ValueError(f"Triton cannot run ita_{network}: {' '.join(str(error).split())}") from error
        return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}

    @staticmethod
    def _triton_error() -> type[Exception]:
        from tritonclient.utils import InferenceServerException

        return InferenceServerException
