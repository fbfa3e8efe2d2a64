"""What the page shows beside the chat: trunks and experts as they are now. Many open pages cost no more than one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

FRESH_S: Final = 1.0
"""How long one look answers everybody."""


class House(Protocol):
    """The processes behind a gateway."""

    @property
    def control(self) -> bool:
        """Whether the operator lets the page change something."""
        ...

    async def look(self) -> dict[str, Any]:
        """Everything of this moment, as `GET /house` answers it (docs/using.md)."""
        ...

    async def scale(self, expert: int, replicas: int | None) -> None:
        """Set the replicas of an expert; None leaves them to the policy. Does not wait. Raises `InvalidRequest`."""
        ...

    async def kill(self, replica_id: str) -> None:
        """End the process of a trunk or an expert's replica without a warning. Raises `InvalidRequest`."""
        ...


class Glance:
    """Asks `look` once for all who want to know within `FRESH_S`, and never twice at a time. One event loop."""

    def __init__(
        self, look: Callable[[], Awaitable[dict[str, Any]]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._look, self._clock = look, clock
        self._asked: asyncio.Future[dict[str, Any]] | None = None
        self._asked_at = 0.0

    async def __call__(self) -> dict[str, Any]:
        """The latest answer, at most `FRESH_S` old when it was asked for. Raises what `look` raises."""
        old = self._clock() - self._asked_at >= FRESH_S
        if self._asked is None or (old and self._asked.done()):
            self._asked_at = self._clock()
            self._asked = asyncio.ensure_future(self._look())
        return await asyncio.shield(self._asked)  # who goes away takes nothing from the others

    def forget(self) -> None:
        """Look anew the next time: something was changed."""
        self._asked = None
