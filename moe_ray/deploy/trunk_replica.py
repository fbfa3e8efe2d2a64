"""The Serve deployment of a trunk. What it holds is in `trunk_actor`, so that to deploy it takes no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psutil
from ray import serve
from ray.serve.handle import DeploymentHandle

from moe_ray import telemetry
from moe_ray.config import Config
from moe_ray.core import TrunkInfo
from moe_ray.deploy.cards import hide_cards_of_others
from moe_ray.errors import EngineError
from moe_ray.experts.sharing import ExpertNumbers


class TrunkReplica:
    """One actor holding the shared layers and the KV cache."""

    def __init__(
        self, config: Config, experts: Sequence[DeploymentHandle], numbers: ExpertNumbers | None = None
    ) -> None:
        """Load, link and listen. `experts` is empty for `transport: local`. Raises `CheckpointError`, `ConfigError`.

        `numbers`: by which `experts` know those of this model, where they are another's as well.
        """
        from moe_ray.deploy.trunk_actor import TrunkActor

        telemetry.configure(config.log_level, config.log_format)
        hide_cards_of_others(config.model.device)
        context = serve.get_replica_context()
        self._engine = TrunkActor(config, experts, context.deployment, context.replica_id.to_full_id_str(), numbers)

    async def endpoint(self) -> TrunkInfo:
        """Who this trunk is and where it listens."""
        return self._engine.info

    async def load(self) -> dict[str, Any]:
        """Place of this process and its load; cheap enough to be polled."""
        info = self._engine.info
        place = {"replica_id": info.replica_id, "node_id": info.node_id, "pid": info.pid}
        return {**place, **self._engine.status()}

    async def status(self) -> dict[str, Any]:
        """Place, memory and load of this process."""
        return {**telemetry.process_status(psutil.Process()), **await self.load()}

    def check_health(self) -> None:
        """Raise when the engine has stopped, so that Serve replaces this replica."""
        if self._engine.failure is not None:
            raise EngineError(f"the engine stopped: {self._engine.failure!r}")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve hands to the scaling policy."""
        return self._engine.load()

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close()
