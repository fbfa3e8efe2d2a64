"""Weights from the memory of one replica into that of another, in the form in which both hold them.

A port of its own, guarded as that of the `socket` carrier: the cluster token is proved, TLS on TCP if asked. The asker
sends a `WeightsRequest`; the peer answers with a `WeightsReply` and, if it is OK, the bytes of each buffer in chunks:
[header length, 4 bytes little-endian][WeightsChunk][bytes], each with its own CRC-32. A peer with other bytes than
those that are meant (another packing, dtype, shape or checkpoint), or sends to as many as it may, refuses.
"""

from __future__ import annotations

import socket
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Final

from moe_ray.core import ExpertKey, WeightLayout
from moe_ray.errors import CallRefused, LinkBroken, ProtocolError, ReplicaBusy
from moe_ray.pb import moe_ray_pb2 as pb
from moe_ray.transport.base import LinkOptions
from moe_ray.transport.frames import FrameStream, Quiet
from moe_ray.transport.handshake import WEIGHTS, connect
from moe_ray.transport.listener import Listener
from moe_ray.transport.messages import parse, say
from moe_ray.transport.wire import error_of, status_of

CHUNK_BYTES: Final = 4 << 20
MAX_TRANSFERS: Final = 2
"""Keys that one replica sends at a time; its own work is to answer calls."""
GIVE_UP_S: Final = 10.0
"""A peer from which nothing comes for so long is given up: there are other ways to the weights."""

Offer = Callable[[ExpertKey, WeightLayout, bytes], Sequence[memoryview]]
"""Returns the bytes of a key's weights if they are of this layout and fingerprint; else raises `CallRefused`."""


def pack_layout(layout: WeightLayout) -> pb.WeightLayout:
    """The message that describes a layout."""
    return pb.WeightLayout(
        format=layout.format,
        packing=layout.packing,
        dtype=layout.dtype,
        shape=layout.shape,
        options=dict(layout.options),
    )


def unpack_layout(message: pb.WeightLayout) -> WeightLayout:
    """The layout that a message describes. Raises `ProtocolError`."""
    if len(message.shape) != 2:
        raise ProtocolError(f"layout.shape is {list(message.shape)}, expected [hidden_size, intermediate_size]")
    hidden, inner = message.shape
    options = tuple(sorted(message.options.items()))
    return WeightLayout(message.format, message.packing, message.dtype, (hidden, inner), options)


class WeightsServer:
    """`base.ExpertServer` for weights: sends what `offer` gives until `close`, from a thread per connection."""

    def __init__(
        self, offer: Offer, host: str = "127.0.0.1", port: int = 0, options: LinkOptions | None = None
    ) -> None:
        """Listen. Raises `ConfigError`."""
        self._offer = offer
        self._transfers = threading.BoundedSemaphore(MAX_TRANSFERS)
        self._listener = Listener(self._serve, host, port, options or LinkOptions(), WEIGHTS, "weights")
        self.address = self._listener.address

    def close(self) -> None:
        """Stop listening and end every connection at once. Idempotent."""
        self._listener.close()

    def _serve(self, sock: socket.socket) -> None:
        stream = FrameStream(sock)
        while True:
            stream.wait_frame(None)
            request = parse(pb.WeightsRequest, stream.read_header(GIVE_UP_S))
            try:
                if not self._transfers.acquire(blocking=False):
                    raise ReplicaBusy(f"{MAX_TRANSFERS} transfers are in progress")
                try:
                    self._send(stream, request)
                finally:
                    self._transfers.release()
            except (CallRefused, ReplicaBusy, ProtocolError) as error:
                reply = pb.WeightsReply(status=status_of(error), error=str(error))
                stream.write_frame(reply, (), GIVE_UP_S, None)

    def _send(self, stream: FrameStream, request: pb.WeightsRequest) -> None:
        if request.adapter_id:
            raise CallRefused(f"adapter {request.adapter_id} is asked for, and this replica knows no adapters")
        buffers = self._offer((request.layer, request.expert), unpack_layout(request.layout), request.fingerprint)
        sizes = [len(buffer) for buffer in buffers]
        stream.write_frame(pb.WeightsReply(status=pb.OK, sizes=sizes), (), GIVE_UP_S, None)
        for buffer in buffers:
            for start in range(0, len(buffer), CHUNK_BYTES):
                chunk = buffer[start : start + CHUNK_BYTES]
                header = pb.WeightsChunk(size=len(chunk), crc32=zlib.crc32(chunk))
                stream.write_frame(header, [chunk], GIVE_UP_S, None)


class WeightsLink:
    """A connection to one replica's `WeightsServer`. Used by one thread; `close` from any."""

    def __init__(self, address: str, options: LinkOptions | None = None) -> None:
        """Connect and prove the token, `connect_timeout_s` at most. Raises `LinkBroken`."""
        self.address = address
        try:
            self._sock = connect(address, options or LinkOptions(), WEIGHTS)
        except (OSError, EOFError, ProtocolError) as error:
            raise LinkBroken(f"weights of {address}: {say(error)}") from None
        self._stream = FrameStream(self._sock)

    def read(self, key: ExpertKey, layout: WeightLayout, fingerprint: bytes, into: Sequence[memoryview]) -> None:
        """Fill `into` with the weights of one key.

        Raises `CallRefused` or `ReplicaBusy` when the peer does not send them, `LinkBroken` for what ends the link: a
        peer that is gone or silent, sizes that do not fit, a damaged chunk. What is in `into` is then of no use.
        """
        layer, expert = key
        request = pb.WeightsRequest(layer=layer, expert=expert, layout=pack_layout(layout), fingerprint=fingerprint)
        try:
            self._stream.write_frame(request, (), GIVE_UP_S, None)
            self._stream.wait_frame(time.monotonic() + GIVE_UP_S)
            reply = parse(pb.WeightsReply, self._stream.read_header(GIVE_UP_S))
            if reply.status == pb.OK:
                self._receive(reply, into)
        except Quiet:
            raise self._broke(f"no answer within {GIVE_UP_S:g} s") from None
        except (OSError, EOFError, ProtocolError) as error:
            raise self._broke(say(error)) from None
        if reply.status != pb.OK:
            refusal = error_of(reply.status, reply.error)
            raise type(refusal)(f"weights of {self.address}: {refusal}")

    def close(self) -> None:
        """End the link; a thread that waits on it is woken. Idempotent."""
        self._stream.shutdown()

    def __del__(self) -> None:
        if hasattr(self, "_sock"):
            self._sock.close()

    def _receive(self, reply: pb.WeightsReply, into: Sequence[memoryview]) -> None:
        sizes = [len(buffer) for buffer in into]
        if list(reply.sizes) != sizes:
            raise ProtocolError(f"buffers of {list(reply.sizes)} bytes, expected {sizes}")
        for buffer in into:
            at = 0
            while at < len(buffer):
                chunk = parse(pb.WeightsChunk, self._stream.read_header(GIVE_UP_S))
                if not 0 < chunk.size <= len(buffer) - at:
                    raise ProtocolError(f"a chunk of {chunk.size} bytes where {len(buffer) - at} are left")
                target = buffer[at : at + chunk.size]
                self._stream.read_into(target, GIVE_UP_S)
                if zlib.crc32(target) != chunk.crc32:
                    raise ProtocolError("a damaged chunk: its checksum does not fit")
                at += chunk.size

    def _broke(self, reason: str) -> LinkBroken:
        self.close()
        return LinkBroken(f"weights of {self.address}: {reason}")
