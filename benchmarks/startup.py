"""What is paid before the first result: commands from a cold start, imports, loading, and encoding a vocabulary.

Each figure is the fastest of some processes of their own; prints a Markdown table. `python -X importtime -m
ita_segmentation.cli.main predict --help` shows where imports go.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import made_up_vocabulary
from speed import machine

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "models" / "ita-tiny"

COMMAND = "import sys; from ita_segmentation.cli.main import main; sys.argv[0] = 'ita'; main()"

IMPORTS = """
import json, time
import torch, torchvision, transformers, open_clip
from transformers import AutoModel, PreTrainedModel
from transformers.image_processing_backends import TorchvisionBackend
start = time.perf_counter()
import modeling_ita
print(json.dumps({"import": time.perf_counter() - start}))
"""

LOAD = """
import json, sys, time
from pathlib import Path
import modeling_ita
from transformers import AutoModel
weights = next(Path(sys.argv[1]).glob("*.safetensors"))
start = time.perf_counter()
content = weights.read_bytes()
read = time.perf_counter() - start
del content
start = time.perf_counter()
model = AutoModel.from_pretrained(sys.argv[1])
load = time.perf_counter() - start
print(json.dumps({"read": read, "load": load}))
"""

TEXT = """
import json, sys, time
import torch
import modeling_ita
from transformers import AutoModel
vocabulary = json.loads(sys.stdin.read())
model = AutoModel.from_pretrained(sys.argv[1])
if sys.argv[2] == "made-up":
    width = model.clip_backbone.embed_dim
    model.clip_backbone.encode_tokens = lambda tokens, prefixes: torch.randn(len(tokens), width)
    model.clip_backbone.tokenize = lambda prompts: (torch.zeros(len(prompts), 1, dtype=torch.int64), 0)
start = time.perf_counter()
model.encode_vocabulary(vocabulary)
print(json.dumps({"text": time.perf_counter() - start}))
"""

BUILD = """
import sys
from modeling_ita import ITAConfig, ITAForOpenVocabSegmentation
ITAForOpenVocabSegmentation(ITAConfig(clip_model_name=sys.argv[2])).save_pretrained(sys.argv[1])
"""


def python(code: str, *arguments: str, environment: dict[str, str], text: str = "") -> tuple[float, str]:
    """Runs code in a process of its own; gives its seconds and its last line. Raises RuntimeError where it fails."""
    command = [sys.executable, "-c", code, *arguments]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}
    start = time.perf_counter()
    done = subprocess.run(command, check=False, input=text, capture_output=True, text=True, env=variables)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return seconds, (done.stdout.splitlines() or [""])[-1]


def command_rows(folder: Path, environment: dict[str, str], repeats: int) -> list[tuple[str, float]]:
    """Seconds of commands from start to end, with what is on disk after an earlier run."""
    image = str(ROOT / "examples" / "scene_1.png")
    predict = ["predict", "--model", str(SHIPPED), "--images", image, "--output", str(folder / "out")]
    commands = {
        "`ita --version`": ["--version"],
        "`ita predict --help`": ["predict", "--help"],
        "`ita predict`, one image, three classes": [*predict, "--classes", "water, concrete, teddy bear"],
        "`ita predict`, one image, the checkpoint's 178 classes": predict,
    }
    first, _ = python(COMMAND, *predict, environment={**environment, "ITA_TEXT_CACHE": "off"})
    rows = [("`ita predict`, one image, 178 classes, nothing on disk", first)]
    for title, arguments in commands.items():
        python(COMMAND, *arguments, environment=environment)
        rows.append(
            (title, min(python(COMMAND, *arguments, environment=environment)[0] for _ in range(repeats)))
        )
    return rows


def model_rows(
    folder: Path, environment: dict[str, str], clip: str, classes: int, repeats: int
) -> list[tuple[str, float]]:
    """Seconds of loading a large checkpoint and a large vocabulary."""

    def fastest(code: str, key: str, *arguments: str, text: str = "") -> float:
        lines = (python(code, *arguments, environment=environment, text=text)[1] for _ in range(repeats))
        return min(json.loads(line)[key] for line in lines)

    vocabulary, model = json.dumps(made_up_vocabulary(classes)), str(folder / "model")
    python(BUILD, model, clip, environment=environment)
    python(TEXT, model, "made-up", environment=environment, text=vocabulary)
    return [
        ("`import modeling_ita`, after the libraries", fastest(IMPORTS, "import")),
        (f"{clip}: reading the file", fastest(LOAD, "read", model)),
        (f"{clip}: `AutoModel.from_pretrained`", fastest(LOAD, "load", model)),
        (f"{classes:,} classes from disk", fastest(TEXT, "text", model, "own", text=vocabulary)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--clip", help="also a checkpoint with this tower of open_clip, such as convnext_large_d_320"
    )
    parser.add_argument("--classes", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3, help="processes, of which the fastest counts")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {"ITA_TEXT_CACHE": str(folder / "text")}
        rows = command_rows(folder, environment, args.repeats)
        if args.clip:
            rows += model_rows(folder, environment, args.clip, args.classes, args.repeats)
    print("| what | seconds |\n| --- | --- |")
    print("\n".join(f"| {title} | {seconds:.2f} |" for title, seconds in rows))
    print(f"\n*{machine(torch.get_num_threads())}, {datetime.date.today().isoformat()}.*")


if __name__ == "__main__":
    main()
