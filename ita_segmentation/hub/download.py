"""Download a large file once: with progress, resuming, a checksum, and Google Drive's confirmation page.

Files are kept in `ITA_DOWNLOADS` (by default `ita-segmentation` beside the Hub's cache). Beside each lies a receipt
(`NAME.json`: URL, bytes, SHA-256, date); where no checksum was known before, the receipt's is the one that a later
download of the same file must have.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
from huggingface_hub import constants
from tqdm.auto import tqdm

from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.files import write_files

FOLDER_VARIABLE = "ITA_DOWNLOADS"
CHUNK = 1 << 20
ATTEMPTS = 4  # in a row that bring no byte
PAUSE = 1.0  # seconds before the first retry
TIMEOUT = 30.0  # seconds to connect, and between two pieces


class _BrokenOffError(Exception):
    """A transfer that ended early and can be resumed."""


def downloads_folder() -> Path:
    """Return the folder in which downloads are kept."""
    return Path(os.environ.get(FOLDER_VARIABLE) or Path(constants.HF_HOME) / "ita-segmentation")


def download(url: str, name: str, sha256: str | None = None, timeout: float = TIMEOUT) -> Path:
    """Download a file, or return it if it is there already.

    An interrupted download is resumed. Nothing is fetched in the Hub's offline mode (`HF_HUB_OFFLINE=1`).

    Args:
        url: http(s) address; a page with a form for confirmation, as Google Drive has for large files, is answered.
        name: file name to keep it under.
        sha256: checksum that it must have; None takes that of an earlier download, if there was one.
        timeout: seconds to connect, and to wait for the next piece.

    Returns:
        The file in `downloads_folder()`.

    Raises:
        ITAError: it cannot be fetched or written, or has another checksum.
    """
    path = downloads_folder() / name
    receipt = path.with_name(f"{name}.json")
    recorded = _json(receipt)
    expected = sha256 or (recorded.get("sha256") if recorded.get("url") == url else None)
    if not path.is_file():
        if constants.is_offline_mode():
            raise ITAError(
                f"{name} is not downloaded yet and offline mode is on (HF_HUB_OFFLINE); it is at {url}"
            )
        _fetch(url, path, timeout)
    found = _sha256(path)
    if expected is not None and found != expected:
        rejected = path.with_name(f"{name}.rejected")
        path.replace(rejected)
        raise ITAError(
            f"{name} has the SHA-256 {found}, not {expected}, and was set aside as {rejected.name}: the file at "
            f"{url} has changed or is damaged; if you trust it, pass --sha256 {found}"
        )
    if recorded.get("sha256") != found:
        entry = {"url": url, "bytes": path.stat().st_size, "sha256": found, "date": date.today().isoformat()}
        write_files({receipt: f"{json.dumps(entry, indent=1)}\n".encode()})
    return path


def _fetch(url: str, path: Path, timeout: float) -> None:
    """Download to `path`, resuming what an earlier try left in `NAME.part`."""
    part = path.with_name(f"{path.name}.part")
    failures = 0
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with httpx.Client(follow_redirects=True, timeout=timeout) as client:
            while True:
                before = _size(part)
                try:
                    _transfer(client, *_resolve(client, url, path.name), part, path.name)
                    break
                except (_BrokenOffError, httpx.TransportError) as error:
                    failures = failures + 1 if _size(part) <= before else 0
                    if failures >= ATTEMPTS or isinstance(
                        error, httpx.ConnectError | httpx.UnsupportedProtocol
                    ):
                        raise ITAError(_failure(path.name, url, part, error)) from error
                    time.sleep(PAUSE * 2**failures)
        _state_file(part).unlink(missing_ok=True)
        part.replace(path)
    except OSError as error:
        raise ITAError(f"cannot write {part}: {error.strerror or error}") from error


def _failure(name: str, url: str, part: Path, error: Exception) -> str:
    host, reason = urlsplit(url).netloc, one_line(error, 100)
    if not _size(part):
        return f"{name} cannot be downloaded: no answer from {host} ({reason})"
    megabytes = _size(part) / 1e6
    return f"the download of {name} from {host} broke off after {megabytes:.0f} MB ({reason}); repeat it to resume"


def _resolve(client: httpx.Client, url: str, name: str) -> tuple[str, dict[str, str] | None]:
    """Find where the file itself is: where a page asks for confirmation first, that is what its form leads to."""
    fields: dict[str, str] | None = None
    for _ in range(3):
        with client.stream("GET", url, params=fields) as response:
            _check(response, name)
            if not response.headers.get("Content-Type", "").startswith("text/html"):
                return url, fields
            page = _Page()
            page.feed(response.read()[:CHUNK].decode("utf-8", "replace"))
        if page.action is None:
            break
        url, fields = urljoin(str(response.url), page.action), page.fields
    title = one_line(page.title, 80)
    raise ITAError(
        f"{name}: {url} answers with a page ({title!r}) and not with the file; download it in a browser and name it "
        "with --checkpoint"
    )


def _transfer(client: httpx.Client, url: str, fields: dict[str, str] | None, part: Path, name: str) -> None:
    """Append the rest of the file to `part`."""
    state, start = _json(_state_file(part)), _size(part)
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if state.get("validator"):
            headers["If-Range"] = state["validator"]
    with client.stream("GET", url, params=fields, headers=headers) as response:
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink()
            raise _BrokenOffError("the file has another size now")
        _check(response, name)
        resumed = response.status_code == httpx.codes.PARTIAL_CONTENT
        length = response.headers.get("Content-Length", "")
        total = (start if resumed else 0) + int(length) if length.isdecimal() else None
        if resumed and (response.headers.get("Content-Range"), total) != (
            f"bytes {start}-{(total or 0) - 1}/{total}",
            state.get("total"),
        ):
            part.unlink()
            raise _BrokenOffError("the server sends another part of the file than was asked for")
        etag = response.headers.get("ETag", "W/")
        validator = response.headers.get("Last-Modified") if etag.startswith("W/") else etag
        write_files({_state_file(part): json.dumps({"validator": validator, "total": total}).encode()})
        bar = tqdm(desc=name, total=total, initial=start if resumed else 0, unit="B", unit_scale=True)
        with bar, part.open("ab" if resumed else "wb") as file:
            for piece in response.iter_raw():
                file.write(piece)
                bar.update(len(piece))
    if total is not None and _size(part) != total:
        raise _BrokenOffError(f"{_size(part)} of {total} bytes")


def _check(response: httpx.Response, name: str) -> None:
    if response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
        raise _BrokenOffError(f"status {response.status_code}")
    if response.is_error:
        reason = f"{response.status_code} {response.reason_phrase}".strip()
        raise ITAError(f"{name} cannot be downloaded from {response.url.copy_with(query=None)}: {reason}")


def _state_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


class _Page(HTMLParser):
    """The title of a page and its last form with hidden fields."""

    def __init__(self) -> None:
        super().__init__()
        self.title = ""
        self.action: str | None = None
        self.fields: dict[str, str] = {}
        self._in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {key: value or "" for key, value in attrs}
        self._in_title = tag == "title"
        if tag == "form" and attributes.get("method", "get").lower() == "get":
            self.action, self.fields = attributes.get("action"), {}
        elif tag == "input" and attributes.get("type") == "hidden" and "name" in attributes:
            self.fields[attributes["name"]] = attributes.get("value", "")

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data.strip()


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
