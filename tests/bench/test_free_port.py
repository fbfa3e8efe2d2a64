"""Ports for servers that start later."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from moe_ray.bench import free_port as ports
from moe_ray.bench.free_port import free_port


def test_no_port_of_outgoing_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "range"
    file.write_text("20000\t65000\n")
    monkeypatch.setattr(ports, "_RANGE_FILE", file)
    found = {free_port() for _ in range(20)}
    assert all(65_000 < port <= 65_535 for port in found)
    assert len(found) > 1


@pytest.mark.parametrize("said", ["", "all of them", "1024 65535"])
def test_odd_ranges(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file of two numbers, or one that leaves nothing over: a port is found all the same."""
    file = tmp_path / "range"
    if said:
        file.write_text(said)
    monkeypatch.setattr(ports, "_RANGE_FILE", file)
    assert 20_000 <= free_port() <= 65_535


def test_a_port_that_is_taken_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(ports, "_candidates", lambda: [taken.getsockname()[1]] * 64)
        with pytest.raises(OSError, match=r"none of 64 ports of 127\.0\.0\.1 is free"):
            free_port()
