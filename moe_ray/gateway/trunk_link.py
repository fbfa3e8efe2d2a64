"""The gateway's end of the stream to one trunk. asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable

import grpc.aio

from moe_ray.core import AdapterEntry, Request, TokenEvent, TrunkInfo
from moe_ray.errors import ProtocolError
from moe_ray.gateway.trunk_choice import TrunkView
from moe_ray.pb import moe_ray_pb2 as pb
from moe_ray.pb import moe_ray_pb2_grpc as pb_grpc
from moe_ray.transport.base import LinkOptions
from moe_ray.transport.grpc_channel import open_aio_channel, token_metadata
from moe_ray.trunk.wire import pack_adapter, pack_request, unpack_adapter, unpack_event

logger = logging.getLogger(__name__)


def _not_kept(entries: list[AdapterEntry]) -> None:
    """For whom adapters do not matter."""


class TrunkLink:
    """One stream to one trunk. Sends what has gathered since its last message, in one message."""

    def __init__(
        self,
        info: TrunkInfo,
        options: LinkOptions,
        on_event: Callable[[TokenEvent], None],
        on_adapters: Callable[[list[AdapterEntry]], None] = _not_kept,
    ) -> None:
        """`on_adapters` is told what the trunk knows of adapters."""
        self.info = info
        self._on_adapters = on_adapters
        self.view = TrunkView.of(info.block_size, info.kv_cache_tokens)
        self.load, self.counters = pb.TrunkLoad(), pb.TrunkCounters()
        """What it last said of itself."""
        self._on_event = on_event
        self._channel = open_aio_channel(info.address, options)
        self.stub = pb_grpc.TrunkStub(self._channel)
        self.metadata = token_metadata(options.token)
        self._outgoing = pb.TrunkRequest()
        self._wake = asyncio.Event()

    def submit(self, request: Request) -> None:
        """Start a request with the next message."""
        self._outgoing.submit.append(pack_request(request))
        self._wake.set()

    def abort(self, request_id: str) -> None:
        """End a request with the next message."""
        self._outgoing.abort.append(request_id)
        self._wake.set()

    def tell_adapters(self, entries: Iterable[AdapterEntry]) -> None:
        """Tell the trunk what it may not know of adapters, with the next message."""
        self._outgoing.adapters.extend(map(pack_adapter, entries))
        self._wake.set()

    async def run(self) -> None:
        """Carry messages both ways until the stream ends, however it does, or this task is cancelled."""
        stream = self.stub.Generate(metadata=self.metadata)
        reader = asyncio.create_task(self._read(stream))
        writer = asyncio.create_task(self._write(stream))
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            if writer.done() and writer.exception() is None:
                await reader  # the stream has ended: the reader knows why
        finally:
            for task in (reader, writer):
                task.cancel()
            stream.cancel()
            ended = await asyncio.gather(reader, writer, return_exceptions=True)
            await self._channel.close()
        for error in ended:
            if isinstance(error, Exception):
                raise error

    async def _read(self, stream: grpc.aio.StreamStreamCall) -> None:
        try:
            async for message in stream:
                if message.adapters:
                    self._on_adapters(list(map(unpack_adapter, message.adapters)))
                for event in message.events:
                    self._on_event(unpack_event(event))
                if message.HasField("load"):
                    self.load = load = message.load
                    if load.HasField("counters"):
                        self.counters = load.counters
                    held = 1 - load.kv_blocks_free / max(load.kv_blocks_total, 1)
                    self.view.told(load.num_running + load.num_waiting, held, load.draining)
        except grpc.aio.AioRpcError as error:
            logger.warning("trunk %s: stream ended (%s: %s)", self.info.replica_id, error.code().name, error.details())
        except ProtocolError as error:
            logger.error("trunk %s: %s", self.info.replica_id, error)

    async def _write(self, stream: grpc.aio.StreamStreamCall) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the reading side reports it
            while True:
                await self._wake.wait()
                self._wake.clear()
                message, self._outgoing = self._outgoing, pb.TrunkRequest()
                await stream.write(message)
