"""Checkpoint folders of a run: complete or absent, checked before use.

A checkpoint is written under a hidden name, with a manifest of its files last, brought to the disk and then renamed to
`checkpoint-STEP`. It is deleted by renaming it first. So whenever a process ends, `checkpoint-STEP` is whole, and what
is not has a name that nobody takes for one.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
MANIFEST = "manifest.json"
LEFTOVERS = (".unfinished-", ".removed-")  # how names of what is not or no more a checkpoint begin
_BLOCK = 1 << 22


def checkpoint_folder(output: Path, step: int) -> Path:
    return output / f"checkpoint-{step}"


def unfinished(path: Path) -> Path:
    """Where a file or folder is written before it has its name."""
    return path.with_name(f"{LEFTOVERS[0]}{path.name}")


def checkpoints_of(output: Path) -> list[Path]:
    """All folders called `checkpoint-STEP`, the latest step first."""
    if not output.is_dir():
        return []
    matches = [(CHECKPOINT.fullmatch(path.name), path) for path in output.iterdir() if path.is_dir()]
    found = [(int(match[1]), path) for match, path in matches if match]
    return [path for _, path in sorted(found, reverse=True)]


def digest(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    algorithm = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            algorithm.update(block)
    return algorithm.hexdigest()


def publish(folder: Path, known_digests: dict[str, str]) -> None:
    """Gives an unfinished checkpoint its manifest and its name, in this order and each on the disk before the next.

    A checkpoint of the same name is replaced.

    Args:
        folder: the checkpoint's name; its files are in `unfinished(folder)`.
        known_digests: SHA-256 of files that need not be read for it.
    """
    written = unfinished(folder)
    files = {
        str(file.relative_to(written)): {
            "bytes": file.stat().st_size,
            "sha256": known_digests.get(file.name) or digest(file),
        }
        for file in sorted(written.rglob("*"))
        if file.is_file()
    }
    (written / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    for path in (*written.rglob("*"), written):
        flush(path)
    if folder.exists():
        remove(folder)
    os.replace(written, folder)
    flush(folder.parent)


def flush(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(folder: Path) -> None:
    """Deletes a checkpoint, which has lost its name before the first of its files goes."""
    doomed = folder.with_name(f"{LEFTOVERS[1]}{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clear_leftovers(output: Path) -> list[str]:
    """Deletes what a process that was killed left half written or half deleted; returns the names."""
    leftovers = [path for path in output.iterdir() if path.name.startswith(LEFTOVERS)]
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return [path.name for path in leftovers]


def keep_latest(output: Path, limit: int | None, best: str | None) -> None:
    """Deletes all but the `limit` latest checkpoints (None: deletes none), and never the `best`."""
    for folder in checkpoints_of(output)[limit or None :] if limit else []:
        if best is None or folder.name != Path(best).name:
            remove(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is what it was when it was written."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read"
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
        if digest(file) != expected["sha256"]:
            return f"the contents of {name} have changed"
    return None


def last_complete(output: Path) -> tuple[Path | None, list[str]]:
    """The latest checkpoint that is whole (None if there is none), and a line on each later one that is not."""
    lines: list[str] = []
    for folder in checkpoints_of(output):
        reason = damage(folder)
        if reason is None:
            return folder, lines
        lines.append(f"{folder} is damaged: {reason}")
    return None, lines
