"""A folder for the uploads of one server: deleted when it ends, or, if it was killed, when the next one starts."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: what a killed server leaves stays
    fcntl = None  # type: ignore[assignment]

PREFIX = "ita-uploads-"
LOCK = ".lock"


@contextlib.contextmanager
def upload_folder(parent: Path | None = None) -> Iterator[Path]:
    """Make a folder of this process's own, for the time of the block, and delete those of servers that are gone.

    A server holds a lock on a file in its folder, which ends with the process however that ends.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    for left in parent.glob(f"{PREFIX}*"):
        _delete_if_unused(left)
    made = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=parent))
    folder = parent / made.name[1:]
    try:
        with (made / LOCK).open("w") as lock:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            made.rename(folder)  # seen by other servers only now that it is locked
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _delete_if_unused(folder: Path) -> None:
    if fcntl is None or folder.stat().st_uid != os.getuid():
        return
    with contextlib.suppress(OSError), (folder / LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
