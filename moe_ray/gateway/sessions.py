"""The gateway's side of its trunks: one stream to each, requests replayed on another when a trunk is lost. asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import grpc.aio

from moe_ray.core import AdapterEntry, AdapterRef, Request, TokenEvent, TrunkInfo
from moe_ray.errors import MoeRayError, NotReady
from moe_ray.gateway.session import Live, Session
from moe_ray.gateway.trunk_choice import choose, extend_keys
from moe_ray.gateway.trunk_link import TrunkLink
from moe_ray.observe.trunk_told import TrunkTold
from moe_ray.pb import moe_ray_pb2 as pb
from moe_ray.transport.base import LinkOptions
from moe_ray.trunk.adapter_book import AdapterBook

logger = logging.getLogger(__name__)

DiscoverTrunks = Callable[[], Awaitable[Sequence[TrunkInfo]]]
"""Asks which trunks there are. Raises `NotReady` when it cannot be known now."""


class Sessions:
    """All live requests of one gateway. Every method runs on the loop that called `start`."""

    def __init__(
        self, discover: DiscoverTrunks, options: LinkOptions, deadline_s: float = 60.0, refresh_s: float = 2.0
    ) -> None:
        """`deadline_s`: how long a request without a trunk waits for one before it ends in `NotReady`."""
        self._discover, self._options = discover, options
        self._deadline_s, self._refresh_s = deadline_s, refresh_s
        self._links: dict[str, tuple[TrunkLink, asyncio.Task[None]]] = {}
        self._live: dict[str, Live] = {}
        self._draw = random.Random()
        self._adapters = AdapterBook()
        self._changed = asyncio.Event()
        self._look = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._link_faults: dict[str, str] = {}
        """Trunk → why it could not be linked, as it was logged."""

    def start(self) -> None:
        """Begin to look for trunks."""
        self._spawn(self._keep_looking())

    def open(self, requests: Sequence[tuple[int, Request]]) -> Session:
        """Start generating (choice index, request) pairs."""
        return Session(self, requests)

    def add(self, lives: Sequence[Live]) -> None:
        """Take in sequences and send them to trunks, those with the same prompt to the same one."""
        self._live.update((live.request.request_id, live) for live in lives)
        self._place(lives)

    def remove(self, live: Live) -> None:
        """Forget a sequence; if its trunk still works on it, tell it to stop."""
        self._live.pop(live.request.request_id, None)
        if live.trunk is not None:
            live.trunk.abort(live.request.request_id)
            self._detach(live)

    @property
    def num_open(self) -> int:
        """Sessions with a sequence that is with a trunk or waits for one."""
        return len({id(live.events) for live in self._live.values()})

    async def status(self) -> list[pb.TrunkStatus]:
        """The state of every linked trunk. Empty when there is none."""
        links = [link for link, _ in self._links.values()]
        results = await asyncio.gather(*(self._info(link) for link in links))
        return [status for status in results if status is not None]

    @property
    def adapters(self) -> list[AdapterEntry]:
        """The adapters that are served, by name."""
        return self._adapters.served()

    def find_adapter(self, name: str) -> AdapterEntry | None:
        """The adapter that is served under a name."""
        return self._adapters.find(name)

    def serve_adapters(self, entries: Sequence[AdapterEntry]) -> None:
        """Serve adapters that no request has brought: those that are there from the start."""
        self._note_adapters(entries)

    def add_adapter(self, name: str, adapter: AdapterRef) -> None:
        """Serve an adapter under a name; trunks begin to load it."""
        self._tell_adapters([self._adapters.put(name, adapter)])

    def remove_adapter(self, entry: AdapterEntry) -> None:
        """Serve an adapter no longer; requests that have it go on."""
        self._tell_adapters([self._adapters.remove(entry)])

    def _note_adapters(self, entries: Sequence[AdapterEntry]) -> None:
        """Take in what a trunk knows of adapters, and tell the others what was news."""
        self._tell_adapters(self._adapters.merge(entries))

    def _tell_adapters(self, news: Sequence[AdapterEntry]) -> None:
        for link, _ in self._links.values():
            if news:
                link.tell_adapters(news)

    @property
    def trunks(self) -> list[TrunkInfo]:
        """The linked trunks."""
        return [link.info for link, _ in self._links.values()]

    def told(self) -> list[TrunkTold]:
        """What each linked trunk last said of itself; no call."""
        return [TrunkTold(link.info, link.load, link.counters) for link, _ in self._links.values()]

    async def ensure_trunk(self, timeout_s: float) -> TrunkInfo:
        """Return the linked trunk that takes the longest sequences, waiting for one. Raises `NotReady`."""
        deadline = time.monotonic() + timeout_s
        while not self._links:
            await self._wait_change(deadline)
        return max(self.trunks, key=lambda trunk: trunk.max_model_len)

    def _place(self, lives: Sequence[Live]) -> None:
        """Send requests to the trunks that suit them best; without a trunk, wait for one in the background."""
        links = [link for link, task in self._links.values() if not task.done()]
        links = [link for link in links if not link.view.draining] or links
        links = _long_enough(links, max((live.most_tokens for live in lives), default=0))
        if not links:
            self._spawn(self._place_later(lives))
            return
        same: dict[tuple[int, tuple[int, ...]], list[Live]] = {}
        for live in lives:
            same.setdefault((live.request.adapter_id, live.request.prompt_token_ids), []).append(live)
        for (adapter_id, prompt), together in same.items():
            shared = together[0].token_ids if len(together) == 1 else prompt
            keys: dict[int, list[bytes]] = {link.view.block_size: [] for link in links}
            for size, own in keys.items():
                extend_keys(own, shared, size, adapter_id)
            candidates = [link.view.candidate(keys[link.view.block_size], len(shared)) for link in links]
            chosen = choose(candidates, self._draw)
            link, known = links[chosen], candidates[chosen].known_tokens
            for live in together:
                live.keys = list(keys[link.view.block_size])
                self._send(live, link, known)

    def _send(self, live: Live, link: TrunkLink, known_tokens: int) -> None:
        token_ids, view = live.token_ids, link.view
        live.trunk, live.unanswered = link, len(token_ids) - known_tokens
        view.live += 1
        view.unanswered_tokens += live.unanswered
        self._note_keys(live)
        link.submit(replace(live.request, output_token_ids=token_ids[len(live.request.prompt_token_ids) :]))

    def _note_keys(self, live: Live) -> None:
        """Remember that its trunk computes the blocks of a sequence."""
        assert live.trunk is not None
        extend_keys(live.keys, live.token_ids, live.trunk.view.block_size, live.request.adapter_id)
        live.trunk.view.known.add(live.keys)

    def _answered(self, live: Live) -> None:
        """The prompt of a sequence is computed, or no longer wanted."""
        assert live.trunk is not None
        live.trunk.view.unanswered_tokens -= live.unanswered
        live.unanswered = 0

    def _detach(self, live: Live) -> None:
        assert live.trunk is not None
        self._answered(live)
        live.trunk.view.live -= 1
        live.trunk = None

    async def _place_later(self, lives: Sequence[Live]) -> None:
        deadline = time.monotonic() + self._deadline_s
        try:
            while not self._links:
                await self._wait_change(deadline)
        except NotReady as error:
            for live in lives:
                live.put(TokenEvent(live.request.request_id, error=error))
            return
        self._place([live for live in lives if live.request.request_id in self._live])

    async def _wait_change(self, deadline: float) -> None:
        self._look.set()
        try:
            # Not wait_for: that begins to wait a moment later, when the change may have come and gone.
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await self._changed.wait()
        except TimeoutError:
            raise NotReady("no trunk is up") from None

    def _on_event(self, event: TokenEvent) -> None:
        live = self._live.get(event.request_id)
        if live is None:
            return  # aborted a moment ago
        live.tokens += event.token_ids
        if live.trunk is not None:
            self._answered(live)
            if event.last:
                if event.error is None:
                    self._note_keys(live)  # of its output too: a conversation goes on from there
                self._detach(live)
        live.put(event)

    async def _keep_looking(self) -> None:
        while True:
            try:
                await self._find_trunks()
            except Exception:
                logger.exception("looking for trunks failed; it goes on")
            pause = self._refresh_s if self._links else 0.25
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._look.wait()
                await asyncio.sleep(0.05)  # a request waits for a trunk: look soon, but do not spin
            self._look.clear()

    async def _find_trunks(self) -> None:
        """Link the trunks that are not linked yet; one that cannot be linked is tried again and hides no other."""
        try:
            found = {info.replica_id: info for info in await self._discover()}
        except MoeRayError as error:
            logger.debug("looking for trunks: %s", error)
            return
        for replica_id, info in found.items():
            if replica_id in self._links:
                continue
            try:
                self._link(info)
            except MoeRayError as error:
                if self._link_faults.get(replica_id) != str(error):
                    logger.error("no link to trunk %s: %s; it is tried again", replica_id, error)
                self._link_faults[replica_id] = str(error)
        self._link_faults = {each: told for each, told in self._link_faults.items() if each in found}

    def _link(self, info: TrunkInfo) -> None:
        """Begin a stream to a trunk. Raises `ConfigError` where that cannot be."""
        link = TrunkLink(info, self._options, self._on_event, self._note_adapters)
        link.tell_adapters(self._adapters.all())
        self._link_faults.pop(info.replica_id, None)
        self._links[info.replica_id] = (link, self._spawn(self._follow(link)))
        self._changed.set()
        self._changed.clear()

    async def _follow(self, link: TrunkLink) -> None:
        """Run a link to its end, then replay its requests on other trunks."""
        try:
            await link.run()
        except Exception:
            logger.exception("the stream to trunk %s failed", link.info.replica_id)
        self._links.pop(link.info.replica_id, None)
        orphans = [live for live in self._live.values() if live.trunk is link]
        if orphans:
            logger.warning("replaying %d requests of trunk %s", len(orphans), link.info.replica_id)
            for live in orphans:
                self._detach(live)
            self._place(orphans)
        self._look.set()

    async def _info(self, link: TrunkLink) -> pb.TrunkStatus | None:
        try:
            return await link.stub.Info(pb.InfoRequest(), metadata=link.metadata, timeout=5)
        except grpc.aio.AioRpcError:
            return None

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a background task of the gateway ended", exc_info=error)


def _long_enough(links: Sequence[TrunkLink], tokens: float) -> list[TrunkLink]:
    """The trunks that take sequences of so many tokens, else those that take the longest: cards may differ."""
    longest = max((link.info.max_model_len for link in links), default=0)
    return [link for link in links if link.info.max_model_len >= min(tokens, longest)]
