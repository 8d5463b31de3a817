"""The memory that a call takes at its peak, beyond what is there before it."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def needs_peak_memory() -> None:
    """Skip the test where the system does not tell."""
    if not CLEAR_REFS.exists():
        pytest.skip("peak memory is read from Linux's /proc")


def peak_bytes(call: Callable[[], Any]) -> tuple[Any, int]:
    """Call, and give its result and the most memory that was resident meanwhile, less what was before."""
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR_REFS.write_text("5")  # the peak starts from what is resident now
    before = _kilobytes("VmRSS")
    result = call()
    return result, 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(name: str) -> int:
    [line] = [line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1])
