"""The handler of an Inference Endpoint: every documented shape of request, and errors in one line."""

import base64
import functools
import http.server
import importlib.util
import io
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.tiny_checkpoint import save_tiny_checkpoint

PARAMETERS = {
    "candidate_labels": ["sky", "dog|puppy"],
    "subtask": "semantic",
    "threshold": 0,
    "distractors": False,  # every pixel has a class
}


def png(size=(50, 40), seed=0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


IMAGE = png()
TEXT = base64.b64encode(IMAGE).decode()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("endpoint") / "model")


@pytest.fixture(scope="module")
def handler(checkpoint):
    """As an endpoint's server loads it: from the file in the checkpoint's folder."""
    spec = importlib.util.spec_from_file_location("handler_of_the_endpoint", checkpoint / "handler.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EndpointHandler(str(checkpoint))


@pytest.fixture(scope="module")
def expected(handler):
    return handler({"inputs": TEXT, "parameters": PARAMETERS})


def test_the_answer_is_json_with_a_mask_for_each_class(expected):
    answer = json.loads(json.dumps(expected))
    assert answer and {one["label"] for one in answer} <= {"sky", "dog"}
    covered = np.zeros((40, 50), int)
    for one in answer:
        assert set(one) == {"score", "label", "mask"}
        assert one["score"] is None
        mask = Image.open(io.BytesIO(base64.b64decode(one["mask"])))
        assert (mask.format, mask.mode, mask.size) == ("PNG", "L", (50, 40))
        assert set(np.unique(mask)) <= {0, 255}
        covered += np.asarray(mask) == 255
    assert (covered == 1).all()  # semantic: every pixel has one class


@pytest.mark.parametrize(
    "request_of",
    [
        lambda: {"inputs": IMAGE, "parameters": PARAMETERS},
        lambda: {"inputs": Image.open(io.BytesIO(IMAGE)), "parameters": PARAMETERS},
        lambda: {"inputs": f"data:image/png;base64,{TEXT}", "parameters": PARAMETERS},
        lambda: {"inputs": {"image": TEXT}, "parameters": PARAMETERS},
        lambda: {"inputs": {"image": TEXT, **PARAMETERS}},
        lambda: {"image": TEXT, **PARAMETERS},
        lambda: {"inputs": TEXT, **PARAMETERS},
        lambda: {"inputs": TEXT, "parameters": {**PARAMETERS, "candidate_labels": "sky, dog|puppy"}},
        lambda: {"inputs": TEXT, "parameters": {**PARAMETERS, "mask_threshold": None}},
    ],
    ids=[
        "bytes",
        "image",
        "data URL",
        "image inside",
        "all inside",
        "no inputs",
        "beside",
        "text labels",
        "null",
    ],
)
def test_every_shape_of_request_gives_the_same_answer(handler, expected, request_of):
    request = request_of()
    keys = set(request)
    assert handler(request) == expected
    assert set(request) == keys  # the server's request is not changed


def test_several_images_give_several_answers(handler, expected):
    other = base64.b64encode(png((30, 20), seed=1)).decode()
    answers = handler({"inputs": [TEXT, {"image": other}], "parameters": PARAMETERS})
    assert answers[0] == expected
    assert Image.open(io.BytesIO(base64.b64decode(answers[1][0]["mask"]))).size == (30, 20)


def test_a_bad_image_among_several_is_numbered(handler):
    bad = base64.b64encode(b"no image at all, only text").decode()
    with pytest.raises(ValueError, match="image 2 of 3: .*not an image"):
        handler({"inputs": [TEXT, bad, TEXT], "parameters": PARAMETERS})


@pytest.fixture
def private_url(tmp_path):
    """The URL of an image on this machine."""
    (tmp_path / "image.png").write_bytes(IMAGE)
    serve = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/image.png"
    server.shutdown()
    server.server_close()


def test_urls_are_fetched_only_where_allowed_and_only_from_the_public_internet(
    handler, private_url, monkeypatch
):
    with pytest.raises(ValueError, match="not fetched from URLs here"):
        handler({"inputs": private_url})
    monkeypatch.setenv("ITA_ALLOW_URLS", "1")
    monkeypatch.setattr(handler, "allows_urls", True)
    for url in (
        private_url,
        private_url.replace("127.0.0.1", "localhost"),
        "http://[::1]/",
        "http://169.254.169.254/",
    ):
        with pytest.raises(ValueError, match="not on the public internet"):
            handler({"inputs": url})


def test_names_of_a_request_are_not_kept_on_disk(handler, tmp_path, monkeypatch):
    monkeypatch.setenv("ITA_TEXT_CACHE", str(tmp_path / "cache"))
    names = [f"secret {index}" for index in range(600)]  # so many are worth a file
    handler({"inputs": TEXT, "parameters": {"candidate_labels": names}})
    assert not (tmp_path / "cache").exists()


def test_without_labels_the_checkpoints_own_classes_are_found(handler):
    answer = handler({"inputs": TEXT, "parameters": {"subtask": "semantic"}})
    assert {one["label"] for one in answer} <= {"sky", "dog", "grass", "car"}
    scores = [
        one["score"]
        for one in handler({"inputs": TEXT, "parameters": {"subtask": "instance", "threshold": 0}})
    ]
    assert all(isinstance(score, float) for score in scores)


@pytest.mark.parametrize(
    ("request_body", "message"),
    [
        ({}, "no image"),
        ({"parameters": {}}, "no image"),
        ("text", "JSON object"),
        ({"inputs": []}, "empty"),
        ({"inputs": 5}, "got int"),
        ({"inputs": "not base64!"}, "base64 or a URL"),
        ({"inputs": "/etc/hostname"}, "base64 or a URL|not an image|cannot be read"),
        ({"inputs": base64.b64encode(b"no image, only text").decode()}, "not an image"),
        ({"inputs": ""}, "empty"),
        ({"inputs": [TEXT] * 65}, "at most 64 images"),
        ({"inputs": TEXT, "parameters": [1]}, "'parameters' is a JSON object"),
        ({"inputs": TEXT, "parameters": {"treshold": 1}}, "unknown parameters .'treshold'"),
        ({"inputs": TEXT, "parameters": {"subtask": "depth"}}, "'subtask' is one of"),
        ({"inputs": TEXT, "parameters": {"threshold": "high"}}, "'threshold' is a number"),
        ({"inputs": TEXT, "parameters": {"threshold": 2}}, "'threshold' is a number from 0 to 1"),
        ({"inputs": TEXT, "parameters": {"candidate_labels": 3}}, "'candidate_labels' is a text or a list"),
        (
            {"inputs": TEXT, "parameters": {"candidate_labels": []}},
            "candidate_labels: the vocabulary is empty",
        ),
        ({"inputs": TEXT, "parameters": {"candidate_labels": ["cat", ""]}}, "empty name"),
        ({"inputs": TEXT, "parameters": {"candidate_labels": ["\ud800"]}}, "not valid Unicode"),
        ({"inputs": TEXT, "parameters": {"candidate_labels": "a" * 64_000}}, "more than 200 characters"),
        ({"inputs": TEXT, "parameters": {"candidate_labels": [["a"] * 20_000]}}, "20,000 names"),
        ({"inputs": TEXT, "parameters": {"candidate_labels": "|".join("ab" * 5_000)}}, "10,000 names"),
        ({"inputs": TEXT, "parameters": {"threshold": float("nan")}}, "'threshold' is a number from 0 to 1"),
        ({"inputs": TEXT, "parameters": {"distractors": "no"}}, "'distractors' is true or false"),
        ({"inputs": TEXT, "parameters": {"candidate_labels": "cat", "stuff_labels": "dog"}}, "got 'dog'"),
        ({"inputs": "https://example.org/image.png"}, "not fetched from URLs here"),
    ],
)
def test_a_bad_request_is_answered_in_words(handler, request_body, message):
    with pytest.raises(ValueError, match=message) as error:
        handler(request_body)
    assert "\n" not in str(error.value)


def test_a_file_of_the_server_cannot_be_asked_for(handler, tmp_path):
    path = tmp_path / "private.png"
    path.write_bytes(IMAGE)
    with pytest.raises(ValueError):
        handler({"inputs": str(path), "parameters": PARAMETERS})
