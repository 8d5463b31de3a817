"""Ways in which a run ends before its end."""

import signal
from types import FrameType
from typing import Any

FAILED = 1
PREEMPTED = 128 + signal.SIGTERM  # what a shell reports of a process that SIGTERM ended


class RunStopped(Exception):
    """A run cannot or shall not go on; the message says why, in one line.

    Attributes:
        status: exit status of the process.
    """

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status


class Preemption:
    """Whether SIGTERM came, as from a scheduler that wants its machine back; a context for the time of a run.

    Raises:
        ValueError: entered in another thread than the main one.
    """

    def __init__(self) -> None:
        self.requested = False
        self._handler_before: Any = None

    def __enter__(self) -> "Preemption":
        self._handler_before = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGTERM, self._handler_before)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
