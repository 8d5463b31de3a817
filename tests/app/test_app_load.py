"""Many people at once: every answer is right for its own image and words, and memory stays flat.

24 requests from 4 clients; with ITA_SLOW_TESTS=1, 400 from 8: memory settles within the first 200 or so, when every
thread has worked once. Figures are printed (`pytest -s`).
"""

import base64
import io
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from helpers.app_server import CHECKPOINT, ROOT, Server, running_page

gradio_client = pytest.importorskip("gradio_client", reason="the page needs gradio")
psutil = pytest.importorskip("psutil", reason="memory is read with psutil")
pytest.importorskip("pycocotools", reason="the page needs pycocotools")

SLOW = os.environ.get("ITA_SLOW_TESTS") == "1"
REQUESTS, CLIENTS = (400, 8) if SLOW else (24, 4)
IMAGES = ("scene_1.png", "scene_2.jpg", "scene_3.png", "scene_4.png", "scene_5.jpg", "scene_6.png")
WORDS = (
    ["water", "concrete", "teddy bear|teddy", "french fries"],
    ["sky", "tent", "zebra", "clock"],
    ["panda", "strawberry", "dirt", "concrete", "shark"],
    ["pig", "cactus", "water", "lava", "wood"],
)
TASKS = ("semantic", "panoptic", "instance")
MOST_GROWTH = 64 * 2**20  # bytes, between the first half of the requests and the last


def request_of(number: int) -> tuple[str, list[str], str]:
    """Image, words and task of a request: neighbours differ in all three."""
    return IMAGES[number % 6], WORDS[number // 2 % 4], TASKS[number // 3 % 3]


def expected_label_maps() -> dict[tuple, np.ndarray]:
    """What each kind of request must answer, from model and processor alone."""
    import torch

    from ita_segmentation.checkpoints import load_checkpoint
    from ita_segmentation.images import read_image

    model, processor = load_checkpoint(CHECKPOINT, "cpu")
    expected = {}
    for name, words, task in map(request_of, range(REQUESTS)):
        key = (name, tuple(words), task)
        if key in expected:
            continue
        image = read_image(ROOT / "examples" / name)
        sizes = [(image.height, image.width)]
        with torch.inference_mode():
            vocabulary = [word.split("|") for word in words]
            outputs = model(**processor(images=image, return_tensors="pt"), vocabulary=vocabulary)
        if task == "semantic":
            [labels] = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
        else:
            read_out = getattr(processor, f"post_process_{task}_segmentation")
            labels = read_out(outputs, threshold=0.5, target_sizes=sizes)[0]["segmentation"]
        expected[key] = labels.numpy()
    return expected


def ask(client, number: int) -> tuple[int, dict]:
    name, words, task = request_of(number)
    image = gradio_client.handle_file(str(ROOT / "examples" / name))
    return number, client.predict(image, words, task, 0.5, api_name="/segment")


def run_share(server: Server, numbers: range) -> list[tuple[int, dict]]:
    """One client with its share of the requests, one after the other."""
    client = gradio_client.Client(server.address, verbose=False)
    return [ask(client, number) for number in numbers]


def test_many_clients_get_right_answers_and_memory_stays_flat():
    expected = expected_label_maps()
    with running_page("--model", "models/ita-tiny") as server, ThreadPoolExecutor(CLIENTS) as pool:
        process = psutil.Process(server.process)
        memory, answers, started = [process.memory_info().rss], [], time.monotonic()
        for half in (range(REQUESTS // 2), range(REQUESTS // 2, REQUESTS)):
            shares = [half[first::CLIENTS] for first in range(CLIENTS)]
            for share in pool.map(run_share, [server] * CLIENTS, shares):
                answers += share
            memory.append(process.memory_info().rss)
        seconds = time.monotonic() - started
    figures = f"{REQUESTS} requests, {CLIENTS} clients: {seconds:.1f} s; memory at start, half-way and end: "
    figures += ", ".join(f"{value / 2**20:.0f} MiB" for value in memory)
    sys.stdout.write(f"\n{figures}\n")
    assert sorted(number for number, _ in answers) == list(range(REQUESTS))
    for number, answer in answers:
        name, words, task = request_of(number)
        assert answer.get("name") == name, answer.get("error")
        labels = np.array(Image.open(io.BytesIO(base64.b64decode(answer["labels"].partition(",")[2]))))
        assert np.array_equal(labels, expected[name, tuple(words), task]), (number, name, words, task)
        assert {entry["name"] for entry in answer["classes"]} <= {word.split("|")[0] for word in words}
    assert memory[2] - memory[1] < MOST_GROWTH
