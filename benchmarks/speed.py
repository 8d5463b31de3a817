"""Speed and memory of the network and the semantic post-processing, beside the frozen backbone in the same process.

Each size and vocabulary is measured in a process of its own (`measure.py`). Writes `speed.json` and `speed.md`.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from measure import STAGES, at_least
from tqdm import tqdm

from modeling_ita.clip_backbone import resolve_clip_config

MEASURE = Path(__file__).with_name("measure.py")


def image_size(text: str) -> tuple[int, int]:
    """Reads `512` or `800x1333`: height and width."""
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not found or "0" in found.groups():
        raise argparse.ArgumentTypeError(f"a size is a number of pixels or HEIGHTxWIDTH, got {text!r}")
    return int(found[1]), int(found[2] or found[1])


def run(
    clip: str, size: tuple[int, int], classes: int, repeats: int, threads: int, **more: Any
) -> dict[str, Any]:
    """One measurement in a process of its own; `more`: further options of `measure.py`.

    Raises RuntimeError with the last line of what went wrong.
    """
    settings = {
        "clip": clip,
        "height": size[0],
        "width": size[1],
        "classes": classes,
        "repeats": repeats,
        "threads": threads,
        **more,
    }
    command = [
        sys.executable,
        str(MEASURE),
        *(str(part) for key, value in settings.items() for part in (f"--{key}", value)),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"{size[0]} x {size[1]}, {classes} classes: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def machine(threads: int) -> str:
    """The machine in words."""
    names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    count = "1 thread" if threads == 1 else f"{threads} threads"
    return f"{names[0] if names else platform.machine()}, {count}, torch {torch.__version__}"


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table; times in seconds, memory in GiB."""
    stages = [stage.upper() if len(stage) == len("dcu") else stage for stage in STAGES]
    heads = ["size", "classes", "names", *stages, "rest", "total", "x float32 backbone", "first call", "GiB"]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for result in results:
        seconds = [f"{result['seconds'][stage]:.2f}" for stage in (*STAGES, "rest", "total")]
        cells = [
            f"{result['height']} x {result['width']}",
            str(result["classes"]),
            str(result["names"]),
            *seconds,
            f"{result['ratio']:.2f}",
            f"{result['first_call_seconds']:.1f}",
            f"{result['peak_bytes'] / 2**30:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clip", default="convnext_large_d_320", help="open_clip's name of the frozen CLIP")
    parser.add_argument(
        "--sizes", nargs="+", type=image_size, default=[(512, 512), (640, 640), (800, 1333), (1024, 1024)]
    )
    parser.add_argument("--vocabularies", nargs="+", type=at_least(1), default=[20, 150, 847, 10_000])
    parser.add_argument(
        "--repeats", type=at_least(1), default=3, help="warm calls, of which the middle one counts"
    )
    parser.add_argument("--threads", type=at_least(1), default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--output", type=Path, default=Path("outputs/speed"), help="a folder")
    args = parser.parse_args()
    try:
        resolve_clip_config(args.clip, None)
    except ValueError as error:
        parser.error(str(error))
    args.output.mkdir(parents=True, exist_ok=True)
    results = []
    pairs = [(size, classes) for size in args.sizes for classes in args.vocabularies]
    for size, classes in tqdm(pairs, unit="measurement"):
        try:
            results.append(run(args.clip, size, classes, args.repeats, args.threads, dtype=args.dtype))
        except RuntimeError as error:
            sys.exit(f"speed.py: {error}")
    about = {
        "machine": machine(args.threads),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "benchmarks/speed.py", *sys.argv[1:]]),
        "clip": args.clip,
    }
    (args.output / "speed.json").write_text(json.dumps(about | {"results": results}, indent=2) + "\n")
    text = f"{table(results)}\n*Seconds, one image; {about['machine']}; `{about['command']}`, {about['date']}.*\n"
    (args.output / "speed.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
