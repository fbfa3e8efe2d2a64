"""Responses that clients may ask for again: what is kept of each, and the memory that keeps some of them."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, Protocol

from moe_ray.api.responses.body import abandoned, with_status

RUNNING: Final = frozenset({"queued", "in_progress"})
MOST_RUNNING: Final = 256
"""Background responses that are computed at a time."""
SILENT_S: Final = 15.0
"""A background response of which nothing was heard for so long has lost the gateway that computed it."""
_OVERHEAD: Final = 1024
"""Bytes of a kept response beside its texts."""

Progress = Literal["on", "stopped", "full"]
"""Of a background response: go on; it was cancelled or deleted; the memory has no room for its events."""


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """One response. Its texts are JSON: what they take is counted, and they travel between processes."""

    response_id: str
    status: str
    response: str
    input_items: str
    """The items of its own request; those before them are its ancestors'."""
    previous_id: str | None = None
    """The response that it goes on from."""


class ResponseStore(Protocol):
    """Where responses are kept. Raises `NotReady` where it is out of reach."""

    async def put(self, stored: StoredResponse) -> bool:
        """Keep a finished response; False when it does not fit."""
        ...

    async def get(self, response_id: str) -> StoredResponse | None:
        """A response; None for one that was never kept, was deleted, or had to make room."""
        ...

    async def conversation(self, response_id: str) -> list[StoredResponse]:
        """A response and those that it goes on from, the last one first; it ends early where one is gone."""
        ...

    async def delete(self, response_id: str) -> bool:
        """Forget a response, and stop it if it is computed. False when there is none."""
        ...

    async def begin(self, stored: StoredResponse, events: Sequence[str] | None) -> bool:
        """Keep a background response that starts to be computed, with its first events if it is a stream.

        False when too many are computed.
        """
        ...

    async def advance(self, response_id: str, status: str, events: Sequence[str] = ()) -> Progress:
        """Say, at least every few seconds, that a background response is computed, and add its events."""
        ...

    async def finish(self, stored: StoredResponse, events: Sequence[str] = ()) -> None:
        """Keep what a background response has become, unless it was cancelled or deleted."""
        ...

    async def cancel(self, response_id: str) -> StoredResponse | None:
        """Stop a background response; what it is now. One that has ended stays as it is."""
        ...

    async def events(self, response_id: str, after: int, wait_s: float) -> tuple[list[str], bool] | None:
        """The events behind number `after`, and whether they are the last ones; waits for some at most `wait_s`.

        None for a response that is not kept, or is no stream.
        """
        ...


@dataclass(slots=True, eq=False)
class _Kept:
    stored: StoredResponse
    heard: float
    events: list[str] | None = None
    num_bytes: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when there are events that a reader has not seen."""

    @property
    def running(self) -> bool:
        return self.stored.status in RUNNING


class ResponseMemory:
    """Keeps responses in this process; the conversation that was longest not used makes room. For one event loop.

    A response never goes after one that goes on from it, so that what is kept can be continued. Those that are being
    computed stay.
    """

    def __init__(self, max_bytes: int, max_number: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes, self._max_number, self._clock = max_bytes, max_number, clock
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        """Least recently used first; ancestors behind their descendants."""
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    async def put(self, stored: StoredResponse) -> bool:
        self._insert(stored, None)
        self._make_room()
        return stored.response_id in self._kept

    async def get(self, response_id: str) -> StoredResponse | None:
        kept = self._used(response_id)
        return None if kept is None else kept.stored

    async def conversation(self, response_id: str) -> list[StoredResponse]:
        self._used(response_id)
        return [kept.stored for kept in self._line(response_id)]

    async def delete(self, response_id: str) -> bool:
        kept = self._drop(response_id)
        return kept is not None

    async def begin(self, stored: StoredResponse, events: Sequence[str] | None) -> bool:
        if sum(kept.running for kept in self._all()) >= MOST_RUNNING:
            return False
        self._insert(stored, events)
        self._make_room()
        return True

    async def advance(self, response_id: str, status: str, events: Sequence[str] = ()) -> Progress:
        kept = self._kept.get(response_id)
        if kept is None or not kept.running:
            return "stopped"
        kept.heard = self._clock()
        if status != kept.stored.status:
            self._set_status(kept, status)
        self._append(kept, events)
        self._make_room()
        return "on" if self.num_bytes <= self._max_bytes else "full"

    async def finish(self, stored: StoredResponse, events: Sequence[str] = ()) -> None:
        kept = self._kept.get(stored.response_id)
        if kept is None or not kept.running:
            return
        self._replace(kept, stored)
        self._append(kept, events)
        if kept.num_bytes > self._max_bytes:
            self._drop_events(kept)
        self._used(stored.response_id)
        self._make_room()

    async def cancel(self, response_id: str) -> StoredResponse | None:
        kept = self._used(response_id)
        if kept is None:
            return None
        if kept.running:
            self._set_status(kept, "cancelled")
        return kept.stored

    async def events(self, response_id: str, after: int, wait_s: float) -> tuple[list[str], bool] | None:
        kept = self._used(response_id)
        if kept is None or kept.events is None:
            return None
        if kept.running and len(kept.events) <= after + 1:
            kept.news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await kept.news.wait()
        return None if kept.events is None else (kept.events[after + 1 :], not kept.running)

    def _insert(self, stored: StoredResponse, events: Sequence[str] | None) -> None:
        self._drop(stored.response_id)
        kept = _Kept(stored, self._clock(), None if events is None else [])
        self._kept[stored.response_id] = kept
        self._count(kept, _size(stored))
        self._append(kept, events or ())
        self._used(stored.response_id)

    def _replace(self, kept: _Kept, stored: StoredResponse) -> None:
        self._count(kept, _size(stored) - _size(kept.stored))
        kept.stored = stored
        kept.news.set()

    def _set_status(self, kept: _Kept, status: str) -> None:
        response = with_status(kept.stored.response, status)
        self._replace(kept, replace(kept.stored, status=status, response=response))

    def _append(self, kept: _Kept, events: Sequence[str]) -> None:
        if kept.events is not None and events:
            kept.events += events
            self._count(kept, sum(map(sys.getsizeof, events)))
            kept.news.set()

    def _drop_events(self, kept: _Kept) -> None:
        """Rather the response without its events than neither."""
        self._count(kept, _size(kept.stored) - kept.num_bytes)
        kept.events = None

    def _count(self, kept: _Kept, num_bytes: int) -> None:
        kept.num_bytes += num_bytes
        self.num_bytes += num_bytes

    def _line(self, response_id: str | None) -> Iterator[_Kept]:
        """A response and its ancestors, as far as they are kept."""
        while response_id is not None and (kept := self._kept.get(response_id)) is not None:
            yield kept
            response_id = kept.stored.previous_id

    def _used(self, response_id: str) -> _Kept | None:
        """Note that a response, and so each of its ancestors, is used now."""
        kept = self._kept.get(response_id)
        for each in self._line(response_id):
            self._kept.move_to_end(each.stored.response_id)
        if kept is not None:
            self._check_heard(kept)
        return kept

    def _all(self) -> list[_Kept]:
        """What is kept, once those that lost their gateway are known."""
        every = list(self._kept.values())
        for kept in every:
            self._check_heard(kept)
        return every

    def _check_heard(self, kept: _Kept) -> None:
        if kept.running and self._clock() - kept.heard > SILENT_S:
            self._replace(kept, replace(kept.stored, status="failed", response=abandoned(kept.stored.response)))

    def _drop(self, response_id: str) -> _Kept | None:
        kept = self._kept.pop(response_id, None)
        if kept is not None:
            self.num_bytes -= kept.num_bytes
            kept.events = None
            kept.news.set()  # ends what reads its events
        return kept

    def _make_room(self) -> None:
        def full() -> bool:
            return self.num_bytes > self._max_bytes or len(self._kept) > self._max_number

        for kept in self._all() if full() else ():
            if full() and not kept.running:
                self._drop(kept.stored.response_id)


def _size(stored: StoredResponse) -> int:
    return sys.getsizeof(stored.response) + sys.getsizeof(stored.input_items) + _OVERHEAD
