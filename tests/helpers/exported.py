"""Exported folders: without the minute that the graphs take, and in processes that cannot import torch."""

import contextlib
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent import futures
from pathlib import Path

import numpy as np
import pytest
import torch

from ita_segmentation.export.folder import write_settings, write_vocabulary
from ita_segmentation.export.network import INPUTS, OUTPUTS, ExportableNetwork, TextNetwork

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ImportError(name + " is not here")

sys.meta_path.insert(0, NoTorch())
import json
import numpy as np
sys.path.insert(0, sys.argv[1])
from ita_onnx import OnnxPredictor, parse_classes

predictor = OnnxPredictor(sys.argv[1])
classes = parse_classes(", ".join(json.loads(sys.argv[4])))
arrays = {"semantic": predictor(sys.argv[2], classes)}
for task in ("panoptic", "instance"):
    found = predictor(sys.argv[2], classes, task, threshold=0.1)
    arrays[task] = found["segmentation"]
    arrays[task + "_scores"] = [segment["score"] for segment in found["segments_info"]]
np.savez(sys.argv[3], **arrays)
"""


def write_without_graphs(model, processor, folder):
    """Write an exported folder but for its two graphs; `run_eagerly` takes their place."""
    write_settings(model, processor, folder)
    write_vocabulary(model, folder)


def run_eagerly(model):
    """Run the networks that would have been exported, for `OnnxPredictor(run=)`."""
    networks = {"image": ExportableNetwork(model), "text": TextNetwork(model)}

    def run(network, inputs):
        names, outputs = (INPUTS, OUTPUTS) if network == "image" else (["tokens"], ["embeds"])
        with torch.no_grad():
            found = networks[network](*(torch.from_numpy(inputs[name]) for name in names))
        found = found if isinstance(found, tuple) else (found,)
        return dict(zip(outputs, (output.numpy() for output in found), strict=True))

    return run


def without_torch(folder, image, output, classes):
    """Segment an image by the package in the folder, where importing torch or transformers fails."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(image), str(output), json.dumps(classes)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def assert_same(found, expected):
    """Compare an `OnnxOutputs` with the model's outputs for the image alone."""
    pairs = (
        (found.class_logits, expected.class_queries_logits[0]),
        (found.mask_logits, expected.masks_queries_logits[0]),
    )
    for one, other in pairs:
        assert one.shape == tuple(other.shape)
        assert abs(one - other.numpy()).max() <= 1e-3 * other.abs().max()
    assert list(found.dominant_categories) == expected.dominant_categories[0]
    assert found.stuff_ids == set(expected.stuff_ids[0])
    assert found.vocabulary == expected.vocabulary[0]
    assert found.image_size == tuple(expected.image_sizes[0].tolist())


# --- the browser ----------------------------------------------------------------------------------------------------


def onnxruntime_web():
    """The folder of the npm package onnxruntime-web: $ONNXRUNTIME_WEB; None without.

    `npm install --prefix DIR onnxruntime-web@VERSION` makes DIR/node_modules/onnxruntime-web.
    """
    named = os.environ.get("ONNXRUNTIME_WEB")
    return Path(named) if named else None


class _Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map = {
        ".html": "text/html",
        ".css": "text/css",
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
        ".json": "application/json",
        "": "application/octet-stream",
    }

    def log_message(self, *arguments):
        pass


def browser_labels(folder, image, classes, task):
    """Segment an image on the page of a folder, in headless Chromium on WebAssembly: labels, and the legend's text."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("the browser tests need Chromium")
    if onnxruntime_web() is None:
        pytest.skip("the page needs the npm package onnxruntime-web: ONNXRUNTIME_WEB names its folder")
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
    handler = functools.partial(_Handler, directory=folder)
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        playwright.sync_playwright() as started,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page, asked, broken = browser.new_page(viewport={"width": 1280, "height": 800}), [], []
        page.set_default_timeout(120_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: broken.append(str(error)))
        address = f"http://127.0.0.1:{server.server_port}/"
        page.goto(f"{address}index.html?backend=wasm")
        page.set_input_files("#ita-file", str(image))
        page.fill(".ita-input", ", ".join(classes))
        page.press(".ita-input", "Enter")
        page.check(f"input[value={task}]", force=True)
        page.click("#ita-run")
        page.wait_for_selector('.ita-viewer:not([data-state="empty"])')
        message = page.inner_text(".ita-message")
        assert not message and not broken, [message, *broken]
        assert all(url.startswith((address, "blob:", "data:")) for url in asked), asked
        labels = np.array(page.evaluate("Array.from(window.itaLabels)"))
        names = page.inner_text(".ita-legend")
        browser.close()
        server.shutdown()
    return labels, names


# --- Triton ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serve_triton(repository):
    """Answer Triton's inference calls from a model repository, by onnxruntime: its address."""
    import grpc
    from onnxruntime import InferenceSession
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    kinds = {"FP32": np.float32, "INT64": np.int64, "BOOL": np.bool_}

    class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
        def ModelInfer(self, request, context):  # noqa: N802
            file = repository / request.model_name / "1" / "model.onnx"
            if not file.is_file():
                context.abort(grpc.StatusCode.NOT_FOUND, "unknown model")
            session = InferenceSession(file, providers=["CPUExecutionProvider"])
            inputs = {
                one.name: np.frombuffer(content, kinds[one.datatype]).reshape(one.shape)
                for one, content in zip(request.inputs, request.raw_input_contents, strict=True)
            }
            answer = service_pb2.ModelInferResponse(model_name=request.model_name)
            for value, array in zip(session.get_outputs(), session.run(None, inputs), strict=True):
                kind = "FP32" if array.dtype == np.float32 else "INT64"
                answer.outputs.add(name=value.name, datatype=kind, shape=array.shape)
                answer.raw_output_contents.append(array.tobytes())
            return answer

    server = grpc.server(futures.ThreadPoolExecutor(1))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)
