"""Checks of the ports that a server and a Ray listen on."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import psutil

from moe_ray.deploy.urls import missing_at, url_of
from moe_ray.doctor.finding import Finding, Subject, error, ok, warning

DASHBOARD: Final = 8265
RAY: Final = 6379
LOOPBACK: Final = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class PortFacts:
    """One port of this machine."""

    number: int
    use: str
    needed: bool
    """A server cannot do without; of the others Ray takes the next one that is free."""
    free: bool
    owner: str = ""
    """Who listens there, as far as this user may know."""
    ours: bool = False
    """A moe_ray server or a Ray of this user listens there."""


def port_facts(subject: Subject) -> list[PortFacts]:
    """Try to bind each port; ask who has it."""
    uses = ((subject.port, "HTTP", True), (DASHBOARD, "Ray's dashboard", False), (RAY, "`ray start --head`", False))
    return [_facts(number, use, needed) for number, use, needed in uses]


def check_ports(ports: Sequence[PortFacts]) -> list[Finding]:
    """Ports are free, or ours."""
    taken = [port for port in ports if not port.free and not port.ours]
    found = []
    for port in taken:
        says = f"{port.number} ({port.use}) is taken{f' by {port.owner}' if port.owner else ''}"
        if port.needed:
            found.append(error("ports", says, "choose another with --port, or end what has it"))
        else:
            found.append(warning("ports", says, "nothing, unless you need that very number: Ray takes another"))
    said = ", ".join(f"{port.number} {'free' if port.free else f'in use by {port.owner}'}" for port in ports)
    return found or [ok("ports", said)]


def examine_ports(subject: Subject) -> Sequence[Finding]:
    """HTTP's port, and Ray's."""
    return check_ports(port_facts(subject))


def _facts(number: int, use: str, needed: bool) -> PortFacts:
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((LOOPBACK, number))
            return PortFacts(number, use, needed, free=True)
    except OSError:
        pass
    if needed and missing_at(f"{url_of(LOOPBACK, number)}/health") is not None:
        return PortFacts(number, use, needed, free=False, owner="a moe_ray server", ours=True)
    owner = _owner(number)
    return PortFacts(number, use, needed, free=False, owner=owner, ours=not needed and "ray" in owner)


def _owner(port: int) -> str:
    try:
        listening = [each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
        pids = [each.pid for each in listening if each.laddr and each.laddr.port == port and each.pid]
        if not pids:
            return ""
        process = psutil.Process(pids[0])
        name = process.name()
        words = " ".join(process.cmdline())
    except psutil.Error:
        return ""
    if "gcs_server" in name or ("dashboard" in words and "ray" in words):
        name = f"ray's {name}"
    return f"{name} (pid {pids[0]})"
