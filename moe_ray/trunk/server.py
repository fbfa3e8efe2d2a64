"""The trunk's gRPC port: one stream per gateway, one message per engine step."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import grpc

from moe_ray.core import AdapterEntry, TokenEvent
from moe_ray.engine.loop import EngineLoop
from moe_ray.errors import EngineError, InvalidRequest
from moe_ray.pb import moe_ray_pb2 as pb
from moe_ray.pb import moe_ray_pb2_grpc as pb_grpc
from moe_ray.transport.base import LinkOptions
from moe_ray.transport.grpc_channel import StreamThreads, TokenInterceptor, join_address, listen, server_options
from moe_ray.trunk.adapter_book import AdapterBook
from moe_ray.trunk.traces import RequestTraces
from moe_ray.trunk.wire import pack_load, pack_step, unpack_adapter, unpack_request

logger = logging.getLogger(__name__)

MAX_GATEWAYS = 64
LOAD_EVERY_S: Final = 1.0
"""How often a gateway hears of the load while no token comes."""
QUIET_S: Final = 0.5
"""A draining trunk without a request for so long gets none any more: its gateways know that it drains."""


class TrunkServer:
    """Serves an engine loop on host:port until `close`."""

    def __init__(
        self,
        loop: EngineLoop,
        missing: Callable[[], list[int]],
        host: str,
        options: LinkOptions,
        traces: RequestTraces | None = None,
    ) -> None:
        """`missing` tells which experts have no live replica; `traces`: None where nothing is traced."""
        self._server = grpc.server(
            StreamThreads(),
            interceptors=[] if options.token is None else [TokenInterceptor(options.token)],
            options=server_options(options),
            maximum_concurrent_rpcs=MAX_GATEWAYS,
        )
        self._servicer = _Servicer(loop, missing, traces)
        pb_grpc.add_TrunkServicer_to_server(self._servicer, self._server)
        self.address = join_address(host, listen(self._server, host, 0, options))
        self._server.start()

    def drain(self, at_most_s: float) -> None:
        """Tell the gateways to send nothing new; return when all requests have ended, or after `at_most_s`.

        Requests that a gateway sent before it was told are computed too. Those that are left then are replayed on
        another trunk, once their streams end.
        """
        self._servicer.drain()
        end = time.monotonic() + at_most_s
        quiet_since = time.monotonic()
        while (now := time.monotonic()) < end and self._servicer.gateways and now < quiet_since + QUIET_S:
            time.sleep(0.05)
            if self._servicer.requests:
                quiet_since = time.monotonic()
        if left := self._servicer.requests:
            logger.warning("%d requests did not end within %.0f s and go on elsewhere", left, at_most_s)

    def close(self) -> None:
        """End every stream and stop listening. Idempotent."""
        self._server.stop(grace=None).wait()


class _Servicer(pb_grpc.TrunkServicer):
    def __init__(self, loop: EngineLoop, missing: Callable[[], list[int]], traces: RequestTraces | None = None) -> None:
        self._loop, self._missing, self._traces = loop, missing, traces
        self._book = AdapterBook()
        self._streams: set[queue.SimpleQueue[list[TokenEvent] | None]] = set()
        self._lock = threading.Lock()
        self._draining = False

    @property
    def gateways(self) -> int:
        """Streams that are open."""
        return len(self._streams)

    @property
    def requests(self) -> int:
        """Requests that have not ended; none of an engine that has stopped."""
        stats = self._loop.stats()
        return 0 if self._loop.failure is not None else stats.num_running + stats.num_waiting

    def drain(self) -> None:
        """Tell every gateway now, and those that come, that this trunk takes nothing new."""
        with self._lock:
            self._draining = True
            for events in self._streams:
                events.put([])

    def Generate(self, requests: Iterator[pb.TrunkRequest], context: grpc.ServicerContext) -> Iterator[pb.StepEvents]:
        events: queue.SimpleQueue[list[TokenEvent] | None] = queue.SimpleQueue()
        sink = events.put
        reader = threading.Thread(
            target=self._read, args=(requests, sink, lambda: events.put(None)), name="gateway-reader", daemon=True
        )
        context.send_initial_metadata((("moe-ray-trunk", "1"),))
        with self._lock:
            self._streams.add(events)
        reader.start()
        step: list[TokenEvent] | None = []
        counters_at = 0.0
        told = -1
        try:
            while step is not None:
                adapters: list[AdapterEntry] = []
                if told != (told := self._book.revision):
                    adapters = self._book.all()
                times = None
                if (now := time.monotonic()) >= counters_at:
                    times, counters_at = self._loop.times, now + LOAD_EVERY_S
                if self._traces is not None:
                    self._traces.note(step)
                yield pack_step(step, pack_load(self._loop.stats(), self._draining, times), adapters)
                try:
                    step = events.get(timeout=LOAD_EVERY_S)
                except queue.Empty:
                    step = []
        finally:
            with self._lock:
                self._streams.discard(events)
            self._loop.drop(sink)
            if self._traces is not None:
                self._traces.drop(sink)

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
                if message.adapters:
                    self._note_adapters(map(unpack_adapter, message.adapters))
                for submit in message.submit:
                    self._submit(submit, sink)
                for request_id in message.abort:
                    self._loop.abort(request_id)
                if self._traces is not None:
                    self._traces.end(message.abort)
        except grpc.RpcError:
            pass  # the gateway is gone; `ended` tells the stream so
        finally:
            ended()

    def _note_adapters(self, entries: Iterable[AdapterEntry]) -> None:
        """Load what is new among the adapters, forget what is removed, and tell all gateways."""
        before = {entry.adapter_id for entry in self._book.served()}
        news = self._book.merge(entries)
        after = {entry.adapter_id for entry in self._book.served()}
        for entry in news:
            if not entry.removed:
                self._loop.load_adapter(entry.ref)
        for adapter_id in before - after:
            self._loop.drop_adapter(adapter_id)
        if news:
            with self._lock:
                for events in self._streams:
                    events.put([])

    def _submit(self, message: pb.Submit, sink: Callable[[list[TokenEvent]], None]) -> None:
        """Give a request to the engine. One that cannot be read ends in an error, and the stream goes on."""
        try:
            request = unpack_request(message)
            if self._traces is not None:
                self._traces.begin(request, sink)
            self._loop.submit(request, sink)
        except InvalidRequest as error:
            sink([TokenEvent(message.request_id, error=error)])
        except Exception:
            logger.exception("request %s cannot be read", message.request_id)
            sink([TokenEvent(message.request_id, error=EngineError("the trunk cannot read the request"))])
