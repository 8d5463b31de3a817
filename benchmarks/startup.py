"""What is paid before the first image: imports, loading a checkpoint, and encoding a large vocabulary or reading it.

Builds a checkpoint with random weights, and measures each figure in a process of its own; prints a Markdown table.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from measure import made_up_vocabulary
from speed import machine

IMPORTS = """
import json, time
import torch, transformers
from transformers import AutoModel, PreTrainedModel
from transformers.image_processing_backends import TorchvisionBackend
start = time.perf_counter()
import modeling_ita
print(json.dumps({"import": time.perf_counter() - start}))
"""

LOAD = """
import json, sys, time
from pathlib import Path
import modeling_ita, open_clip
from transformers import AutoModel
weights = next(Path(sys.argv[1]).glob("*.safetensors"))
start = time.perf_counter()
content = weights.read_bytes()
read = time.perf_counter() - start
del content
start = time.perf_counter()
model = AutoModel.from_pretrained(sys.argv[1])
load = time.perf_counter() - start
start = time.perf_counter()
total = sum(float(tensor.sum()) for tensor in model.state_dict().values())
print(json.dumps({"read": read, "load": load, "first touch": time.perf_counter() - start}))
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
    model.clip_backbone.encode_tokens = lambda tokens: torch.randn(len(tokens), width)
    model.clip_backbone.tokenize = lambda prompts: (torch.zeros(len(prompts), 1, dtype=torch.int64), 0)
start = time.perf_counter()
model.encode_vocabulary(vocabulary)
print(json.dumps({"text": time.perf_counter() - start, "encoded": model.vocabulary_encoder.names_encoded}))
"""

BUILD = """
import sys
from modeling_ita import ITAConfig, ITAForOpenVocabSegmentation
ITAForOpenVocabSegmentation(ITAConfig(clip_model_name=sys.argv[2])).save_pretrained(sys.argv[1])
"""


def python(code: str, *words: str, environment: dict[str, str], text: str = "") -> dict[str, float]:
    """Runs code in a process of its own and reads the JSON in its last line. Raises RuntimeError where it fails."""
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clip", default="convnext_large_d_320", help="open_clip's name of the frozen CLIP")
    parser.add_argument("--classes", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5, help="runs, of which the fastest counts")
    args = parser.parse_args()
    vocabulary = json.dumps(made_up_vocabulary(args.classes))
    names = len(made_up_vocabulary(args.classes).names)
    with tempfile.TemporaryDirectory() as folder:
        store = {"ITA_TEXT_CACHE": str(Path(folder, "text"))}
        model = str(Path(folder, "model"))
        python(BUILD, model, args.clip, environment=store)
        imports = [python(IMPORTS, environment=store)["import"] for _ in range(args.repeats)]
        loads = [python(LOAD, model, environment=store) for _ in range(args.repeats)]
        python(TEXT, model, "made-up", environment=store, text=vocabulary)
        texts = [python(TEXT, model, "own", environment=store, text=vocabulary) for _ in range(args.repeats)]
    if any(text["encoded"] for text in texts):
        sys.exit("startup.py: names that were kept on disk were encoded again")
    load = min(loads, key=lambda one: one["load"] / one["read"])
    print("| what | seconds |\n| --- | --- |")
    print(f"| `import modeling_ita`, after torch and transformers | {min(imports):.2f} |")
    print(f"| reading the checkpoint's file | {load['read']:.2f} |")
    print(
        f"| `AutoModel.from_pretrained` | {load['load']:.2f} ({load['load'] / load['read']:.2f} x reading) |"
    )
    print(f"| ... touching every weight for the first time | {load['first touch']:.2f} |")
    print(f"| {args.classes:,} classes ({names:,} names), from disk | {min(t['text'] for t in texts):.2f} |")
    print(f"\n*{machine(torch.get_num_threads())}, {args.clip}, {datetime.date.today().isoformat()}.*")


if __name__ == "__main__":
    main()
