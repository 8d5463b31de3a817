"""What an interrupted evaluation has counted so far, on disk, so that the next run goes on from there.

Each process writes one file of its own: the batches that it has done, and the state of the scores over them,
replaced as a whole from time to time. A batch is either in a file with its counts or not at all. The folder's name
says what was evaluated and how: another model, data set or setting never picks these files up.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import time
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ita_segmentation.files import write_files

DONE = "batches.done"


def fingerprint(description: Mapping[str, Any]) -> str:
    """Digest of everything that decides an evaluation's outcome."""
    text = json.dumps(description, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Progress:
    """The parts of one evaluation in a folder.

    Args:
        folder: where parts are; made with the first of them.
        seconds: least time between two writings; 0 writes after every batch.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds
        self._path = folder / f"part-{uuid.uuid4().hex}.npz"
        self._written = time.monotonic()

    def read(self) -> tuple[set[int], list[dict[str, np.ndarray]]]:
        """Numbers of the batches that are done, and the states that count them; unreadable parts are left out."""
        done: set[int] = set()
        states = []
        for path in sorted(self.folder.glob("part-*.npz")):
            try:
                with np.load(path, allow_pickle=False) as file:
                    state = {name: file[name] for name in file.files}
                batches = set(state.pop(DONE).tolist())
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                continue
            if not batches & done:  # two runs at once did the same: the first counts
                done |= batches
                states.append(state)
        return done, states

    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() - self._written >= self.seconds

    def write(self, done: list[int], state: Mapping[str, np.ndarray]) -> None:
        """Replaces this process's part.

        Raises:
            ITAError: if it cannot be written.
        """
        buffer = io.BytesIO()
        np.savez(buffer, **{DONE: np.array(done, dtype=np.int64)}, **state)  # type: ignore[arg-type]
        write_files({self._path: buffer.getvalue()})
        self._written = time.monotonic()

    def forget(self) -> None:
        """Removes all parts."""
        shutil.rmtree(self.folder, ignore_errors=True)
