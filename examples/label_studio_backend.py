"""Answer Label Studio's requests for predictions with a checkpoint.

    python examples/label_studio_backend.py --model models/ita-tiny --port 9090

Enter http://localhost:9090 under "Settings / Model / Connect model" of a project. The classes are the
labels of the project's BrushLabels or PolygonLabels. Images must be http(s) URLs that this machine can read.
"""

import argparse
import json
import re
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ita_segmentation.checkpoints import load_checkpoint
from ita_segmentation.errors import ITAError
from ita_segmentation.integrations import label_studio_task
from ita_segmentation.prediction import Segmenter
from modeling_ita.image_io import read_image

MAX_REQUEST_BYTES = 10_000_000


class Backend(BaseHTTPRequestHandler):
    """The three requests that Label Studio sends: GET /health, POST /setup and POST /predict."""

    checkpoint: tuple[Any, Any]
    task: str

    def do_GET(self) -> None:
        """Say that the server is up."""
        self._answer({"status": "UP", "model_class": "ITA"})

    def do_POST(self) -> None:
        """Answer with the model's version, or with a prediction for each task."""
        length = int(self.headers.get("Content-Length") or 0)
        if length > MAX_REQUEST_BYTES:
            self._answer({"error": "the request is too large"}, status=413)
            return
        request = json.loads(self.rfile.read(length) or b"{}")
        if self.path.rstrip("/").endswith("/predict"):
            try:
                self._answer({"results": self._predict(request)})
            except (ITAError, ValueError, OSError) as error:
                self._answer({"error": str(error)}, status=400)
        else:
            self._answer({"model_version": "ita"})

    def _predict(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        interface = ElementTree.fromstring(request["label_config"])
        tag = next(one for one in interface.iter() if one.tag in ("BrushLabels", "PolygonLabels"))
        names = [[label.attrib["value"]] for label in tag.iter("Label")]
        segmenter = Segmenter(*self.checkpoint, names, self.task, keep_overlaps=True)
        predictions = []
        for task in request["tasks"]:
            url = str(task["data"]["image"])
            if not re.match(r"https?://", url):
                raise ValueError(f"{url} is not an http(s) URL")
            [result] = segmenter.segment_images([read_image(url)])
            if isinstance(result, ITAError):
                raise result
            predictions += label_studio_task(result, url, polygons=tag.tag == "PolygonLabels")["predictions"]
        return predictions

    def _answer(self, document: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--task", default="panoptic", choices=("semantic", "panoptic", "instance"))
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9090)
    options = parser.parse_args()
    Backend.checkpoint, Backend.task = load_checkpoint(options.model), options.task
    HTTPServer((options.host, options.port), Backend).serve_forever()


if __name__ == "__main__":
    main()
