"""URLs of servers of ours, the addresses they listen on, and requests that no proxy may take."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from moe_ray.deploy.servers import RunningServer, which_one
from moe_ray.deploy.urls import listen_address, missing_at, taken_by_proxy, url_of
from moe_ray.errors import ConfigError


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


IPV6 = pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6")
FAMILIES = [socket.AF_INET, pytest.param(socket.AF_INET6, marks=IPV6)]
PROXIES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment whose proxies answer nothing."""
    for name in PROXIES:
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def health(status: int, body: bytes, family: socket.AddressFamily = socket.AF_INET) -> Iterator[str]:
    """A server that answers every GET so."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class RunningServer(http.server.HTTPServer):
        address_family = family

    server = RunningServer(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield url_of(str(server.server_address[0]), server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def test_urls_of_what_is_bound() -> None:
    assert url_of("127.0.0.1", 80) == url_of("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert url_of("::1", 80) == url_of("::", 80) == "http://[::1]:80"
    assert url_of("2001:db8::7", 80) == "http://[2001:db8::7]:80"
    assert url_of("host.example", 80) == "http://host.example:80"


@pytest.mark.usefixtures("proxied")
@pytest.mark.parametrize("family", FAMILIES)
def test_health_is_asked_past_proxies(family: socket.AddressFamily) -> None:
    with health(200, b"{}", family) as url:
        assert missing_at(f"{url}/health") == []
    with health(503, json.dumps({"missing": ["Expert3"]}).encode(), family) as url:
        assert missing_at(f"{url}/health") == ["Expert3"]


def test_answers_that_are_not_a_gateway_s() -> None:
    for body in (b"Not Found", b"[]", b'{"missing": 3}', b"{}"):
        with health(404, body) as url:
            assert missing_at(f"{url}/health") is None
    assert missing_at(f"{url}/health") is None, "nothing listens there"


@pytest.mark.usefixtures("proxied")
def test_what_a_shell_sends_to_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert taken_by_proxy("http://127.0.0.1:8000")
    assert taken_by_proxy("http://[::1]:8000")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert not taken_by_proxy("http://127.0.0.1:8000")
    for name in PROXIES:
        monkeypatch.delenv(name)
    assert not taken_by_proxy("http://[::1]:8000")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "0.0.0.0", "localhost", *(pytest.param(host, marks=IPV6) for host in ("::1", "::", "[::1]"))]
)
def test_addresses_that_can_be_bound(host: str) -> None:
    assert listen_address(host, 0) == host.strip("[]")


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("192.0.2.1", r"cannot listen on 192\.0\.2\.1:8000: Cannot assign"),
        ("2001:db8::1", r"cannot listen on \[2001:db8::1\]:8000: "),
        ("no-such-host.invalid", r"cannot listen on no-such-host\.invalid:8000: "),
        ("a..b", r"cannot listen on a\.\.b:8000: "),
    ],
)
def test_addresses_that_cannot(host: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        listen_address(host, 8000)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_port_in_use_is_named(family: socket.AddressFamily) -> None:
    host = "::1" if family == socket.AF_INET6 else "127.0.0.1"
    with socket.socket(family) as taken:
        taken.bind((host, 0))
        taken.listen()
        with pytest.raises(ConfigError, match="Address already in use; choose another with --port"):
            listen_address(host, taken.getsockname()[1])


def test_every_server_is_named() -> None:
    two = [
        RunningServer("127.0.0.1:6379", "http://127.0.0.1:8000"),
        RunningServer("127.0.0.1:6380", "http://[::1]:9101"),
    ]
    said = which_one(two)
    assert said.startswith("2 servers run on this machine")
    for server in two:
        assert f"--address {server.address} ({server.url})" in said
