"""URLs of our own servers, and requests to them that no proxy of the environment takes. No Ray is loaded."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, Final

from moe_ray.config.gateway import Listen
from moe_ray.errors import ConfigError

_EVERY_IPV4: Final = ("", "0.0.0.0")
_EVERY_IPV6: Final = "::"
_DIRECT: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def url_of(host: str, port: int) -> str:
    """The URL under which this machine reaches a server that listens on `host`: brackets around IPv6 addresses."""
    if host in _EVERY_IPV4:
        host = "127.0.0.1"
    elif host == _EVERY_IPV6:
        host = "::1"
    return f"http://{Listen(host, port)}"


def open_directly(url: str, timeout_s: float) -> Any:
    """`urllib.request.urlopen`, past every proxy that the environment names."""
    return _DIRECT.open(url, timeout=timeout_s)


def taken_by_proxy(url: str) -> bool:
    """Whether programs that follow the environment (curl, Ray's own commands) send requests to `url` to a proxy."""
    host = urllib.parse.urlsplit(url).hostname or ""
    proxies = urllib.request.getproxies()
    return bool(proxies.get("http") or proxies.get("all")) and not urllib.request.proxy_bypass(host)


def missing_at(health_url: str) -> list[str] | None:
    """What a gateway's `GET /health` names as missing: [] when it is ready, None when it gives no such answer."""
    try:
        with open_directly(health_url, timeout_s=5):
            return []
    except urllib.error.HTTPError as error:
        try:
            missing = json.loads(error.read()).get("missing")
        except (ValueError, AttributeError, OSError):
            return None  # Serve's own 404 or 503 while its routes are being set up
        return missing if isinstance(missing, list) else None
    except OSError:
        return None  # not listening yet


def listen_address(host: str, port: int) -> str:
    """The address to listen on for `--host`, once a socket could be bound to it and `port`.

    Raises `ConfigError` where the name is unknown, or the address or port cannot be had.
    """
    host = host.removeprefix("[").removesuffix("]")
    shown = Listen(host, port)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot listen on {shown}: {getattr(error, 'strerror', None) or error}") from None
    found.sort(key=lambda each: each[0] != socket.AF_INET)  # a name is bound as IPv4 where it has such an address
    family, kind, protocol, _, address = found[0]
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(f"cannot listen on {shown}: {error.strerror}; choose another with --port") from None
    return host if family == socket.AF_INET else str(address[0])
