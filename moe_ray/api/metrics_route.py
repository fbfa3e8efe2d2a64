"""GET /metrics: what this gateway has counted, what its trunks last said, and the load of the experts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from moe_ray.api.service import ServedModel
from moe_ray.observe.exposition import expose

logger = logging.getLogger(__name__)

KEEP_S: Final = 5.0
"""How old the experts' load may be."""
WAIT_S: Final = 0.5
"""How long a scrape waits for it; what was known before is told then."""

EXPOSITION: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "Metrics, in the form that the scraper accepts",
        "content": {name: {"schema": {"type": "string"}} for name in ("text/plain", "application/openmetrics-text")},
    }
}
"""The `responses` of the route. No key is asked for."""


class KeptLoad:
    """The load of the experts, asked for now and then. Never slow, and never a failure."""

    def __init__(self, ask: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        self._ask = ask
        self._known: dict[str, Any] = {}
        self._asked_at = -KEEP_S
        self._asking: asyncio.Task[None] | None = None

    async def get(self) -> dict[str, Any]:
        """What GET /experts answers; {} while that is not known."""
        now = time.monotonic()
        if self._asking is None and now - self._asked_at >= KEEP_S:
            self._asked_at = now
            self._asking = asyncio.create_task(self._refresh())
        if self._asking is not None:
            await asyncio.wait({self._asking}, timeout=WAIT_S)
        return self._known

    async def _refresh(self) -> None:
        try:
            self._known = await self._ask()
        except Exception:
            logger.exception("the experts' load cannot be asked for")
        finally:
            self._asking = None


def metrics_route(
    service: ServedModel, expert_load: Callable[[], Awaitable[dict[str, Any]]]
) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint; `expert_load` answers GET /experts."""
    load = KeptLoad(expert_load)

    async def metrics(request: Request) -> Response:
        """What this gateway and its trunks have counted, for Prometheus."""
        experts = await load.get()
        accept = request.headers.get("accept", "")
        body, media_type = expose(accept, [model.told() for model in service.models], experts)
        return Response(body, headers={"Content-Type": media_type})

    return metrics
