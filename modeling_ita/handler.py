"""The handler of an Inference Endpoint: a request in JSON or as an image in, segments in JSON out.

A saved checkpoint has this file as `handler.py` at its top, where the endpoint's server looks for it. It needs
nothing but the folder it lies in. Class names of a request are kept in memory only, and images given by URL are
fetched only where the environment variable `ITA_ALLOW_URLS` is 1, and only from the public internet.
"""

import base64
import binascii
import io
import os
from collections.abc import Mapping
from typing import Any

from PIL import Image
from transformers import pipeline

SUBTASKS = ("panoptic", "instance", "semantic")
LABEL_PARAMETERS = ("candidate_labels", "stuff_labels")
FRACTIONS = ("threshold", "mask_threshold", "overlap_mask_area_threshold")
PARAMETERS = (*LABEL_PARAMETERS, "subtask", *FRACTIONS, "distractors", "timeout")
MAX_IMAGES = 64  # in one request
MAX_NAMES = 2_000  # synonyms are names, too
MAX_NAME_LENGTH = 200  # characters
MAX_TIMEOUT = 60  # seconds


class EndpointHandler:
    """Answers an endpoint's requests with the checkpoint in a folder.

    Args:
        path: the checkpoint's folder.
    """

    def __init__(self, path: str = ""):
        self.segment: Any = pipeline(
            "image-segmentation", model=path or ".", trust_remote_code=True, allow_private_addresses=False
        )
        model: Any = self.segment.model
        model.text_encoder.use_disk = False
        self.allows_urls = os.environ.get("ITA_ALLOW_URLS") == "1"

    def __call__(self, data: Mapping[str, Any]) -> list[Any]:
        """Segment the image or the images of a request.

        Args:
            data: {"inputs": ..., "parameters": {...}}. `inputs` is an image: base64 text, a data URL, the bytes of a
                file, a PIL image (which the server makes of a request whose body is an image), or a URL (http, https)
                where `ITA_ALLOW_URLS` allows it; or {"image": image, "candidate_labels": [...]}; or a list of images.
                Without `inputs`, the request itself is read as {"image": ..., "candidate_labels": ...}. `parameters`
                are those of the pipeline: `candidate_labels`, `stuff_labels`, `distractors`, `subtask`, `threshold`,
                `mask_threshold`, `overlap_mask_area_threshold`, `timeout`.

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
        sources = inputs if several else [inputs]
        if len(sources) > MAX_IMAGES:
            raise ValueError(f"a request has at most {MAX_IMAGES} images, got {len(sources)}")
        if not sources:
            raise ValueError("'inputs' is empty: give at least one image")
        images = [self._image(one) for one in sources]
        answers = []
        for number, image in enumerate(images, start=1):
            try:
                answers.append(_answer(self.segment(image, **parameters)))
            except ValueError as error:
                if len(images) == 1:
                    raise
                raise ValueError(f"image {number} of {len(images)}: {error}") from error
        return answers if several else answers[0]

    def _image(self, value: Any) -> Any:
        """Return an image as the pipeline takes it: a PIL image, a URL or bytes, and never a path on the server."""
        if isinstance(value, (Image.Image, bytes, bytearray)):
            return value
        if isinstance(value, Mapping) and isinstance(value.get("image"), str):
            value = value["image"]
        if not isinstance(value, str):
            raise ValueError(f"an image is base64 text, a URL or bytes, got {type(value).__name__}")
        if value[:8].lower().startswith(("http://", "https://")):
            if not self.allows_urls:
                raise ValueError(
                    "images are not fetched from URLs here: send the image itself, as base64 text"
                )
            return value
        encoded = value.partition(",")[2] if value.startswith("data:") else value
        try:
            return base64.b64decode("".join(encoded.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError("an image given as text is base64 or a URL of http or https") from error


def _request(data: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the image or images of a request and the pipeline's arguments."""
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
        raise ValueError("the request has no image: give 'inputs' as base64 text or bytes")
    unknown = sorted(str(key) for key in given if key not in PARAMETERS)
    if unknown:
        raise ValueError(f"unknown parameters {_shown(unknown)}: there are {list(PARAMETERS)}")
    return inputs, _checked({key: value for key, value in given.items() if value is not None})


def _checked(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters if they have the right types and sizes. Raises ValueError in one line."""
    if parameters.get("subtask") not in (None, *SUBTASKS):
        raise ValueError(f"'subtask' is one of {list(SUBTASKS)}, got {_shown(parameters['subtask'])}")
    if not isinstance(parameters.get("distractors", True), bool):
        raise ValueError(f"'distractors' is true or false, got {_shown(parameters['distractors'])}")
    for name in LABEL_PARAMETERS:
        _check_labels(name, parameters.get(name))
    for name, most in (*((name, 1) for name in FRACTIONS), ("timeout", MAX_TIMEOUT)):
        value = parameters.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
            raise ValueError(f"{name!r} is a number from 0 to {most}, got {_shown(value)}")
    return parameters


def _check_labels(parameter: str, labels: Any) -> None:
    if labels is None:
        return
    if not isinstance(labels, (str, list, tuple)):
        raise ValueError(f"{parameter!r} is a text or a list of names, got {type(labels).__name__}")
    names = 0
    for label in [labels] if isinstance(labels, str) else labels:
        for part in [label] if isinstance(label, str) else label if isinstance(label, (list, tuple)) else ():
            if not isinstance(part, str):
                continue  # which the pipeline refuses
            for name in part.replace("|", ",").replace(";", ",").replace("\n", ",").split(","):
                names += 1
                if len(name.strip()) > MAX_NAME_LENGTH:
                    raise ValueError(f"{parameter!r} has a name of more than {MAX_NAME_LENGTH} characters")
    if names > MAX_NAMES:
        raise ValueError(
            f"{parameter!r} has {names:,} names (synonyms included), and {MAX_NAMES:,} are allowed"
        )


def _shown(value: Any) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 100 else f"{shown[:99]}…"


def _answer(segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the pipeline's segments with their masks as base64 of a PNG."""
    answer = []
    for segment in segments:
        stream = io.BytesIO()
        segment["mask"].save(stream, format="PNG")
        mask = base64.b64encode(stream.getvalue()).decode("ascii")
        answer.append({"score": segment["score"], "label": segment["label"], "mask": mask})
    return answer
