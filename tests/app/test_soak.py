"""Eight clients for minutes: every answer is right, memory stays flat, no typed name is on the disk.

Six ask the page over HTTP and two an Endpoint's handler in this process; class names are new all the time, and one
request in twenty is left before its answer comes. Figures are printed (`make soak`).
"""

import base64
import io
import itertools
import json
import secrets
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.app_server import CHECKPOINT, ROOT, running_page
from ita_segmentation.checkpoints import load_checkpoint
from ita_segmentation.images import read_image
from ita_segmentation.prediction import Segmenter

gradio_client = pytest.importorskip("gradio_client", reason="the page needs gradio")
psutil = pytest.importorskip("psutil", reason="memory is read with psutil")
pytest.importorskip("pycocotools", reason="the page needs pycocotools")

SECONDS = 180
PAGE_CLIENTS, HANDLER_CLIENTS = 6, 2
IMAGES = ("scene_1.png", "scene_2.jpg", "scene_3.png", "scene_4.png", "scene_5.jpg", "scene_6.png")
KNOWN = ["water", "concrete", "sky", "zebra", "panda", "pig", "lava", "wood", "tent", "dirt"]
TASKS = ("semantic", "panoptic", "instance")
SECRET = "qzxv"
"""In every made-up name: what is looked for on the disk."""
MAX_GROWTH = 96 * 2**20
"""Bytes, from the middle of the time to its end."""


class Requests:
    """Requests that differ in image, names and task; their answers are kept."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self.answered: list[tuple[tuple[str, list[str], str], np.ndarray]] = []
        self.left = 0

    def next(self) -> tuple[int, tuple[str, list[str], str]]:
        with self._lock:
            number = next(self._numbers)
        new = [f"{SECRET} {secrets.token_hex(4)}" for _ in range(520 if number % 200 == 7 else 3)]
        names = [KNOWN[number % 10], f"{KNOWN[(number + 3) % 10]}|{new[0]}", *new[1:]]
        return number, (IMAGES[number % 6], names, TASKS[number // 2 % 3])


def leave(address: str, request: tuple[str, list[str], str]) -> None:
    """Ask the page and hang up before the answer."""
    name, names, task = request
    with (ROOT / "examples" / name).open("rb") as file:
        boundary, content = secrets.token_hex(8), file.read()
    body = b"".join(
        (
            f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode(),
            content,
            f"\r\n--{boundary}--\r\n".encode(),
        )
    )
    form = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    [path] = json.load(
        urllib.request.urlopen(urllib.request.Request(f"{address}/gradio_api/upload", body, form))
    )
    fields = [names, task, 0.5, 0, None, None, None]
    data = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, *fields]}
    call = f"{address}/gradio_api/call/segment"
    headers = {"Content-Type": "application/json"}
    event = json.load(
        urllib.request.urlopen(urllib.request.Request(call, json.dumps(data).encode(), headers))
    )
    with urllib.request.urlopen(f"{call}/{event['event_id']}", timeout=60):
        time.sleep(0.05)


def ask_page(address: str, requests: Requests, end: float) -> None:
    client = gradio_client.Client(address, verbose=False, httpx_kwargs={"timeout": 600})
    while time.monotonic() < end:
        number, request = requests.next()
        if number % 20 == 19:
            leave(address, request)
            requests.left += 1
            continue
        name, names, task = request
        answer = client.predict(
            gradio_client.handle_file(str(ROOT / "examples" / name)), names, task, 0.5, api_name="/segment"
        )
        assert "labels" in answer, answer.get("error")
        content = base64.b64decode(answer["labels"].partition(",")[2])
        requests.answered.append((request, np.array(Image.open(io.BytesIO(content)))))


def ask_handler(handler, requests: Requests, end: float, wrong: list) -> None:
    """Two vocabularies in turn on one image: the answer must be that of the request, not of a neighbor's."""
    content = (ROOT / "examples" / "scene_1.png").read_bytes()
    while time.monotonic() < end:
        new = f"{SECRET} {secrets.token_hex(4)}"
        labels = [["water", new], [new, "concrete|cement", "water"]][secrets.randbelow(2)]
        segments = handler(
            {"inputs": content, "parameters": {"candidate_labels": labels, "subtask": "semantic"}}
        )
        if not {one["label"] for one in segments} <= {label.split("|")[0] for label in labels}:
            wrong.append((labels, segments))


@pytest.mark.slow
def test_soak(tmp_path, monkeypatch):
    from modeling_ita.handler import EndpointHandler

    monkeypatch.setenv("ITA_TEXT_CACHE", str(tmp_path / "handler"))
    model, processor = load_checkpoint(CHECKPOINT, "cpu")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "endpoint")
    handler, requests, wrong = EndpointHandler(str(tmp_path / "endpoint")), Requests(), []
    places = {"HF_HOME": "hub", "HOME": "home", "TMPDIR": "tmp", "ITA_TEXT_CACHE": "text"}
    environment = {name: str(tmp_path / folder) for name, folder in places.items()}
    for folder in environment.values():
        Path(folder).mkdir(exist_ok=True)
    with running_page("--model", "models/ita-tiny", environment=environment) as page:
        process, memory = psutil.Process(page.process), []
        end = time.monotonic() + SECONDS
        with ThreadPoolExecutor(PAGE_CLIENTS + HANDLER_CLIENTS) as pool:
            work = [pool.submit(ask_page, page.address, requests, end) for _ in range(PAGE_CLIENTS)]
            work += [pool.submit(ask_handler, handler, requests, end, wrong) for _ in range(HANDLER_CLIENTS)]
            for part in (0.5, 1.0):
                time.sleep(max(0.0, end - SECONDS * (1 - part) - time.monotonic()))
                memory.append(process.memory_info().rss)
            for one in work:
                one.result(timeout=SECONDS)
        assert [path for path in page.folder.rglob("*") if path.is_file()], "uploads are kept for a while"
        assert files_with_a_secret(tmp_path) == []
        process.terminate()
        process.wait(timeout=30)
        left = [path for path in page.folder.rglob("*") if path.is_file()]
        assert left == [], "uploads are deleted at the end"
    sys.stdout.write(
        f"\n{len(requests.answered)} answers, {requests.left} left early; memory half-way and at the end: "
        + ", ".join(f"{value / 2**20:.0f} MiB" for value in memory)
    )
    assert wrong == []
    assert requests.left > 0
    assert memory[1] - memory[0] < MAX_GROWTH
    for (name, names, task), labels in requests.answered:
        vocabulary = [one.split("|") for one in names]
        segmenter = Segmenter(model, processor, vocabulary, task, threshold=0.5)
        [expected] = segmenter.segment_images([read_image(ROOT / "examples" / name)])
        assert np.array_equal(labels, expected.label_map), (name, names[:2], task)


def files_with_a_secret(folder: Path) -> list[Path]:
    """Files in which a made-up name stands."""
    return [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
