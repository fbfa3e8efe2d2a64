"""Connecting to a replica's port: Unix socket or TCP, TLS if asked, and a mutual proof of the cluster token."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import select
import socket
import ssl
import struct
import sys
from dataclasses import dataclass
from typing import Final

from moe_ray.errors import ConfigError, ProtocolError
from moe_ray.transport.base import LinkOptions
from moe_ray.transport.version import WIRE_VERSION, other_version

ABSTRACT_UNIX = sys.platform == "linux"
"""Unix sockets without a file vanish with their process, however it ends; the token guards them as it does TCP."""
_NONCE, _MAC = 32, 32
SILENT_RETRANSMITS, SILENT_MS = 3, 1000
"""Timeouts in a row, and time without an acknowledgement, from which on a machine is taken for gone."""
_TCP_INFO = struct.Struct("=2xB21xI28xI")
"""tcpi_retransmits, tcpi_unacked and tcpi_last_ack_recv (ms), each at its offset: 2, 24, 56."""


@dataclass(frozen=True, slots=True)
class PortKind:
    """What a port serves. A proof of the token is for one service and one role in it."""

    name: bytes
    """15 bytes."""
    asks: bytes
    answers: bytes

    @property
    def hello(self) -> bytes:
        """What the port says first, 16 bytes: its name and, in one character, its version."""
        return self.name + _VERSIONS[WIRE_VERSION : WIRE_VERSION + 1]


_VERSIONS: Final = b"0123456789abcdefghijklmnopqrstuvwxyz"
CALLS = PortKind(b"moe-ray-expert-", b"trunk", b"expert")
WEIGHTS = PortKind(b"moe-ray-weight-", b"newcomer", b"peer")


def connect(address: str, options: LinkOptions, service: PortKind = CALLS) -> socket.socket:
    """Connect to "host:port,name" and prove the token: the Unix socket if this machine has it, else TCP."""
    where, _, name = address.partition(",")
    if name and ABSTRACT_UNIX:
        local = socket.socket(socket.AF_UNIX)
        local.settimeout(options.connect_timeout_s)
        try:
            local.connect(f"\0{name}")
        except OSError:
            local.close()  # another machine's, or gone
        else:
            return _introduce(local, options, service)
    host, _, port = where.rpartition(":")
    if not port.isdigit():
        raise ProtocolError(f"{where!r} is not host:port")
    sock = socket.create_connection((host.strip("[]"), int(port)), timeout=options.connect_timeout_s)
    tune(sock, options)
    context = tls_context(options, server=False)
    if context is not None:
        certified = options.tls.server_name if options.tls is not None else None
        sock = context.wrap_socket(sock, server_hostname=certified or host.strip("[]"))
    return _introduce(sock, options, service)


def welcome(
    connection: socket.socket, tls: ssl.SSLContext | None, options: LinkOptions, service: PortKind = CALLS
) -> socket.socket:
    """The replica's side of the handshake; returns the socket to use. Raises `OSError`, `EOFError` on a wrong token."""
    connection.settimeout(options.connect_timeout_s)
    tune(connection, options)
    if tls is not None and connection.family != socket.AF_UNIX:
        connection = tls.wrap_socket(connection, server_side=True)
    nonce = secrets.token_bytes(_NONCE)
    connection.sendall(service.hello + nonce)
    theirs = _exactly(connection, _NONCE + _MAC)
    if not hmac.compare_digest(theirs[_NONCE:], _mac(options, service.asks, nonce, theirs[:_NONCE])):
        connection.sendall(b"no")
        raise EOFError("wrong token")
    connection.sendall(b"ok" + _mac(options, service.answers, theirs[:_NONCE], nonce))
    return connection


def _introduce(sock: socket.socket, options: LinkOptions, service: PortKind) -> socket.socket:
    try:
        hello = _exactly(sock, len(service.hello) + _NONCE)
        if not hello.startswith(service.name):
            raise ProtocolError("the peer is not a moe_ray expert")
        if not hello.startswith(service.hello):
            theirs = hello[len(service.name) : len(service.hello)]
            raise other_version(_VERSIONS.find(theirs) if theirs in _VERSIONS else repr(theirs))
        theirs, ours = hello[len(service.hello) :], secrets.token_bytes(_NONCE)
        sock.sendall(ours + _mac(options, service.asks, theirs, ours))
        if _exactly(sock, 2) != b"ok":
            raise ProtocolError("the replica refused the cluster token")
        if not hmac.compare_digest(_exactly(sock, _MAC), _mac(options, service.answers, ours, theirs)):
            raise ProtocolError("the peer does not know the cluster token")
    except BaseException:
        sock.close()
        raise
    return sock


def _mac(options: LinkOptions, role: bytes, asked: bytes, own: bytes) -> bytes:
    """Proof of the token by one role: HMAC-SHA256 over the peer's nonce and its own."""
    return hmac.digest((options.token or "").encode(), role + asked + own, hashlib.sha256)


OVER: Final = "the replica ended the connection"


def tune(sock: socket.socket, options: LinkOptions) -> None:
    """TCP without delays; a machine at the other end that is idle and gone is noticed as `keepalive_s` tells."""
    if sock.family == socket.AF_UNIX:
        return
    seconds = max(1, int(options.keepalive_s))
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, seconds // 4)),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2),
    ):
        sock.setsockopt(level, option, value)


def is_silent(sock: socket.socket) -> bool:
    """Whether the machine at the other end has stopped to acknowledge what it was sent.

    One that merely takes nothing more (its process is busy) still acknowledges; keepalive does not find one that owes
    an acknowledgement. Linux: struct tcp_info of <linux/tcp.h>.
    """
    if sock.family == socket.AF_UNIX or not hasattr(socket, "TCP_INFO"):
        return False
    try:
        told = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    except OSError:
        return False  # closed
    if len(told) < _TCP_INFO.size:
        return False
    retransmits, unacked, last_ack_ms = _TCP_INFO.unpack(told)
    return bool(unacked) and retransmits >= SILENT_RETRANSMITS and last_ack_ms >= SILENT_MS


def is_over(sock: socket.socket) -> bool:
    """Whether the other end has ended the connection, without reading what it sent before."""
    poll = select.poll()
    poll.register(sock, getattr(select, "POLLRDHUP", 0))
    return any(events & ~select.POLLIN for _, events in poll.poll(0))


def tls_context(options: LinkOptions, server: bool) -> ssl.SSLContext | None:
    """Mutual TLS as `options` has it; None without. Raises `ConfigError` for PEM files that cannot be used."""
    if options.tls is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(options.tls.certificate, options.tls.key)
        context.load_verify_locations(options.tls.ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"tls: cannot use {options.tls.certificate}, {options.tls.key}, {options.tls.ca}: {error}"
        ) from error
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def _exactly(sock: socket.socket, size: int) -> bytes:
    """Read `size` bytes of a handshake; the socket's own timeout holds."""
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise EOFError("the peer ended the handshake")
        data += piece
    return data
