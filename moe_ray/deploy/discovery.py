"""Lists replicas and trunks, and what they answer, over the handles of their deployments. Control plane only."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from moe_ray.core import ReplicaInfo, TrunkInfo
from moe_ray.deploy.ray_internals import routed_replicas
from moe_ray.errors import NotReady
from moe_ray.experts.replica_data import packed, unpacked

logger = logging.getLogger(__name__)

BROADCAST_TIMEOUT_S = 5.0
EXPERT_TIMEOUT_S = 1.0
"""How long the experts are waited for: while one is away, links to the others' new replicas must not wait."""
MOST_ASKED = 32
"""Deployments that are asked at a time."""
_AWAY = (RayServeException, RayError, TimeoutError, ConnectionError)
"""What a handle raises while its controller or its replicas are away."""


def as_metadata(info: ReplicaInfo) -> dict[str, Any]:
    """What a replica answers to Serve's `record_replica_metadata`, which Serve pushes to all that hold its handle."""
    return {"endpoint": packed(info)}


def from_metadata(metadata: Mapping[str, Any]) -> ReplicaInfo | None:
    """The reverse; None for a replica that reported nothing, or in another version's form."""
    told = metadata.get("endpoint")
    if told is None:
        return None
    try:
        return unpacked(told)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        logger.warning("a replica reports itself in a form that this version does not know: %r", error)
        return None


class ExpertDiscovery:
    """Lists the replicas of expert deployments; for one thread, outside event loops.

    Serve pushes the list of replicas to the handles in this process, with what each replica reported when it was ready.
    Replicas are asked only for what that cannot tell: the keys of one that still loads, the adapters of one that lacks
    some, or anything at all where the handles are built otherwise (`ray_internals.routed_replicas` sees none then).
    With the question they are told which adapters are wanted.
    """

    def __init__(self, handles: Sequence[DeploymentHandle]) -> None:
        self._handles = list(handles)
        self._known: dict[str, dict[str, ReplicaInfo]] = {handle.deployment_name: {} for handle in handles}
        # A broadcast is sent when its results are asked for, so it takes a thread each.
        self._threads = ThreadPoolExecutor(MOST_ASKED, thread_name_prefix="expert-discovery")
        self._adapters = threading.Lock()
        self._wanted: dict[int, str] = {}
        self._unwanted: set[int] = set()
        """Ids of adapters that replicas are to be told to forget."""
        self._lost: set[tuple[str, int]] = set()
        """(replica id, adapter) that were lost since the replica was asked last."""

    def want(self, wanted: Mapping[int, str]) -> None:
        """`AdapterAsker.want`; from any thread."""
        with self._adapters:
            self._unwanted |= self._wanted.keys() - wanted.keys()
            self._wanted = dict(wanted)

    def lost(self, replica_id: str, adapters: Collection[int]) -> None:
        """`AdapterAsker.lost`; from any thread."""
        with self._adapters:
            self._lost.update((replica_id, adapter_id) for adapter_id in adapters)

    def members(self) -> frozenset[str]:
        """Name the replicas that Serve routes to, by what it has pushed to this process: no call."""
        return frozenset(replica_id for handle in self._handles for replica_id in routed_replicas(handle) or ())

    def ask(self) -> list[ReplicaInfo]:
        """List the replicas of all deployments.

        Raises `NotReady` only when none is known and none answers: a deployment without replicas must not hide the
        others. Of a replica that does not answer in time, what it said before is told again.
        """
        failures: list[str] = []
        asked = []
        wanted, unwanted = self._take_adapters()
        for handle in self._handles:
            name, pushed = handle.deployment_name, _pushed(handle)
            if pushed is not None:
                self._known[name] = {each: self._known[name].get(each, info) for each, info in pushed.items()}
                known = self._known[name].values()
                if not unwanted and not any(info.loading or wanted.keys() - info.adapters for info in known):
                    continue
            try:
                question = ("hold_adapters", wanted, unwanted) if wanted or unwanted else ("endpoint",)
                asked.append((name, pushed, handle.broadcast(*question)))
            except _AWAY as error:
                failures.append(f"{name}: {error}")
                if pushed is None:
                    self._known[name] = {}
        for (name, pushed, _), results in zip(asked, self._answers([each[2] for each in asked]), strict=True):
            if isinstance(results, Exception):
                failures.append(f"{name}: {results}")
                continue
            answers = {result.replica_id: result for result in results if isinstance(result, ReplicaInfo)}
            self._known[name] = answers if pushed is None else {**self._known[name], **answers}
        found = [info for infos in self._known.values() for info in infos.values()]
        if not found and len(failures) == len(self._handles):
            raise NotReady(f"no expert deployment answers: {failures[0]}")
        return found

    def _take_adapters(self) -> tuple[dict[int, str], list[int]]:
        """The adapters that are wanted, and those to be forgotten; what was lost is no longer known as held."""
        with self._adapters:
            wanted, unwanted, lost = dict(self._wanted), sorted(self._unwanted - self._wanted.keys()), self._lost
            self._unwanted, self._lost = set(), set()
        for infos in self._known.values():
            for replica_id, info in infos.items():
                gone = {adapter_id for each, adapter_id in lost if each == replica_id}
                if gone or unwanted:
                    infos[replica_id] = replace(info, adapters=info.adapters - gone - set(unwanted))
        return wanted, unwanted

    def _answers(self, responses: Sequence[Any]) -> list[list[Any] | Exception]:
        """What came of each broadcast, all waited for at once: one that stays away takes no time from the others."""

        def results(response: Any) -> list[Any] | Exception:
            try:
                found: list[Any] = response.results(timeout_s=EXPERT_TIMEOUT_S, return_exceptions=True)
            except _AWAY as error:
                return error
            return found

        return list(self._threads.map(results, responses))


def _pushed(handle: DeploymentHandle) -> dict[str, ReplicaInfo] | None:
    """What the replicas of a deployment said when they were ready, by their id; None where one said nothing."""
    if (routed := routed_replicas(handle)) is None:
        return None
    infos = [info for info in map(from_metadata, routed.values()) if info is not None]
    return {info.replica_id: info for info in infos} if len(infos) == len(routed) else None


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


async def ask_each(
    handles: Sequence[DeploymentHandle], method: str, timeout_s: float = BROADCAST_TIMEOUT_S
) -> list[list[dict[str, Any]]]:
    """Return what the replicas of each deployment answer to `method`; none for one that does not answer in time."""

    async def ask(handle: DeploymentHandle) -> list[dict[str, Any]]:
        try:
            response = handle.broadcast(method)
            results = await response.results_async(timeout_s=timeout_s, return_exceptions=True)
        except _AWAY:
            return []
        return [result for result in results if isinstance(result, dict)]

    return list(await asyncio.gather(*map(ask, handles)))
