"""The trunk's gRPC port: one stream per gateway, one message per engine step."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

import grpc

from moe_ray.core import TokenEvent
from moe_ray.engine.loop import EngineLoop
from moe_ray.errors import InvalidRequest
from moe_ray.pb import moe_ray_pb2 as pb
from moe_ray.pb import moe_ray_pb2_grpc as pb_grpc
from moe_ray.serve.trunk_wire import pack_event, unpack_request
from moe_ray.transport.base import LinkOptions
from moe_ray.transport.grpc import StreamThreads, TokenInterceptor, join_address, listen, server_options

MAX_GATEWAYS = 64


class TrunkServer:
    """Serves an engine loop on host:port until `close`."""

    def __init__(self, loop: EngineLoop, missing: Callable[[], list[int]], host: str, options: LinkOptions) -> None:
        """`missing` tells which experts have no live replica."""
        self._server = grpc.server(
            StreamThreads(),
            interceptors=[] if options.token is None else [TokenInterceptor(options.token)],
            options=server_options(options),
            maximum_concurrent_rpcs=MAX_GATEWAYS,
        )
        pb_grpc.add_TrunkServicer_to_server(_Servicer(loop, missing), self._server)
        self.address = join_address(host, listen(self._server, host, 0, options))
        self._server.start()

    def close(self) -> None:
        """End every stream and stop listening. Idempotent."""
        self._server.stop(grace=None).wait()


class _Servicer(pb_grpc.TrunkServicer):
    def __init__(self, loop: EngineLoop, missing: Callable[[], list[int]]) -> None:
        self._loop, self._missing = loop, missing

    def Generate(self, requests: Iterator[pb.TrunkRequest], context: grpc.ServicerContext) -> Iterator[pb.StepEvents]:
        events: queue.SimpleQueue[list[TokenEvent] | None] = queue.SimpleQueue()
        sink = events.put
        reader = threading.Thread(
            target=self._read, args=(requests, sink, lambda: events.put(None)), name="gateway-reader", daemon=True
        )
        context.send_initial_metadata((("moe-ray-trunk", "1"),))
        reader.start()
        try:
            while (step := events.get()) is not None:
                yield pb.StepEvents(events=map(pack_event, step))
        finally:
            self._loop.drop(sink)

    def Info(self, request: pb.InfoRequest, context: grpc.ServicerContext) -> pb.TrunkStatus:
        stats, missing = self._loop.stats(), self._missing()
        return pb.TrunkStatus(
            ready=not missing and self._loop.failure is None,
            missing=[f"Expert{expert}" for expert in missing],
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            kv_blocks_total=stats.kv_blocks_total,
            kv_blocks_free=stats.kv_blocks_free,
        )

    def _read(
        self, requests: Iterator[pb.TrunkRequest], sink: Callable[[list[TokenEvent]], None], ended: Callable[[], None]
    ) -> None:
        try:
            for message in requests:
                for submit in message.submit:
                    try:
                        self._loop.submit(unpack_request(submit), sink)
                    except InvalidRequest as error:
                        sink([TokenEvent(submit.request_id, error=error)])
                for request_id in message.abort:
                    self._loop.abort(request_id)
        except grpc.RpcError:
            pass  # the gateway is gone; `ended` tells the stream so
        finally:
            ended()
