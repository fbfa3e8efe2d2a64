"""Frames over a connected socket: a length, a header, then tensor bytes received straight into their memory."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Sequence

from google.protobuf.message import Message

from moe_ray.errors import ProtocolError

LENGTH = struct.Struct("<I")
"""Before each header: its size in bytes."""
STALL_S = 30.0
"""A peer that neither sends nor takes a byte for so long in the middle of a message is given up."""
_MAX_HEADER = 64 * 1024
_STAGE = 4096
"""Bytes asked for where a frame begins: a header with a small tensor behind it comes in one system call."""

Drain = Callable[[], None]


class Quiet(Exception):
    """No frame began in time."""


class FrameStream:
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
        """Return once a frame has begun; `Quiet` if none does before `deadline` (monotonic seconds)."""
        while self._start == self._end:
            self._start = self._end = 0
            if (count := self._receive(self._stage[:_STAGE])) is not None:
                self._end = count
            elif not self._readable.poll(_left_ms(deadline)) and deadline is not None:
                raise Quiet

    def read_header(self, stall_s: float) -> bytes:
        """The header of the frame that has begun."""
        self._gather(LENGTH.size, stall_s)
        (size,) = LENGTH.unpack_from(self._stage, self._start)
        if size > _MAX_HEADER:
            raise ProtocolError(f"a header of {size} bytes")
        self._gather(LENGTH.size + size, stall_s)
        begin = self._start + LENGTH.size
        self._start = begin + size
        return bytes(self._stage[begin : self._start])

    def peek_header(self) -> bytes | None:
        """The header of the next frame, if it has come already; it stays to be read."""
        if len(self._stage) - self._end >= _STAGE and (count := self._receive(self._stage[self._end :][:_STAGE])):
            self._end += count
        if self._end - self._start < LENGTH.size:
            return None
        (size,) = LENGTH.unpack_from(self._stage, self._start)
        begin = self._start + LENGTH.size
        return bytes(self._stage[begin : begin + size]) if begin + size <= self._end else None

    def read_into(self, target: memoryview, stall_s: float) -> None:
        """Fill `target` from what is staged and then straight from the socket."""
        staged = min(len(target), self._end - self._start)
        target[:staged] = self._stage[self._start : self._start + staged]
        self._start += staged
        while staged < len(target):
            staged += self._receive_more(target[staged:], stall_s)

    def write_frame(
        self, header: Message, body: Sequence[memoryview], stall_s: float | None, drain: Drain | None
    ) -> None:
        """Write a frame from where its tensors are."""
        packed = header.SerializeToString()
        self.write([LENGTH.pack(len(packed)) + packed, *body], stall_s, drain)

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

    def writable(self) -> bool:
        """Whether the peer takes more now."""
        return bool(self._writable.poll(0))

    def shutdown(self) -> None:
        """End the connection; a thread that waits on it wakes."""
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
            self._end += self._receive_more(self._stage[self._end : self._start + size], stall_s)

    def _receive_more(self, target: memoryview, stall_s: float) -> int:
        """Wait for more of a message that has begun; the bytes received."""
        while (count := self._receive(target)) is None:
            if not self._readable.poll(1000 * stall_s):
                raise TimeoutError(f"nothing came for {stall_s:g} s in the middle of a message")
        return count

    def _receive(self, target: memoryview) -> int | None:
        """Bytes received; None if there are none now."""
        try:
            count = self._sock.recv_into(target)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        if count == 0:
            raise EOFError("the replica ended the connection")
        return count


def _left_ms(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, 1000 * (deadline - time.monotonic()))
