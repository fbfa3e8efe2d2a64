"""Bounds how many HTTP requests a gateway works on, where no proxy before it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from moe_ray.api.observation import PROBES
from moe_ray.errors import NotReady


class InFlight:
    """ASGI: lets so many requests in at a time; a further one is answered at once, as not ready. Probes always pass."""

    def __init__(
        self,
        app: ASGIApp,
        most: int,
        path_of: Callable[[Scope], str],
        on_error: Callable[[Scope, Exception], ASGIApp],
    ) -> None:
        self._app, self._path_of, self._on_error = app, path_of, on_error
        self._most: Final = most
        self._now = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._path_of(scope) in PROBES:
            await self._app(scope, receive, send)
            return
        if self._now >= self._most:
            full = NotReady(f"this gateway works on {self._now} requests, and on no more at a time; try again soon")
            await self._on_error(scope, full)(scope, receive, send)
            return
        self._now += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._now -= 1
