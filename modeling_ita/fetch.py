"""Fetch a URL of http or https within a time and a size, and on request from the public internet only."""

import http.client
import ipaddress
import os
import socket
import ssl
import time
import urllib.error
import urllib.request
from typing import Any

MAX_DOWNLOAD_BYTES = 256 * 2**20
DOWNLOAD_SECONDS = 30.0
NAT64 = ipaddress.ip_network("64:ff9b::/96")


def printable(name: str | bytes) -> str:
    """Return at most 200 characters of a file's name or a URL, on one line, without unpaired surrogates."""
    name = os.fsdecode(name)
    name = name if len(name) <= 200 else f"{name[:199]}…"
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in name)


def _escaped(letter: str) -> str:
    """Escape a character; a byte that is not UTF-8, which Python holds as a surrogate, as that byte."""
    return f"\\x{ord(letter) - 0xDC00:02x}" if "\udc80" <= letter <= "\udcff" else ascii(letter)[1:-1]


def is_url(text: str) -> bool:
    """Tell whether a text is a URL of http or https."""
    return text[:8].lower().startswith(("http://", "https://"))


def fetch_url(url: str, timeout: float | None = None, allow_private_addresses: bool = True) -> bytes:
    """Fetch a URL of http or https, following redirects.

    Args:
        url: URL.
        timeout: seconds that all of it may take, whatever the server sends in between (default 30).
        allow_private_addresses: False refuses hosts, also those of redirects, that are not on the public internet
            (loopback, link-local, private addresses), and uses no proxy. The address that is checked is the one that
            is connected to.

    Returns:
        At most `MAX_DOWNLOAD_BYTES` bytes.

    Raises:
        ValueError: in one line that names the URL, if it cannot be fetched, is refused, too slow or too large.
    """
    shown = printable(url)
    if not is_url(url):
        raise ValueError(f"{shown} is not a URL of http or https")
    seconds = DOWNLOAD_SECONDS if timeout is None else timeout
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(None if allow_private_addresses else {}),
        _DeadlineHandler(time.monotonic() + seconds, allow_private_addresses),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "ita-segmentation"})
        with opener.open(request, timeout=seconds) as response:
            data = response.read(MAX_DOWNLOAD_BYTES + 1)
    except urllib.error.HTTPError as error:
        raise ValueError(
            f"{shown} cannot be fetched: HTTP {error.code} {printable(str(error.reason))}"
        ) from error
    except TimeoutError as error:
        raise ValueError(f"{shown} cannot be fetched: it takes more than {seconds:g} seconds") from error
    except (OSError, ValueError, ArithmeticError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, TimeoutError):
            reason = f"it takes more than {seconds:g} seconds"
        raise ValueError(
            f"{shown} cannot be fetched: {printable(str(reason) or type(error).__name__)}"
        ) from error
    if len(data) > MAX_DOWNLOAD_BYTES:
        raise ValueError(f"{shown} has more than the {MAX_DOWNLOAD_BYTES // 2**20} MiB allowed")
    return data


class _DeadlineHandler(urllib.request.AbstractHTTPHandler):
    """Opens URLs of http and https through sockets that are checked and keep one deadline.

    Args:
        deadline: of everything that is fetched, on the clock of `time.monotonic`.
        allow_private_addresses: as for `fetch_url`.
    """

    def __init__(self, deadline: float, allow_private_addresses: bool):
        super().__init__()
        self._deadline = deadline
        self._allow_private_addresses = allow_private_addresses
        self._context = ssl.create_default_context()
        self._context.sslsocket_class = type(
            "_DeadlineSSLSocket", (_DeadlineSocketMixin, ssl.SSLSocket), {"deadline": deadline}
        )

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection(http.client.HTTPConnection), request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection(http.client.HTTPSConnection), request, context=self._context)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def _connection(self, kind: Any) -> Any:
        def connection(*arguments: Any, **options: Any) -> http.client.HTTPConnection:
            made = kind(*arguments, **options)
            made._create_connection = self._connect
            return made

        return connection

    def _connect(self, address: tuple[str, int], *_: Any) -> socket.socket:
        """Connect to the first address of (host, port) that answers; as `socket.create_connection`."""
        found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
        if not self._allow_private_addresses and not all(
            is_public_address(str(where[0])) for *_, where in found
        ):
            raise OSError("its host is not on the public internet")
        failure: OSError | None = None
        for family, kind, protocol, _name, where in found:
            opened = _DeadlineSocket(family, kind, protocol)
            opened.deadline = self._deadline
            try:
                opened.settimeout(remaining_seconds(self._deadline))
                opened.connect(where)
            except OSError as error:
                opened.close()
                failure = error
            else:
                return opened
        raise failure or OSError("its host has no address")


class _DeadlineSocketMixin:
    """A socket whose reads all end at one deadline."""

    deadline = float("inf")

    def recv_into(self, *arguments: Any, **options: Any) -> int:
        self.settimeout(remaining_seconds(self.deadline))  # type: ignore[attr-defined]
        return super().recv_into(*arguments, **options)  # type: ignore[misc]


class _DeadlineSocket(_DeadlineSocketMixin, socket.socket):
    pass


def remaining_seconds(deadline: float) -> float:
    """Return the seconds until a deadline.

    Raises:
        TimeoutError: if it has passed.
    """
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("timed out")
    return seconds


def is_public_address(address: str) -> bool:
    """Tell whether an IP address is on the public internet: unicast, and in no range that leads elsewhere."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address) and (ip.sixtofour or ip.teredo or ip in NAT64):
        return False  # carries an IPv4 address, which may be private
    return ip.is_global and not ip.is_multicast
