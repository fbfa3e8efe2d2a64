"""Where the responses of several gateways are kept: one actor, so that each gateway knows those of all others."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import psutil
import ray
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from moe_ray import telemetry
from moe_ray.api.responses.memory import Progress, ResponseMemory, ResponseStore, StoredResponse
from moe_ray.config import Config
from moe_ray.config.gateway import GatewaySection
from moe_ray.errors import NotReady

_T = TypeVar("_T")


def response_store(options: GatewaySection, shared: DeploymentHandle | None) -> ResponseStore | None:
    """The store of one gateway: the `shared` one, or its own memory; None where nothing is to be kept."""
    if shared is not None:
        return SharedResponses(shared)
    return ResponseMemory(*_bounds(options)) if options.responses_memory_mib else None


def _bounds(options: GatewaySection) -> tuple[int, int]:
    return options.responses_memory_mib * 2**20, options.max_stored_responses


class StoredResponses(ResponseMemory):
    """The Serve deployment: the memory itself. What it keeps is lost with its process."""

    def __init__(self, config: Config) -> None:
        telemetry.configure(config.log_level)
        super().__init__(*_bounds(config.gateway))

    async def status(self) -> dict[str, Any]:
        """Place and memory of this process, and what it keeps."""
        node_id = ray.get_runtime_context().get_node_id()
        kept = {"stored_responses": len(self), "stored_bytes": self.num_bytes}
        return {**telemetry.process_status(psutil.Process()), "node_id": node_id, **kept}


class SharedResponses:
    """A `ResponseStore` over the handle of `StoredResponses`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def put(self, stored: StoredResponse) -> bool:
        return await _answer(self._handle.put.remote(stored))

    async def get(self, response_id: str) -> StoredResponse | None:
        return await _answer(self._handle.get.remote(response_id))

    async def conversation(self, response_id: str) -> list[StoredResponse]:
        return await _answer(self._handle.conversation.remote(response_id))

    async def delete(self, response_id: str) -> bool:
        return await _answer(self._handle.delete.remote(response_id))

    async def begin(self, stored: StoredResponse, events: Sequence[str] | None) -> bool:
        return await _answer(self._handle.begin.remote(stored, events))

    async def advance(self, response_id: str, status: str, events: Sequence[str] = ()) -> Progress:
        return await _answer(self._handle.advance.remote(response_id, status, events))

    async def finish(self, stored: StoredResponse, events: Sequence[str] = ()) -> None:
        await _answer(self._handle.finish.remote(stored, events))

    async def cancel(self, response_id: str) -> StoredResponse | None:
        return await _answer(self._handle.cancel.remote(response_id))

    async def events(self, response_id: str, after: int, wait_s: float) -> tuple[list[str], bool] | None:
        return await _answer(self._handle.events.remote(response_id, after, wait_s))


async def _answer(call: Awaitable[_T]) -> _T:
    """What a call comes to; raises `NotReady` while the actor is away."""
    try:
        return await call
    except (RayServeException, RayError) as error:
        raise NotReady("The store of responses is not there now. Please try again later.") from error
