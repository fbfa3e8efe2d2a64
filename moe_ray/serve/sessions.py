"""The gateway's side of its trunks: one stream to each, requests replayed on another when a trunk is lost. asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

import grpc.aio

from moe_ray.core import Request, TokenEvent, TrunkInfo
from moe_ray.errors import MoeRayError, NotReady, ProtocolError
from moe_ray.pb import moe_ray_pb2 as pb
from moe_ray.pb import moe_ray_pb2_grpc as pb_grpc
from moe_ray.serve.links import open_aio_channel
from moe_ray.serve.trunk_wire import pack_request, unpack_event
from moe_ray.transport.base import LinkOptions
from moe_ray.transport.grpc import token_metadata

logger = logging.getLogger(__name__)

DiscoverTrunks = Callable[[], Awaitable[Sequence[TrunkInfo]]]
"""Asks which trunks there are. Raises `NotReady` when it cannot be known now."""


@dataclass(slots=True, eq=False)
class _Live:
    """A sequence whose client is still there."""

    index: int
    request: Request
    events: asyncio.Queue[tuple[int, TokenEvent]]
    tokens: list[int] = field(default_factory=list)
    """Output so far: what another trunk must be told to go on from here."""
    trunk: _TrunkLink | None = None

    def put(self, event: TokenEvent) -> None:
        self.events.put_nowait((self.index, event))


class Session:
    """The sequences of one HTTP request, as one stream of (choice index, event). Close it when its client is gone."""

    def __init__(self, sessions: Sessions, requests: Sequence[tuple[int, Request]]) -> None:
        self._sessions = sessions
        self._events: asyncio.Queue[tuple[int, TokenEvent]] = asyncio.Queue()
        self._live = {index: _Live(index, request, self._events) for index, request in requests}
        for live in self._live.values():
            sessions.add(live)

    async def events(self) -> AsyncIterator[tuple[int, TokenEvent]]:
        """Yield events until every sequence has ended or was stopped. A lost trunk shows only as a pause."""
        while self._live:
            index, event = await self._events.get()
            if index not in self._live:
                continue  # stopped a moment ago
            if event.last:
                self._sessions.remove(self._live.pop(index))
            yield index, event

    def stop(self, index: int) -> None:
        """End one sequence early; its blocks are freed and no more of its events are yielded. Idempotent."""
        live = self._live.pop(index, None)
        if live is not None:
            self._sessions.remove(live)

    def close(self) -> None:
        """End every sequence. Idempotent."""
        for index in list(self._live):
            self.stop(index)


class _TrunkLink:
    """One stream to one trunk. Sends what has gathered since its last message, in one message."""

    def __init__(self, info: TrunkInfo, options: LinkOptions, on_event: Callable[[TokenEvent], None]) -> None:
        self.info = info
        self.live = 0
        self._on_event = on_event
        self._channel = open_aio_channel(info.address, options)
        self.stub = pb_grpc.TrunkStub(self._channel)
        self.metadata = token_metadata(options.token)
        self._outgoing = pb.TrunkRequest()
        self._wake = asyncio.Event()

    def submit(self, request: Request) -> None:
        self._outgoing.submit.append(pack_request(request))
        self._wake.set()

    def abort(self, request_id: str) -> None:
        self._outgoing.abort.append(request_id)
        self._wake.set()

    async def run(self) -> None:
        """Carry messages both ways until the stream ends or this task is cancelled."""
        stream = self.stub.Generate(metadata=self.metadata)
        writer = asyncio.create_task(self._write(stream))
        try:
            async for message in stream:
                for event in message.events:
                    self._on_event(unpack_event(event))
        except grpc.aio.AioRpcError as error:
            logger.warning("trunk %s: stream ended (%s: %s)", self.info.replica_id, error.code().name, error.details())
        except ProtocolError as error:
            logger.error("trunk %s: %s", self.info.replica_id, error)
        finally:
            writer.cancel()
            stream.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await writer
            await self._channel.close()

    async def _write(self, stream: grpc.aio.StreamStreamCall) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the reading side reports it
            while True:
                await self._wake.wait()
                self._wake.clear()
                message, self._outgoing = self._outgoing, pb.TrunkRequest()
                await stream.write(message)


class Sessions:
    """All live requests of one gateway. Every method runs on the loop that called `start`."""

    def __init__(
        self, discover: DiscoverTrunks, options: LinkOptions, deadline_s: float = 60.0, refresh_s: float = 2.0
    ) -> None:
        """`deadline_s`: how long a request without a trunk waits for one before it ends in `NotReady`."""
        self._discover, self._options = discover, options
        self._deadline_s, self._refresh_s = deadline_s, refresh_s
        self._links: dict[str, tuple[_TrunkLink, asyncio.Task[None]]] = {}
        self._live: dict[str, _Live] = {}
        self._changed = asyncio.Event()
        self._look = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to look for trunks."""
        self._spawn(self._keep_looking())

    def open(self, requests: Sequence[tuple[int, Request]]) -> Session:
        """Start generating (choice index, request) pairs."""
        return Session(self, requests)

    def add(self, live: _Live) -> None:
        """Take in one sequence and send it to a trunk."""
        self._live[live.request.request_id] = live
        self._place(live)

    def remove(self, live: _Live) -> None:
        """Forget a sequence; if its trunk still works on it, tell it to stop."""
        self._live.pop(live.request.request_id, None)
        if live.trunk is not None:
            live.trunk.live -= 1
            live.trunk.abort(live.request.request_id)
            live.trunk = None

    async def status(self) -> list[pb.TrunkStatus]:
        """The state of every linked trunk. Empty when there is none."""
        links = [link for link, _ in self._links.values()]
        results = await asyncio.gather(*(self._info(link) for link in links))
        return [status for status in results if status is not None]

    @property
    def trunks(self) -> list[TrunkInfo]:
        """The linked trunks."""
        return [link.info for link, _ in self._links.values()]

    async def ensure_trunk(self, timeout_s: float) -> TrunkInfo:
        """Return a linked trunk, waiting for one. Raises `NotReady`."""
        deadline = time.monotonic() + timeout_s
        while not self._links:
            await self._wait_change(deadline)
        return self.trunks[0]

    def _place(self, live: _Live) -> None:
        """Send a request to the trunk with the fewest live ones; without a trunk, wait for one in the background."""
        links = [link for link, task in self._links.values() if not task.done()]
        if not links:
            self._spawn(self._place_later(live))
            return
        link = min(links, key=lambda candidate: candidate.live)
        live.trunk, link.live = link, link.live + 1
        tokens = live.request.output_token_ids + tuple(live.tokens)
        link.submit(replace(live.request, output_token_ids=tokens))

    async def _place_later(self, live: _Live) -> None:
        deadline = time.monotonic() + self._deadline_s
        try:
            while not self._links:
                await self._wait_change(deadline)
        except NotReady as error:
            live.put(TokenEvent(live.request.request_id, error=error))
            return
        if live.request.request_id in self._live:
            self._place(live)

    async def _wait_change(self, deadline: float) -> None:
        self._look.set()
        try:
            await asyncio.wait_for(self._changed.wait(), max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise NotReady("no trunk is up") from None

    def _on_event(self, event: TokenEvent) -> None:
        live = self._live.get(event.request_id)
        if live is None:
            return  # aborted a moment ago
        live.tokens += event.token_ids
        if event.last and live.trunk is not None:
            live.trunk.live -= 1
            live.trunk = None
        live.put(event)

    async def _keep_looking(self) -> None:
        while True:
            try:
                found = {info.replica_id: info for info in await self._discover()}
            except MoeRayError as error:
                logger.debug("looking for trunks: %s", error)
            else:
                for replica_id, info in found.items():
                    if replica_id not in self._links:
                        self._link(info)
            pause = self._refresh_s if self._links else 0.25
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._look.wait(), pause)
                await asyncio.sleep(0.05)  # somebody is waiting: look soon, but do not spin
            self._look.clear()

    def _link(self, info: TrunkInfo) -> None:
        link = _TrunkLink(info, self._options, self._on_event)
        self._links[info.replica_id] = (link, self._spawn(self._follow(link)))
        self._changed.set()
        self._changed.clear()

    async def _follow(self, link: _TrunkLink) -> None:
        try:
            await link.run()
        finally:
            self._links.pop(link.info.replica_id, None)
            orphans = [live for live in self._live.values() if live.trunk is link]
            if orphans:
                logger.warning("replaying %d requests of trunk %s", len(orphans), link.info.replica_id)
            for live in orphans:
                live.trunk = None
                self._place(live)
            self._look.set()

    async def _info(self, link: _TrunkLink) -> pb.TrunkStatus | None:
        try:
            return await link.stub.Info(pb.InfoRequest(), metadata=link.metadata, timeout=5)
        except grpc.aio.AioRpcError:
            return None

    def _spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
