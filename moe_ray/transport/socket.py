"""The `socket` carrier: the protobuf header of a message and raw tensor bytes, over a Unix socket or TCP.

A Unix socket where trunk and expert share a machine, TCP (NODELAY) elsewhere, TLS on TCP if asked. Frames are
[header length, 4 bytes little-endian][header][rows][weights, in calls]; sizes follow from the header. The trunk's end
has no thread: the caller's sends and receives, straight from and into tensor memory, because handing a reply to another
thread costs more than the trip. The expert's end has a thread per connection that reads, computes and answers.

Neither end can wait for the other for ever: a sender whose peer does not take more bytes reads replies meanwhile.

Both ends prove that they know the cluster token by HMAC over fresh nonces, without showing it.
"""

from __future__ import annotations

import itertools
import socket
import ssl
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from moe_ray.core import ExpertCall, ExpertReply, ReplicaInfo
from moe_ray.errors import CallCancelled, LinkBroken, LinkTimeout, ProtocolError, TransportError, WrongAnswer
from moe_ray.native.host import Host
from moe_ray.pb import moe_ray_pb2 as pb
from moe_ray.transport import wire
from moe_ray.transport.adapter_runs import runs_of
from moe_ray.transport.base import ONE_BY_ONE, ExpertHandler, LinkOptions
from moe_ray.transport.checks import check_reply
from moe_ray.transport.frames import STALL_S, FrameStream, Quiet
from moe_ray.transport.handshake import OVER, connect, is_over, is_silent
from moe_ray.transport.listener import Listener
from moe_ray.transport.messages import parse, say
from moe_ray.transport.pending import address_of, peer_name
from moe_ray.transport.serving import ANSWERED_ERRORS, answer

if TYPE_CHECKING:
    import torch


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
            return link.checked(call, outcome)
        except LinkBroken:
            raise
        except TransportError as error:
            raise type(error)(f"{link.peer}: {error}") from None

    def cancel(self) -> None:
        """Wait no more and let the replica skip the call. Idempotent."""
        if self.outcome is None:
            self._link.cancel(self.call.call_id)


class SocketLink:
    """`base.Link` over one connection, without a thread: its user's thread sends and receives."""

    group = ONE_BY_ONE
    on_card = False
    carrier = "socket"

    def __init__(self, info: ReplicaInfo, options: LinkOptions | None = None) -> None:
        """Connect and prove the token, `connect_timeout_s` at most. Raises `LinkBroken`."""
        options = options or LinkOptions()
        self.info, self.peer = info, peer_name(info, self.carrier)
        self.reason: str | None = None
        self._ids = itertools.count(1)
        self._pending: dict[int, SocketPending] = {}
        self._using = threading.Lock()
        try:
            sock = self._connect(options)
        except (OSError, EOFError, ProtocolError) as error:
            raise LinkBroken(f"{self.peer}: {say(error)}") from None
        self._sock, self._stream = sock, FrameStream(sock)

    def __del__(self) -> None:
        if hasattr(self, "_sock"):
            self._sock.close()  # by now no thread uses its number

    def _connect(self, options: LinkOptions) -> socket.socket:
        return connect(address_of(self.info, "socket"), options)

    @property
    def broken(self) -> bool:
        return self.reason is not None

    @property
    def silent(self) -> bool:
        return self.reason is None and is_silent(self._sock)

    def probe(self) -> None:
        """`base.Link.probe`."""
        if is_over(self._sock):
            self._broke(OVER)
        elif self._using.acquire(blocking=False):  # else a thread reads it
            try:
                self._withdraw(0)  # of a call that does not exist: the replica ignores it
            finally:
                self._using.release()

    def send(self, call: ExpertCall) -> SocketPending:
        """Write `call` from tensor memory, reading replies while the peer takes no more. Raises `LinkBroken`."""
        wire.check_call(call)
        with self._using:
            if self.reason is not None:
                raise LinkBroken(self.reason)
            call.call_id = next(self._ids)
            pending = self._pending[call.call_id] = SocketPending(self, call)
            try:
                held = self._body(call)
                body = [memoryview(each) if isinstance(each, bytes) else wire.buffer(each) for each in held]
                self._stream.write_frame(wire.call_header(call), body, STALL_S, self._read_reply)
            except (OSError, EOFError, ProtocolError) as error:
                raise self._broke(say(error)) from None
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
                raise self._broke(say(error)) from None

    def cancel(self, call_id: int) -> None:
        """Tell the replica that a call is cancelled, if that takes no waiting."""
        with self._using:
            self._withdraw(call_id)

    def close(self) -> None:
        """End the link; a thread that waits on it is woken. Idempotent, from any thread."""
        self._broke("link closed")

    def checked(self, call: ExpertCall, reply: ExpertReply) -> ExpertReply:
        """Return a reply that was received. Raises `WrongAnswer`."""
        return check_reply(call, reply)

    def _body(self, call: ExpertCall) -> list[torch.Tensor | bytes]:
        """What follows the header of a call."""
        return [wire.sendable(call.rows), wire.sendable(call.weights)]

    def _read_rows(self, call: ExpertCall, header: pb.ExpertReplyHeader) -> torch.Tensor:
        """Read what follows the header of a reply that is no error. Raises `WrongAnswer`."""
        rows = wire.empty_rows(header)
        self._stream.read_into(wire.buffer(rows), STALL_S)
        return rows

    def _withdraw(self, call_id: int) -> None:
        if self.reason is not None or not self._stream.writable():
            return
        try:
            header = pb.ExpertCallHeader(call_id=call_id, cancel=True)
            self._stream.write_frame(header, (), STALL_S, self._read_reply)
        except (OSError, EOFError, ProtocolError) as error:
            self._broke(say(error))

    def _read_reply(self) -> None:
        header = parse(pb.ExpertReplyHeader, self._stream.read_header(STALL_S))
        pending = self._pending.pop(header.call_id, None)
        if pending is None:
            raise ProtocolError(f"the replica answered call {header.call_id}, which is not in flight")
        if header.status != pb.OK:
            pending.outcome = wire.error_of(header.status, header.error)
        else:
            try:
                rows = self._read_rows(pending.call, header)
                pending.outcome = ExpertReply(header.call_id, rows, wire.load_of(header))
            except WrongAnswer as error:
                pending.outcome = error
        self._settled(header.call_id)

    def _settled(self, call_id: int) -> None:
        """A call has its reply, whatever it says."""

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
        self._handler, self._native = handler, native
        self._listener = Listener(self._serve, host, port, options or LinkOptions())
        self.address = self._listener.address

    def close(self) -> None:
        """Stop listening and end every connection at once; a call being computed is lost. Idempotent."""
        self._listener.close()

    def _serve(self, sock: socket.socket) -> None:
        if self._native is not None and not isinstance(sock, ssl.SSLSocket):
            self._native.serve(sock.fileno())
            return
        stream = FrameStream(sock)
        while True:
            stream.wait_frame(None)
            self._answer(stream, parse(pb.ExpertCallHeader, stream.read_header(STALL_S)))

    def _answer(self, stream: FrameStream, header: pb.ExpertCallHeader) -> None:
        if header.cancel:
            return  # too late: that call has been answered
        rows, weights = wire.empty_rows(header), wire.empty_weights(header.num_rows)
        stream.read_into(wire.buffer(rows), STALL_S)
        stream.read_into(wire.buffer(weights), STALL_S)
        body: list[memoryview] = []
        try:
            withdrawn = partial(taken_back, stream, header.call_id)
            runs = runs_of(header)
            call = ExpertCall(header.layer, header.expert, rows, weights, header.call_id, withdrawn, runs)
            reply = answer(self._handler, call)
            head, rows = wire.reply_header(reply), wire.sendable(reply.rows)
            body = [wire.buffer(rows)]
        except CallCancelled:
            head = pb.ExpertReplyHeader(call_id=header.call_id, status=pb.CANCELLED)
        except ANSWERED_ERRORS as error:
            head = wire.pack_error(header.call_id, error).header
        stream.write_frame(head, body, None, None)


def taken_back(stream: FrameStream, call_id: int) -> bool:
    """Whether the frame behind a call, if one has come, takes it back, or the trunk is gone."""
    try:
        header = stream.peek_header()
        after = None if header is None else pb.ExpertCallHeader.FromString(header)
    except (OSError, EOFError):
        return True
    except DecodeError:
        return False  # reading it as the next call ends the connection
    return after is not None and after.cancel and after.call_id == call_id
