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
import itertools
import secrets
import socket
import ssl
import threading
import time
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from moe_ray.core import ExpertCall, ExpertReply, ReplicaInfo
from moe_ray.errors import ConfigError, ExpertFailed, LinkBroken, LinkTimeout, ProtocolError, TransportError
from moe_ray.native.kernels import Host
from moe_ray.pb import moe_ray_pb2 as pb
from moe_ray.transport import wire
from moe_ray.transport.base import ExpertHandler, LinkOptions, check_reply
from moe_ray.transport.frames import STALL_S, FrameStream, Quiet
from moe_ray.transport.handshake import ABSTRACT_UNIX, connect, tls_context, welcome
from moe_ray.transport.pending import address_of, peer_name
from moe_ray.transport.serving import answer

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

    together = None

    def __init__(self, info: ReplicaInfo, options: LinkOptions | None = None) -> None:
        """Connect and prove the token, `connect_timeout_s` at most. Raises `LinkBroken`."""
        options = options or LinkOptions()
        self.info, self.peer = info, peer_name(info, "socket")
        self.reason: str | None = None
        self._ids = itertools.count(1)
        self._pending: dict[int, SocketPending] = {}
        self._using = threading.Lock()
        try:
            sock = connect(address_of(info, "socket"), options)
        except (OSError, EOFError, ProtocolError) as error:
            raise LinkBroken(f"{self.peer}: {_say(error)}") from None
        self._stream = FrameStream(sock)

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
            rows, weights = wire.sendable(call.rows), wire.sendable(call.weights)
            body = [wire.buffer(rows), wire.buffer(weights)]
            try:
                self._stream.write_frame(wire.call_header(call), body, STALL_S, self._read_reply)
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
            except Quiet:
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
        self,
        handler: ExpertHandler,
        host: str = "127.0.0.1",
        port: int = 0,
        options: LinkOptions | None = None,
        native: Host | None = None,
    ) -> None:
        """Listen. `native` answers in the handler's stead where there is no TLS. Raises `ConfigError`."""
        self._handler, self._native, self._options = handler, native, options or LinkOptions()
        self._tls = tls_context(self._options, server=True)
        name = f"moe-ray-{secrets.token_hex(8)}"
        self._connections: set[socket.socket] = set()
        self._closed = False
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            tcp = socket.create_server((host, port), family=family, backlog=64)
            self._listeners = [tcp]
            if ABSTRACT_UNIX:
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
            sock = welcome(connection, self._tls, self._options)
            self._connections.add(sock)  # another object, if TLS took the connection over
            if self._native is not None and not isinstance(sock, ssl.SSLSocket):
                self._native.serve(sock.fileno())
                return
            stream = FrameStream(sock)
            while True:
                stream.wait_frame(None)
                self._answer(stream, _parse(pb.ExpertCallHeader, stream.read_header(STALL_S)))
        except (OSError, EOFError, ProtocolError):
            pass  # the trunk is gone, or does not speak our language: its link ends, others go on
        finally:
            self._connections -= {connection, sock}
            sock.close()

    def _answer(self, stream: FrameStream, header: pb.ExpertCallHeader) -> None:
        rows, weights = wire.empty_rows(header), wire.empty_weights(header.num_rows)
        stream.read_into(wire.buffer(rows), STALL_S)
        stream.read_into(wire.buffer(weights), STALL_S)
        body: list[memoryview] = []
        try:
            reply = answer(self._handler, ExpertCall(header.layer, header.expert, rows, weights, header.call_id))
            head, rows = wire.reply_header(reply), wire.sendable(reply.rows)
            body = [wire.buffer(rows)]
        except (ExpertFailed, ProtocolError) as error:
            head = wire.pack_error(header.call_id, error).header
        stream.write_frame(head, body, None, None)


def _parse(kind: type[H], data: bytes) -> H:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise ProtocolError(f"a header that is no {kind.__name__}: {error}") from None


def _say(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
