"""URLs are fetched within a time and a size, and on request from the public internet only."""

import contextlib
import socket
import ssl
import threading
import time

import pytest

from modeling_ita import image_io
from modeling_ita.image_io import fetch_url, is_public_address


@contextlib.contextmanager
def served(*answers, pause=0.0):
    """A server on this machine that gives one answer to each connection, byte by byte where there is a pause."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        for answer in answers:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    for part in [answer[i : i + 1] for i in range(len(answer))] if pause else [answer]:
                        connection.sendall(part)
                        time.sleep(pause)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def answer(body=b"content", status="200 OK", **headers):
    lines = [
        f"HTTP/1.1 {status}",
        *(f"{key}: {value}" for key, value in headers.items()),
        "Connection: close",
        "",
        "",
    ]
    return "\r\n".join(lines).encode() + body


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def test_content_is_fetched_through_redirects():
    with served(answer(b"", "302 Found", Location="/elsewhere"), answer(b"\x00\xff")) as url:
        assert fetch_url(url) == b"\x00\xff"


@pytest.mark.parametrize("slow", ["headers", "body"])
def test_the_time_limit_is_for_the_whole_of_it(slow):
    """A byte arrives long before any single read gives up."""
    content = (
        answer(b"x" * 60) if slow == "body" else answer(**{f"X-{number}": "long" for number in range(9)})
    )
    with served(content, pause=0.02) as url:
        started = time.monotonic()
        with pytest.raises(ValueError, match=r"cannot be fetched: it takes more than 0\.3 seconds"):
            fetch_url(url, timeout=0.3)
        assert time.monotonic() - started < 1.0


def test_a_handshake_that_does_not_end_is_given_up():
    with served(b"\x16\x03\x01", pause=0.2) as url, pytest.raises(ValueError, match="cannot be fetched"):
        fetch_url(url.replace("http:", "https:"), timeout=0.3)
    handler = image_io._DeadlineHandler(time.monotonic() + 1, True)
    assert issubclass(handler._context.sslsocket_class, image_io._DeadlineSocketMixin)
    assert handler._context.verify_mode == ssl.CERT_REQUIRED


def test_too_much_content_is_refused(monkeypatch):
    monkeypatch.setattr(image_io, "MAX_DOWNLOAD_BYTES", 2**20)
    for size in (2**20, 2**20 + 1):
        with served(answer(bytes(size))) as url:
            if size == 2**20:
                assert len(fetch_url(url)) == size
            else:
                with pytest.raises(ValueError, match="more than the 1 MiB allowed"):
                    fetch_url(url)


@pytest.mark.parametrize(
    "content",
    [
        b"no answer of HTTP\r\n\r\n",
        b"",
        answer(status="404 Not Found"),
        answer(b"", "302 Found", Location="ftp://example.org/image.png"),
        answer(b"", "302 Found", Location="file:///etc/hostname"),
        answer(b"", "302 Found", Location="http://["),
        answer(**{"Transfer-Encoding": "chunked"}),
        answer(**{f"X-{number}": "many" for number in range(200)}),
    ],
)
def test_what_a_server_does_wrong_is_one_line(content):
    with served(content) as url, pytest.raises(ValueError, match="cannot be fetched: ") as error:
        fetch_url(url)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http://[",
        "http://host:port/",
        "http://127.0.0.1:99999999999/",
        "http://127.0.0.1:1/",
        "http://a b/",
        "http://a\nb/",
        "http://\ud800/",
        "http://" + "a" * 70_000,
        "https://user:password@/",
    ],
)
def test_a_url_that_leads_nowhere_is_one_short_line(url):
    with pytest.raises(ValueError, match="cannot be fetched") as error:
        fetch_url(url, timeout=2)
    message = str(error.value)
    assert "\n" not in message and len(message) < 500 and message.encode()


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://example.org/a.png", "data:,a", "image.png"])
def test_other_schemes_are_refused(url):
    with pytest.raises(ValueError, match="is not a URL of http or https"):
        fetch_url(url)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        *((address, False) for address in ("127.0.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1")),
        *((address, False) for address in ("169.254.169.254", "100.64.0.1", "224.0.0.1", "255.255.255.255")),
        *((address, False) for address in ("::1", "fe80::1", "fd00::1", "ff02::1", "::ffff:127.0.0.1")),
        *((address, False) for address in ("64:ff9b::7f00:1", "2002:7f00:1::", "::ffff:10.0.0.1")),
    ],
)
def test_what_is_on_the_public_internet(address, public):
    assert is_public_address(address) is public


def resolving(monkeypatch, **hosts):
    """Let names of hosts resolve to given addresses, the next one at each look."""
    real = socket.getaddrinfo

    def getaddrinfo(host, port, *arguments, **options):
        addresses = hosts.get(host.replace(".", "_"))
        return real(addresses.pop(0) if addresses else host, port, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def test_a_private_address_is_refused_also_behind_a_name(monkeypatch):
    with served(answer()) as url:
        for host in ("127.0.0.1", "localhost", "0.0.0.0", "innocent.example"):
            resolving(monkeypatch, innocent_example=["127.0.0.1"])
            with pytest.raises(ValueError, match="its host is not on the public internet"):
                fetch_url(url.replace("127.0.0.1", host), allow_private_addresses=False)


def test_a_redirect_to_a_private_address_is_refused(monkeypatch):
    """The first host counts as public here, the one it leads to does not."""
    public = is_public_address
    monkeypatch.setattr(image_io, "is_public_address", lambda ip: ip == "127.0.0.1" or public(ip))
    for target in ("http://127.0.0.2/", "http://169.254.169.254/latest/meta-data"):
        with (
            served(answer(b"", "302 Found", Location=target)) as url,
            pytest.raises(ValueError, match="its host is not on the public internet"),
        ):
            fetch_url(url, allow_private_addresses=False)


def test_the_address_that_is_checked_is_the_one_that_is_connected_to(monkeypatch):
    """A name that resolves to a public address first and to this machine afterwards is asked for once only."""
    resolving(monkeypatch, rebinding_example=["192.0.2.1", "127.0.0.1"])
    monkeypatch.setattr(image_io, "is_public_address", lambda ip: ip == "192.0.2.1")
    connected = []

    def connect(self, where):
        connected.append(where)
        raise OSError("there is no such network here")

    monkeypatch.setattr(image_io._DeadlineSocket, "connect", connect)
    with pytest.raises(ValueError, match="cannot be fetched"):
        fetch_url("http://rebinding.example/", allow_private_addresses=False)
    assert connected == [("192.0.2.1", 80)]
