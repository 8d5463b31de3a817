"""The handler of an Inference Endpoint: a request in JSON or as an image in, segments in JSON out.

A saved checkpoint has this file as `handler.py` at its top, where the endpoint's server looks for it. It needs
nothing but the folder it lies in.
"""

import base64
import binascii
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image
from transformers import pipeline

PARAMETERS = (
    "candidate_labels",
    "subtask",
    "threshold",
    "mask_threshold",
    "overlap_mask_area_threshold",
    "timeout",
)
SUBTASKS = ("panoptic", "instance", "semantic")
MAX_IMAGES = 64  # in one request


class EndpointHandler:
    """Answers an endpoint's requests with the checkpoint in a folder.

    Args:
        path: the checkpoint's folder.
    """

    def __init__(self, path: str = ""):
        self.segment: Any = pipeline("image-segmentation", model=path or ".", trust_remote_code=True)

    def __call__(self, data: Mapping[str, Any]) -> list[Any]:
        """Segments the image or the images of a request.

        Args:
            data: {"inputs": ..., "parameters": {...}}. `inputs` is an image: base64 text, a data URL, an address
                (http, https), the bytes of a file, or a PIL image (which the server makes of a request whose body is
                an image); or {"image": image, "candidate_labels": [...]}; or a list of images. Without `inputs`,
                the request itself is read as {"image": ..., "candidate_labels": ...}. `parameters` are
                `candidate_labels`, `subtask`, `threshold`, `mask_threshold`, `overlap_mask_area_threshold`, `timeout`.

        Returns:
            For an image a list of {"score" (null for "semantic"), "label", "mask" (base64 of a PNG, 0 and 255)}; for a
            list of images a list of such lists.

        Raises:
            ValueError: what is wrong with the request, in one line.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a request is a JSON object with 'inputs', got {type(data).__name__}")
        inputs, parameters = _request(data)
        several = isinstance(inputs, (list, tuple))
        images = [_image(one) for one in (inputs if several else [inputs])]
        if len(images) > MAX_IMAGES:
            raise ValueError(f"a request has at most {MAX_IMAGES} images, got {len(images)}")
        if not images:
            raise ValueError("'inputs' is empty: give at least one image")
        answers = []
        for number, image in enumerate(images, start=1):
            try:
                answers.append(_answer(self.segment(image, **parameters)))
            except ValueError as error:
                if len(images) == 1:
                    raise
                raise ValueError(f"image {number} of {len(images)}: {error}") from error
        return answers if several else answers[0]


def _request(data: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The image or images of a request and the pipeline's arguments."""
    outside = {key: value for key, value in data.items() if key not in ("inputs", "parameters")}
    inputs = data.get("inputs", outside if "image" in outside else None)
    parameters = data.get("parameters") or {}
    if not isinstance(parameters, Mapping):
        raise ValueError(f"'parameters' is a JSON object, got {type(parameters).__name__}")
    given = dict(outside if inputs is not outside else {})
    if isinstance(inputs, Mapping):
        given.update({key: value for key, value in inputs.items() if key != "image"})
        inputs = inputs.get("image")
    given.update(parameters)
    if inputs is None:
        raise ValueError("the request has no image: give 'inputs' as base64 text, an address or bytes")
    unknown = sorted(str(key) for key in given if key not in PARAMETERS)
    if unknown:
        raise ValueError(f"unknown parameters {unknown}: there are {list(PARAMETERS)}")
    return inputs, _checked({key: value for key, value in given.items() if value is not None})


def _checked(parameters: dict[str, Any]) -> dict[str, Any]:
    if parameters.get("subtask") not in (None, *SUBTASKS):
        raise ValueError(f"'subtask' is one of {list(SUBTASKS)}, got {parameters['subtask']!r}")
    labels = parameters.get("candidate_labels")
    if labels is not None and not isinstance(labels, (str, list, tuple)):
        raise ValueError(f"'candidate_labels' is a text or a list of names, got {type(labels).__name__}")
    for name in PARAMETERS[2:]:
        value = parameters.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name!r} is a number, got {value!r}")
        if "threshold" in name and not 0 <= value <= 1:
            raise ValueError(f"{name!r} is a number from 0 to 1, got {value}")
    return parameters


def _image(value: Any) -> Any:
    """An image as the pipeline takes it: a PIL image, an address or bytes, and never a path on the server."""
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if isinstance(value, Mapping) and isinstance(value.get("image"), str):
        return _image(value["image"])
    if not isinstance(value, str):
        raise ValueError(f"an image is base64 text, an address or bytes, got {type(value).__name__}")
    if value.startswith(("http://", "https://")):
        return value
    encoded = value.partition(",")[2] if value.startswith("data:") else value
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("an image given as text is base64 or an address of http or https") from error


def _answer(segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pipeline's segments with their masks as base64 of a PNG."""
    answer = []
    for segment in segments:
        stream = io.BytesIO()
        segment["mask"].save(stream, format="PNG")
        mask = base64.b64encode(stream.getvalue()).decode("ascii")
        answer.append({"score": segment["score"], "label": segment["label"], "mask": mask})
    return answer
