"""A port for a server that starts later than it is told where to listen."""

from __future__ import annotations

import random
import socket
from pathlib import Path
from typing import Final

_RANGE_FILE: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST: Final = 20_000
"""Above what Ray gives its workers (10002 to 19999)."""
_HIGHEST: Final = 65_535


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port of `host` that nobody listens on.

    It is none that the kernel would choose for an outgoing connection: such a one may be taken, and stay so, in the
    seconds until the server listens. Raises `OSError` where no port can be had.
    """
    last: OSError | None = None
    for port in random.sample(_candidates(), 64):
        try:
            with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
                return port
        except OSError as error:
            last = error
    raise OSError(f"none of 64 ports of {host} is free") from last


def _candidates() -> list[int]:
    try:
        low, high = (int(word) for word in _RANGE_FILE.read_text().split())
    except (OSError, ValueError):  # not Linux
        low, high = 49_152, _HIGHEST  # RFC 6335's dynamic ports
    ports = [port for port in range(_LOWEST, _HIGHEST + 1) if not low <= port <= high]
    return ports if len(ports) >= 64 else list(range(_LOWEST, _HIGHEST + 1))
