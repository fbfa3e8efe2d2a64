"""The house behind a gateway in Ray Serve: asked, scaled and, where the operator lets the page, killed in part."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from moe_ray.deploy.discovery import ask_each
from moe_ray.deploy.house_view import ModelFacts, deployed, house_view
from moe_ray.deploy.ray_internals import kill_replica, serve_details
from moe_ray.deploy.replica_numbers import change
from moe_ray.errors import ConfigError, InvalidRequest, NotReady

logger = logging.getLogger(__name__)

TIMEOUT_S: Final = 2.0
"""How long replicas are waited for: the page shows one that does not answer as away."""


class ServedHouse:
    """Trunk and experts of one Serve application. Runs on the gateway's loop; what waits for Serve has a thread."""

    def __init__(
        self,
        application: str,
        facts: ModelFacts,
        trunks: Sequence[DeploymentHandle],
        experts: Sequence[DeploymentHandle],
        missing: Callable[[], Awaitable[list[str] | None]],
        control: bool,
    ) -> None:
        """`trunks`: of each model. `missing`: the parts that are not up, as `GET /health` tells them."""
        self.control = control
        self._application, self._facts = application, facts
        self._trunks, self._experts, self._missing = list(trunks), list(experts), missing

    async def look(self) -> dict[str, Any]:
        """Everything of this moment. Raises `NotReady` while Serve's controller is away."""
        details, told, missing = await asyncio.gather(
            self._details(),
            ask_each([*self._trunks, *self._experts], "load", TIMEOUT_S),
            self._missing(),
        )
        trunks, answers = told[: len(self._trunks)], told[len(self._trunks) :]
        names = [handle.deployment_name for handle in self._experts]
        view = house_view(
            self._facts,
            deployed(self._application, details),
            dict(zip((handle.deployment_name for handle in self._trunks), trunks, strict=True)),
            dict(zip(names, answers, strict=True)),
            missing or [],
        )
        return {**view, "control": self.control}

    async def scale(self, expert: int, replicas: int | None) -> None:
        """Set the replicas of an expert. Does not wait for them. Raises `InvalidRequest`."""
        details = await self._details()
        deployments = details.get("applications", {}).get(self._application, {}).get("deployments", {})
        try:
            await asyncio.to_thread(change, [expert], replicas, self._application, deployments)
        except ConfigError as error:
            raise InvalidRequest(str(error), "expert" if "no expert" in str(error) else "replicas") from None
        logger.warning(
            "the page set the replicas of expert %d: %s", expert, "by policy" if replicas is None else replicas
        )

    async def kill(self, replica_id: str) -> None:
        """Kill a replica of the trunk or of an expert. Raises `InvalidRequest` for any other id."""
        details = await self._details()
        known = deployed(self._application, details)
        names = {handle.deployment_name for handle in (*self._trunks, *self._experts)}
        if not any(replica_id in known[name].states for name in names & known.keys()):
            raise InvalidRequest("no such replica of the trunk or of an expert", "replica_id")
        logger.warning("the page kills %s", replica_id)
        try:
            await asyncio.to_thread(kill_replica, replica_id)
        except ValueError:
            raise InvalidRequest("this replica is gone already", "replica_id") from None

    async def _details(self) -> Mapping[str, Any]:
        """What Serve says of all applications. Raises `NotReady` while its controller is away."""
        try:
            return await asyncio.to_thread(serve_details)
        except (RayError, RayServeException) as error:
            raise NotReady("Serve's controller does not answer") from error
