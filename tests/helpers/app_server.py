"""A page on a port of its own, for the tests that talk to it: a process of its own, ended when the test is over."""

import atexit
import contextlib
import functools
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "models" / "ita-tiny"


@dataclass
class Server:
    """A page that answers.

    Attributes:
        address: its URL.
        process: the id of its process.
        folder: where it keeps uploads.
    """

    address: str
    process: int
    folder: Path


@functools.cache
def shared_page() -> Server:
    """One page with small limits for all tests that only ask it something; it ends with the tests."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    limits = ("--max_pixels", "1000000", "--max_upload_mb", "2")
    return stack.enter_context(running_page("--model", "models/ita-tiny", *limits))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def running_page(*arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Starts the page with `arguments`, waits until it answers, and ends it."""
    port = free_port()
    with tempfile.TemporaryDirectory() as uploads, tempfile.TemporaryFile() as log:
        variables = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "GRADIO_TEMP_DIR": uploads,
            "GRADIO_ANALYTICS_ENABLED": "False",
            "NO_PROXY": "127.0.0.1",
            **(environment or {}),
        }
        command = [sys.executable, str(ROOT / "run_app.py"), *arguments, "--port", str(port)]
        process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_until_up(process, address)
            yield Server(address, process.pid, Path(uploads))
        except AssertionError:
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace")[-4000:])
            raise
        finally:
            process.terminate()
            process.wait(timeout=20)


def wait_until_up(process: subprocess.Popen, address: str, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, "the page ended before it answered"
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(address, timeout=20).close()
            return
        time.sleep(0.3)
    raise AssertionError("the page did not answer in time")
