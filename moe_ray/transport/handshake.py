"""Connecting the `socket` carrier: Unix socket or TCP, TLS if asked, and a mutual proof of the cluster token."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import ssl
import sys

from moe_ray.errors import ConfigError, ProtocolError
from moe_ray.transport.base import LinkOptions

ABSTRACT_UNIX = sys.platform == "linux"
"""Unix sockets without a file vanish with their process, however it ends; the token guards them as it does TCP."""
_HELLO = b"moe-ray-expert-1"
_NONCE, _MAC = 32, 32


def connect(address: str, options: LinkOptions) -> socket.socket:
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
            return _introduce(local, options)
    host, _, port = where.rpartition(":")
    if not port.isdigit():
        raise ProtocolError(f"{where!r} is not host:port")
    sock = socket.create_connection((host.strip("[]"), int(port)), timeout=options.connect_timeout_s)
    tune(sock, options)
    context = tls_context(options, server=False)
    if context is not None:
        certified = options.tls.server_name if options.tls is not None else None
        sock = context.wrap_socket(sock, server_hostname=certified or host.strip("[]"))
    return _introduce(sock, options)


def welcome(connection: socket.socket, tls: ssl.SSLContext | None, options: LinkOptions) -> socket.socket:
    """The expert's side of the handshake; returns the socket to use. Raises `OSError`, `EOFError` on a wrong token."""
    connection.settimeout(options.connect_timeout_s)
    tune(connection, options)
    if tls is not None and connection.family != socket.AF_UNIX:
        connection = tls.wrap_socket(connection, server_side=True)
    nonce = secrets.token_bytes(_NONCE)
    connection.sendall(_HELLO + nonce)
    theirs = _exactly(connection, _NONCE + _MAC)
    if not hmac.compare_digest(theirs[_NONCE:], _mac(options, b"trunk", nonce, theirs[:_NONCE])):
        connection.sendall(b"no")
        raise EOFError("wrong token")
    connection.sendall(b"ok" + _mac(options, b"expert", theirs[:_NONCE], nonce))
    return connection


def _introduce(sock: socket.socket, options: LinkOptions) -> socket.socket:
    try:
        hello = _exactly(sock, len(_HELLO) + _NONCE)
        if not hello.startswith(_HELLO):
            raise ProtocolError("the peer is not a moe_ray expert of this version")
        theirs, ours = hello[len(_HELLO) :], secrets.token_bytes(_NONCE)
        sock.sendall(ours + _mac(options, b"trunk", theirs, ours))
        if _exactly(sock, 2) != b"ok":
            raise ProtocolError("the replica refused the cluster token")
        if not hmac.compare_digest(_exactly(sock, _MAC), _mac(options, b"expert", ours, theirs)):
            raise ProtocolError("the peer does not know the cluster token")
    except BaseException:
        sock.close()
        raise
    return sock


def _mac(options: LinkOptions, role: bytes, asked: bytes, own: bytes) -> bytes:
    """Proof of the token by one role: HMAC-SHA256 over the peer's nonce and its own."""
    return hmac.digest((options.token or "").encode(), role + asked + own, hashlib.sha256)


def tune(sock: socket.socket, options: LinkOptions) -> None:
    """TCP without delays, and a silent machine at the other end noticed after about two keepalives."""
    if sock.family == socket.AF_UNIX:
        return
    seconds = max(1, int(options.keepalive_s))
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, seconds),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2),
    ):
        sock.setsockopt(level, option, value)


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
