"""The sequences of one HTTP request at the gateway: what a replay needs of each, and their events as one stream."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from moe_ray.core import Request, TokenEvent
from moe_ray.errors import EngineError, Overloaded
from moe_ray.gateway.trunk_link import TrunkLink

AT_ONCE: Final = 128
"""Sequences of one HTTP request that are with trunks at a time."""


@dataclass(slots=True, eq=False)
class Live:
    """A sequence whose client is still there."""

    index: int
    request: Request
    events: asyncio.Queue[tuple[int, TokenEvent]]
    tokens: list[int] = field(default_factory=list)
    """Output so far: what another trunk must be told to go on from here."""
    trunk: TrunkLink | None = None
    keys: list[bytes] = field(default_factory=list)
    """Of its first full blocks, in the block size of its trunk."""
    unanswered: int = 0
    """Its share of its trunk's `unanswered_tokens`."""
    sent: bool = False
    """It is with a trunk, or waits for one."""
    may_wait: bool = False
    """It was not among the first of its request: a full queue delays it, and does not end it."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt and output so far."""
        return (*self.request.prompt_token_ids, *self.request.output_token_ids, *self.tokens)

    @property
    def most_tokens(self) -> float:
        """Its length in the end, at most."""
        most = self.request.sampling.max_tokens
        return math.inf if most is None else len(self.request.prompt_token_ids) + most

    def put(self, event: TokenEvent) -> None:
        self.events.put_nowait((self.index, event))


class Placement(Protocol):
    """Brings sequences to trunks."""

    def add(self, lives: Sequence[Live]) -> None:
        """Send sequences to trunks; their events go to their queue."""
        ...

    def remove(self, live: Live) -> None:
        """Forget a sequence, and end it where it runs. Idempotent."""
        ...


class Session:
    """The sequences of one HTTP request, as one stream of (choice index, event). Close it when its client is gone.

    At most `AT_ONCE` of them are with trunks; each that ends makes room for the next, so that a request of thousands of
    prompts neither fills a trunk's queue nor is refused because of it.
    """

    def __init__(self, placement: Placement, requests: Sequence[tuple[int, Request]]) -> None:
        self._placement = placement
        self._events: asyncio.Queue[tuple[int, TokenEvent]] = asyncio.Queue()
        self._live = {index: Live(index, request, self._events) for index, request in requests}
        lives = list(self._live.values())
        for live in lives[AT_ONCE:]:
            live.may_wait = True
        self._later = deque(lives[AT_ONCE:])
        self._num_sent = 0
        self._send(lives[:AT_ONCE])

    async def next(self, timeout_s: float | None = None) -> tuple[int, TokenEvent] | None:
        """The next event of a sequence that was not stopped; None when none came within `timeout_s`.

        A lost trunk shows only as a pause. Raises `EngineError` when every sequence has ended or was stopped.
        """
        while self._live:
            if self._events.empty():
                try:
                    async with asyncio.timeout(timeout_s):
                        index, event = await self._events.get()
                except TimeoutError:
                    return None
            else:
                index, event = self._events.get_nowait()
            live = self._live.get(index)
            if live is None:
                continue  # stopped a moment ago
            if event.last:
                if self._try_later(live, event):
                    continue
                self._drop(index)
            return index, event
        raise EngineError("the events of a request ended without a finish reason")

    def stop(self, index: int) -> None:
        """End one sequence early; its blocks are freed and no more of its events are told. Idempotent."""
        if index in self._live:
            self._drop(index)

    def close(self) -> None:
        """End every sequence. Idempotent."""
        lives = list(self._live.values())
        self._live.clear()
        self._later.clear()
        for live in lives:
            self._placement.remove(live)

    def _send(self, lives: Sequence[Live]) -> None:
        for live in lives:
            live.sent = True
        self._num_sent += len(lives)
        self._placement.add(lives)

    def _take_back(self, live: Live) -> None:
        live.sent = False
        self._num_sent -= 1
        self._placement.remove(live)

    def _drop(self, index: int) -> None:
        live = self._live.pop(index)
        if not live.sent:
            self._later.remove(live)
            return
        self._take_back(live)
        if self._later:
            self._send([self._later.popleft()])

    def _try_later(self, live: Live, event: TokenEvent) -> bool:
        """Put back a sequence that a full queue refused, if others of this request will make room for it."""
        if not isinstance(event.error, Overloaded) or not live.may_wait or self._num_sent <= 1:
            return False
        self._take_back(live)
        self._later.appendleft(live)
        return True
