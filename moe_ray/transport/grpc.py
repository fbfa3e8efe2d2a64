"""The `grpc` carrier: one bidirectional `Expert.Forward` stream per trunk and replica, over any network, TLS if asked.

The synchronous API: a reader thread per link hands replies to the threads that wait for them, so a call that timed out
leaves the stream and the other calls on it alive.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator

import grpc
import grpc.aio

from moe_ray.core import ExpertCall, ReplicaInfo
from moe_ray.errors import LinkBroken
from moe_ray.pb import moe_ray_pb2 as pb
from moe_ray.pb import moe_ray_pb2_grpc as pb_grpc
from moe_ray.transport import wire
from moe_ray.transport.base import ONE_BY_ONE, ExpertHandler, LinkOptions
from moe_ray.transport.grpc_channel import (
    StreamThreads,
    TokenInterceptor,
    join_address,
    listen,
    open_channel,
    server_options,
    token_metadata,
)
from moe_ray.transport.pending import CallTable, Pending, address_of, peer_name
from moe_ray.transport.serving import ANSWERED_ERRORS, answer
from moe_ray.transport.version import WIRE_VERSION, other_version

MAX_STREAMS = 256
"""Streams that one replica accepts; each holds a thread. One more is refused, not queued."""
_VERSION_KEY = "moe-ray-expert"
"""Metadata of both ends: their wire version. The server's is its first word: the token was right."""


class GrpcLink:
    """`base.Link` over one gRPC stream. Threads: one reader here, and those of grpc; `close` ends them all."""

    group = ONE_BY_ONE
    on_card = False
    silent = False  # its own keepalive ends it

    def __init__(self, info: ReplicaInfo, options: LinkOptions | None = None) -> None:
        """Connect and wait until the replica accepts the stream, `connect_timeout_s` at most. Raises `LinkBroken`."""
        options = options or LinkOptions()
        self.info = info
        self._calls: CallTable[pb.ExpertReply] = CallTable(peer_name(info, "grpc"), wire.unpack_reply)
        self._outgoing: queue.SimpleQueue[pb.ExpertCall | None] = queue.SimpleQueue()
        metadata = (*token_metadata(options.token), (_VERSION_KEY, str(WIRE_VERSION)))
        self._channel = open_channel(address_of(info, "grpc"), options)
        self._stream = pb_grpc.ExpertStub(self._channel).Forward(iter(self._outgoing.get, None), metadata=metadata)
        self._settled = threading.Event()  # accepted or broken
        self._reader = threading.Thread(target=self._read, name=f"grpc-reader-{info.replica_id}", daemon=True)
        self._reader.start()
        if not self._settled.wait(options.connect_timeout_s):
            self._calls.fail(f"no answer of a moe_ray expert within {options.connect_timeout_s:g} s")
        if (broken := self._calls.broken) is not None:
            self.close()
            raise LinkBroken(broken)

    @property
    def broken(self) -> bool:
        return self._calls.broken is not None

    def probe(self) -> None:
        """Nothing: gRPC's own keepalive notices a peer that is gone."""

    def send(self, call: ExpertCall) -> Pending[pb.ExpertReply]:
        """Copy `call` into a message and queue it for the stream. Raises `LinkBroken` or `InvalidCall`."""
        wire.check_call(call)
        pending = self._calls.open(call)
        self._outgoing.put(wire.pack_call(call))
        return pending

    def close(self) -> None:
        """End the stream, fail what is in flight and wait for the reader thread. Idempotent, from any thread."""
        self._calls.fail("link closed")
        self._stream.cancel()
        self._reader.join()

    def _read(self) -> None:
        reason = "the replica ended the stream"
        try:
            # Also returns when the stream ended without; the loop below then raises why.
            theirs = _version_of(self._stream.initial_metadata())
            if theirs == str(WIRE_VERSION):
                self._settled.set()
            elif theirs is not None:
                reason = str(other_version(theirs))
                return
            for message in self._stream:
                if not self._calls.settle(message.header.call_id, message):
                    reason = f"the replica answered call {message.header.call_id}, which is not in flight"
                    break
        except grpc.RpcError as error:
            reason = _reason(error, reason)
        finally:
            self._calls.fail(reason)
            self._outgoing.put(None)  # lets grpc's sending thread go
            self._stream.cancel()
            self._channel.close()
            self._settled.set()


class GrpcExpertServer:
    """`base.ExpertServer`: serves `handler` on host:port until `close`. Each stream has a thread of its own."""

    def __init__(
        self, handler: ExpertHandler, host: str = "127.0.0.1", port: int = 0, options: LinkOptions | None = None
    ) -> None:
        options = options or LinkOptions()
        self._server = grpc.server(
            StreamThreads(),
            interceptors=[] if options.token is None else [TokenInterceptor(options.token)],
            options=server_options(options),
            maximum_concurrent_rpcs=MAX_STREAMS,
        )
        pb_grpc.add_ExpertServicer_to_server(_Servicer(handler), self._server)
        self.address = join_address(host, listen(self._server, host, port, options))
        self._server.start()

    def close(self) -> None:
        """Stop listening and end every stream at once; a call being computed is lost. Idempotent."""
        self._server.stop(grace=None).wait()


class _Servicer(pb_grpc.ExpertServicer):
    def __init__(self, handler: ExpertHandler) -> None:
        self._handler = handler

    def Forward(self, calls: Iterator[pb.ExpertCall], context: grpc.ServicerContext) -> Iterator[pb.ExpertReply]:
        context.send_initial_metadata(((_VERSION_KEY, str(WIRE_VERSION)),))
        theirs = _version_of(context.invocation_metadata())
        if theirs != str(WIRE_VERSION):
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the trunk speaks wire version {theirs or 1}, this replica {WIRE_VERSION}",
            )
        for message in calls:
            yield self._answer(message)

    def _answer(self, message: pb.ExpertCall) -> pb.ExpertReply:
        try:
            return wire.pack_reply(answer(self._handler, wire.unpack_call(message)))
        except ANSWERED_ERRORS as error:
            return wire.pack_error(message.header.call_id, error)


def _version_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    """The wire version in the metadata of one end; None: it has none."""
    for key, value in metadata or ():
        if key == _VERSION_KEY:
            return value if isinstance(value, str) else value.decode(errors="replace")
    return None


def _reason(error: grpc.RpcError, ours: str) -> str:
    code = error.code()
    if code == grpc.StatusCode.UNAUTHENTICATED:
        return "the replica refused the cluster token"
    if code == grpc.StatusCode.CANCELLED:
        return ours
    return f"{code.name}: {error.details()}"
