"""Resume store of an interrupted evaluation.

Each process replaces one file of its own from time to time: the batches that it has done and the state of the scores
over them. A batch is in a file together with its counts or not at all. Each file carries a description of what was
evaluated and how; another model, dataset or setting never continues it.
"""

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

from ita_segmentation.errors import ITAError
from ita_segmentation.files import write_files

BATCHES, DESCRIPTION = "batches.done", "description.json"


class ResumeStore:
    """The parts of one evaluation in a folder; the description holds everything that decides its outcome."""

    def __init__(self, folder: Path, description: Mapping[str, Any], seconds: float) -> None:
        self.folder, self.seconds = folder, seconds
        self.description: dict[str, Any] = json.loads(json.dumps(description, default=str))
        self._path = folder / f"part-{uuid.uuid4().hex}.npz"
        self._written = time.monotonic()

    def read(self) -> tuple[set[int], list[dict[str, np.ndarray]]]:
        """Read what earlier runs have counted: the batches that are done, and the states over them.

        Parts that cannot be read are left out and counted again; ITAError if something else was evaluated.
        """
        done: set[int] = set()
        states = []
        for path in sorted(self.folder.glob("part-*.npz")):
            try:
                with np.load(path, allow_pickle=False) as file:
                    state = {name: file[name] for name in file.files}
                batches = set(state.pop(BATCHES).tolist())
                description = json.loads(str(state.pop(DESCRIPTION)))
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                continue
            self._check(description)
            if not batches & done:  # two runs at once did the same batches: the first file counts
                done |= batches
                states.append(state)
        return done, states

    def _check(self, description: Mapping[str, Any]) -> None:
        for key, value in self.description.items():
            if description.get(key) != value:
                raise ITAError(
                    f"{self.folder} holds the counts of an interrupted run with another {key}; "
                    "--restart deletes them"
                )

    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() - self._written >= self.seconds

    def write(self, done: list[int], state: Mapping[str, np.ndarray]) -> None:
        """Replace this process's part."""
        buffer = io.BytesIO()
        arrays = {
            BATCHES: np.array(done, dtype=np.int64),
            DESCRIPTION: np.array(json.dumps(self.description)),
        }
        np.savez(buffer, **arrays, **state)  # type: ignore[arg-type]
        write_files({self._path: buffer.getvalue()})
        self._written = time.monotonic()

    def delete(self) -> None:
        """Delete all parts."""
        shutil.rmtree(self.folder, ignore_errors=True)
