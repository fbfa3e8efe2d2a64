"""Asks Ray Serve's replicas who they are, over their deployments' handles. Control plane only."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from moe_ray.core import ReplicaInfo, TrunkInfo
from moe_ray.errors import NotReady

BROADCAST_TIMEOUT_S = 5.0
EXPERT_TIMEOUT_S = 1.0
"""How long the experts are waited for: while one is away, links to the others' new replicas must not wait."""
_AWAY = (RayServeException, RayError, TimeoutError, ConnectionError)
"""What a handle raises while its controller or its replicas are away."""


def discover_experts(handles: Sequence[DeploymentHandle]) -> Callable[[], list[ReplicaInfo]]:
    """Return a function that lists the replicas of all `handles`; for use outside event loops.

    It raises `NotReady` only when no deployment answers: one without replicas must not hide the others. Of one that
    does not answer in time, the replicas that it had are told again.
    """
    known: dict[str, list[ReplicaInfo]] = {}

    def ask() -> list[ReplicaInfo]:
        failures: list[str] = []
        responses = []
        end = time.monotonic() + EXPERT_TIMEOUT_S
        for handle in handles:
            try:
                responses.append((handle.deployment_name, handle.broadcast("endpoint")))
            except _AWAY as error:
                failures.append(f"{handle.deployment_name}: {error}")
                known[handle.deployment_name] = []
        for name, response in responses:
            try:
                left = max(end - time.monotonic(), 0.05)
                results = response.results(timeout_s=left, return_exceptions=True)
            except _AWAY as error:
                failures.append(f"{name}: {error}")
            else:
                known[name] = [result for result in results if isinstance(result, ReplicaInfo)]
        if len(failures) == len(handles):
            raise NotReady(f"no expert deployment answers: {failures[0]}")
        return [info for infos in known.values() for info in infos]

    return ask


def replica_ids(handles: Sequence[DeploymentHandle]) -> Callable[[], frozenset[str]]:
    """Return a function that names the replicas Serve routes to, by what it has pushed to this process: asks nobody.

    Reads the routers inside the handles (ray 2.60). Where they are built otherwise it always returns the same, and who
    asks by time still learns everything.
    """

    def ask() -> frozenset[str]:
        found: set[str] = set()
        for handle in handles:
            router = getattr(getattr(handle, "_router", None), "_asyncio_router", None)
            replicas = getattr(getattr(router, "_request_router", None), "curr_replicas", {})
            found.update(replica.unique_id for replica in list(replicas))
        return frozenset(found)

    return ask


def discover_trunks(handle: DeploymentHandle) -> Callable[[], Any]:
    """Return a coroutine function that lists the trunks behind `handle`. It raises `NotReady` when none answers."""

    async def ask() -> list[TrunkInfo]:
        try:
            results = await handle.broadcast("endpoint").results_async(
                timeout_s=BROADCAST_TIMEOUT_S, return_exceptions=True
            )
        except _AWAY as error:
            raise NotReady(f"no trunk answers: {error}") from error
        return [result for result in results if isinstance(result, TrunkInfo)]

    return ask


async def ask_each(handles: Sequence[DeploymentHandle], method: str) -> list[list[dict[str, Any]]]:
    """Return what the replicas of each deployment answer to `method`; none for one that does not answer in time."""

    async def ask(handle: DeploymentHandle) -> list[dict[str, Any]]:
        try:
            response = handle.broadcast(method)
            results = await response.results_async(timeout_s=BROADCAST_TIMEOUT_S, return_exceptions=True)
        except _AWAY:
            return []
        return [result for result in results if isinstance(result, dict)]

    return list(await asyncio.gather(*map(ask, handles)))
