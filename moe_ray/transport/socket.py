"""The `socket` carrier: the protobuf header of a message and raw tensor bytes, over a Unix socket or TCP.

A Unix socket where trunk and expert share a machine, TCP (NODELAY) elsewhere, TLS on TCP if asked. Frames are
[header length, 4 bytes little-endian][header][rows][weights, in calls]; sizes follow from the header. The trunk's end
has no thread: whoever sends also receives, straight from and into tensor memory, because handing a reply to another
thread costs more than the trip. The expert's end has a thread per connection that reads, computes and answers.

Neither end can wait for the other for ever: a sender whose peer does not take more bytes reads replies meanwhile.

Both ends prove that they know the cluster token by HMAC over fresh nonces, without showing it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import itertools
import secrets
import select
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from google.protobuf.message import DecodeError, Message

from moe_ray.core import ExpertCall, ExpertReply, ReplicaInfo
from moe_ray.errors import ConfigError, ExpertFailed, LinkBroken, LinkTimeout, ProtocolError, TransportError
from moe_ray.pb import moe_ray_pb2 as pb
from moe_ray.transport import wire
from moe_ray.transport.base import ExpertHandler, LinkOptions, check_reply
from moe_ray.transport.pending import address_of, peer_name
from moe_ray.transport.serving import answer

_HELLO = b"moe-ray-expert-1"
_NONCE, _MAC = 32, 32
_LENGTH = struct.Struct("<I")
_MAX_HEADER = 64 * 1024
_STAGE = 4096
"""Bytes asked for where a frame begins: a header with a small tensor behind it comes in one system call."""
STALL_S = 30.0
"""A peer that neither sends nor takes a byte for so long in the middle of a message is given up."""

_ABSTRACT = sys.platform == "linux"
"""Unix sockets without a file vanish with their process, however it ends; the token guards them as it does TCP."""

Drain = Callable[[], None]
H = TypeVar("H", bound=Message)


class SocketPending:
    """`base.PendingReply`: filled in by whichever thread of the trunk is reading the link."""

    __slots__ = ("_link", "call", "outcome")

    def __init__(self, link: SocketLink, call: ExpertCall) -> None:
        self._link, self.call = link, call
        self.outcome: ExpertReply | TransportError | None = None

    def result(self, timeout_s: float) -> ExpertReply:
        """Read the link until this reply is there. Errors as in `base.PendingReply.result`."""
        link, call = self._link, self.call
        deadline = time.monotonic() + timeout_s
        while self.outcome is None:
            try:
                link.pump(deadline)
            except TimeoutError:
                raise LinkTimeout(
                    f"{link.peer} did not answer layer {call.layer} expert {call.expert} within {timeout_s:g} s"
                ) from None
        outcome, self.outcome = self.outcome, LinkBroken(f"{link.peer}: the reply was taken already")
        try:
            if isinstance(outcome, TransportError):
                raise outcome
            return check_reply(call, outcome)
        except LinkBroken:
            raise
        except TransportError as error:
            raise type(error)(f"{link.peer}: {error}") from None


class SocketLink:
    """`base.Link` over one connection, without a thread: its user's thread sends and receives."""

    def __init__(self, info: ReplicaInfo, options: LinkOptions | None = None) -> None:
        """Connect and prove the token, `connect_timeout_s` at most. Raises `LinkBroken`."""
        options = options or LinkOptions()
        self.info, self.peer = info, peer_name(info, "socket")
        self.reason: str | None = None
        self._ids = itertools.count(1)
        self._pending: dict[int, SocketPending] = {}
        self._using = threading.Lock()
        try:
            sock = _connect(address_of(info, "socket"), options)
        except (OSError, EOFError, ProtocolError) as error:
            raise LinkBroken(f"{self.peer}: {_say(error)}") from None
        self._stream = _Stream(sock)

    @property
    def broken(self) -> bool:
        return self.reason is not None

    def send(self, call: ExpertCall) -> SocketPending:
        """Write `call` from tensor memory, reading replies while the peer takes no more. Raises `LinkBroken`."""
        wire.check_call(call)
        with self._using:
            if self.reason is not None:
                raise LinkBroken(self.reason)
            call.call_id = next(self._ids)
            pending = self._pending[call.call_id] = SocketPending(self, call)
            header = wire.call_header(call).SerializeToString()
            parts: list[bytes | memoryview] = [
                _LENGTH.pack(len(header)) + header,
                wire.buffer(call.rows),
                wire.buffer(call.weights),
            ]
            try:
                self._stream.write(parts, STALL_S, self._read_reply)
            except (OSError, EOFError, ProtocolError) as error:
                raise self._broke(_say(error)) from None
        return pending

    def pump(self, deadline: float) -> None:
        """Read one reply. Raises `TimeoutError` if none began before `deadline` (monotonic seconds), `LinkBroken`."""
        with self._using:
            if self.reason is not None:
                raise LinkBroken(self.reason)
            try:
                self._stream.wait_frame(deadline)
                self._read_reply()
            except _Quiet:
                raise TimeoutError from None
            except (OSError, EOFError, ProtocolError) as error:
                raise self._broke(_say(error)) from None

    def close(self) -> None:
        """End the link; a thread that waits on it is woken. Idempotent, from any thread."""
        self._broke("link closed")

    def _read_reply(self) -> None:
        header = _parse(pb.ExpertReplyHeader, self._stream.read_header(STALL_S))
        pending = self._pending.pop(header.call_id, None)
        if pending is None:
            raise ProtocolError(f"the replica answered call {header.call_id}, which is not in flight")
        if header.status != pb.OK:
            pending.outcome = wire.error_of(header.status, header.error)
            return
        rows = wire.empty_rows(header)
        self._stream.read_into(wire.buffer(rows), STALL_S)
        pending.outcome = ExpertReply(header.call_id, rows, wire.load_of(header))

    def _broke(self, reason: str) -> LinkBroken:
        if self.reason is None:
            self.reason = f"{self.peer}: {reason}"
            self._stream.shutdown()
        error = LinkBroken(self.reason)
        for pending in list(self._pending.values()):
            pending.outcome = pending.outcome or error
        self._pending.clear()
        return error


class SocketExpertServer:
    """`base.ExpertServer`: serves `handler` on host:port and on a Unix socket until `close`."""

    def __init__(
        self, handler: ExpertHandler, host: str = "127.0.0.1", port: int = 0, options: LinkOptions | None = None
    ) -> None:
        """Listen. Raises `ConfigError` when that cannot be done."""
        self._handler, self._options = handler, options or LinkOptions()
        self._tls = _context(self._options, server=True)
        name = f"moe-ray-{secrets.token_hex(8)}"
        self._connections: set[socket.socket] = set()
        self._closed = False
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            tcp = socket.create_server((host, port), family=family, backlog=64)
            self._listeners = [tcp]
            if _ABSTRACT:
                local = socket.socket(socket.AF_UNIX)
                local.bind(f"\0{name}")
                local.listen(64)
                self._listeners.append(local)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
        bound_host, bound_port = tcp.getsockname()[:2]
        self.address = f"{f'[{bound_host}]' if ':' in bound_host else bound_host}:{bound_port},{name}"
        for listener in self._listeners:
            threading.Thread(target=self._accept, args=(listener,), name="expert-accept", daemon=True).start()

    def close(self) -> None:
        """Stop listening and end every connection at once; a call being computed is lost. Idempotent."""
        self._closed = True
        for sock in (*self._listeners, *list(self._connections)):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self, listener: socket.socket) -> None:
        while not self._closed:
            try:
                connection, _ = listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(0.05)  # out of file descriptors, say: others may end
                continue
            self._connections.add(connection)
            threading.Thread(target=self._serve, args=(connection,), name="expert-connection", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        sock = connection
        try:
            sock = self._welcome(connection)
            self._connections.add(sock)  # another object, if TLS took the connection over
            stream = _Stream(sock)
            while True:
                stream.wait_frame(None)
                self._answer(stream, _parse(pb.ExpertCallHeader, stream.read_header(STALL_S)))
        except (OSError, EOFError, ProtocolError):
            pass  # the trunk is gone, or does not speak our language: its link ends, others go on
        finally:
            self._connections -= {connection, sock}
            sock.close()

    def _welcome(self, connection: socket.socket) -> socket.socket:
        connection.settimeout(self._options.connect_timeout_s)
        _tune(connection, self._options)
        if self._tls is not None and connection.family != socket.AF_UNIX:
            connection = self._tls.wrap_socket(connection, server_side=True)
        nonce = secrets.token_bytes(_NONCE)
        connection.sendall(_HELLO + nonce)
        theirs = _exactly(connection, _NONCE + _MAC)
        if not hmac.compare_digest(theirs[_NONCE:], _mac(self._options, b"trunk", nonce, theirs[:_NONCE])):
            connection.sendall(b"no")
            raise EOFError("wrong token")
        connection.sendall(b"ok" + _mac(self._options, b"expert", theirs[:_NONCE], nonce))
        return connection

    def _answer(self, stream: _Stream, header: pb.ExpertCallHeader) -> None:
        rows, weights = wire.empty_rows(header), torch.empty(header.num_rows, dtype=torch.float32)
        stream.read_into(wire.buffer(rows), STALL_S)
        stream.read_into(wire.buffer(weights), STALL_S)
        body: list[memoryview] = []
        try:
            reply = answer(self._handler, ExpertCall(header.layer, header.expert, rows, weights, header.call_id))
            head = wire.reply_header(reply)
            body = [wire.buffer(reply.rows)]
        except (ExpertFailed, ProtocolError) as error:
            head = wire.pack_error(header.call_id, error).header
        packed = head.SerializeToString()
        stream.write([_LENGTH.pack(len(packed)) + packed, *body], None, None)


class _Quiet(Exception):
    """No frame began in time."""


class _Stream:
    """Frames over a connected socket. `EOFError` when the peer ended it, `OSError` for what else went wrong."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.setblocking(False)
        self._send_one = isinstance(sock, ssl.SSLSocket)  # TLS has no vectored send
        self._readable, self._either = select.poll(), select.poll()
        self._readable.register(sock, select.POLLIN)
        self._either.register(sock, select.POLLIN | select.POLLOUT)
        self._writable = select.poll()
        self._writable.register(sock, select.POLLOUT)
        self._stage = memoryview(bytearray(_STAGE + _MAX_HEADER))
        self._start = self._end = 0

    def wait_frame(self, deadline: float | None) -> None:
        """Return once a frame has begun; `_Quiet` if none does before `deadline` (monotonic seconds)."""
        while self._start == self._end:
            self._start = self._end = 0
            if (count := self._receive(self._stage[:_STAGE])) is not None:
                self._end = count
            elif not self._readable.poll(_left_ms(deadline)) and deadline is not None:
                raise _Quiet

    def read_header(self, stall_s: float) -> bytes:
        """The header of the frame that has begun."""
        self._gather(_LENGTH.size, stall_s)
        (size,) = _LENGTH.unpack_from(self._stage, self._start)
        if size > _MAX_HEADER:
            raise ProtocolError(f"a header of {size} bytes")
        self._gather(_LENGTH.size + size, stall_s)
        begin = self._start + _LENGTH.size
        self._start = begin + size
        return bytes(self._stage[begin : self._start])

    def read_into(self, target: memoryview, stall_s: float) -> None:
        """Fill `target` from what is staged and then straight from the socket."""
        staged = min(len(target), self._end - self._start)
        target[:staged] = self._stage[self._start : self._start + staged]
        self._start += staged
        while staged < len(target):
            if (count := self._receive(target[staged:])) is not None:
                staged += count
            elif not self._readable.poll(1000 * stall_s):
                raise TimeoutError(f"nothing came for {stall_s:g} s in the middle of a message")

    def write(self, parts: Sequence[bytes | memoryview], stall_s: float | None, drain: Drain | None) -> None:
        """Write all parts. While the peer takes no more, `drain` reads what comes; None waits in any case."""
        left = [memoryview(part) for part in parts if len(part)]
        while left:
            try:
                count = self._sock.send(left[0]) if self._send_one else self._sock.sendmsg(left)
            except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                self._wait_to_write(stall_s, drain)
                continue
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if count:
                left[0] = left[0][count:]

    def shutdown(self) -> None:
        """End the connection; whoever waits on it wakes."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _wait_to_write(self, stall_s: float | None, drain: Drain | None) -> None:
        poll = self._writable if drain is None else self._either
        ready = poll.poll(None if stall_s is None else 1000 * stall_s)
        if not ready:
            raise TimeoutError(f"the peer took nothing for {stall_s:g} s")
        if drain is not None and ready[0][1] & select.POLLIN:
            drain()

    def _gather(self, size: int, stall_s: float) -> None:
        """Have at least `size` bytes staged."""
        if self._start + size > len(self._stage):
            self._stage[: self._end - self._start] = bytes(self._stage[self._start : self._end])
            self._start, self._end = 0, self._end - self._start
        while self._end - self._start < size:
            if (count := self._receive(self._stage[self._end : self._start + size])) is not None:
                self._end += count
            elif not self._readable.poll(1000 * stall_s):
                raise TimeoutError(f"nothing came for {stall_s:g} s in the middle of a message")

    def _receive(self, target: memoryview) -> int | None:
        """Bytes received; None if there are none now."""
        try:
            count = self._sock.recv_into(target)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        if count == 0:
            raise EOFError("the replica ended the connection")
        return count


def _connect(address: str, options: LinkOptions) -> socket.socket:
    """Connect to "host:port,name" and prove the token: the Unix socket if this machine has it, else TCP."""
    where, _, name = address.partition(",")
    if name and _ABSTRACT:
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
    _tune(sock, options)
    context = _context(options, server=False)
    if context is not None:
        certified = options.tls.server_name if options.tls is not None else None
        sock = context.wrap_socket(sock, server_hostname=certified or host.strip("[]"))
    return _introduce(sock, options)


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


def _tune(sock: socket.socket, options: LinkOptions) -> None:
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


def _context(options: LinkOptions, server: bool) -> ssl.SSLContext | None:
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


def _parse(kind: type[H], data: bytes) -> H:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise ProtocolError(f"a header that is no {kind.__name__}: {error}") from None


def _left_ms(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, 1000 * (deadline - time.monotonic()))


def _say(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
