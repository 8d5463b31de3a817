"""The Space: `run_app.py` with the checkpoint in `model/`."""

import os
import sys
from pathlib import Path

from ita_segmentation.cli.app import serve

os.chdir(Path(__file__).resolve().parent)
serve(["--model", "model", "--host", os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), *sys.argv[1:]])
