"""The autoscaling policies: of a deployment of experts, of the trunk. Serve runs them in its controller, often.

Serve ships this file by value and everything that it imports by name: so it holds the classes alone, and what the
experts of an application share is in `replica_targets`. (A policy for a whole application would fit better, but Serve
takes one from config files only, not from `serve.run`.)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ray.serve.config import AutoscalingContext

from moe_ray.deploy.replica_targets import (
    TRUNK,
    TrunkScaler,
    decided_or,
    measured,
    measured_trunks,
    scaler_of,
    set_by_hand,
    within_serve,
)
from moe_ray.deploy.trunk_autoscale import TrunkScaleOptions, TrunksState
from moe_ray.experts.planning.autoscale import AutoscaleOptions, ExpertState


class ExpertPolicy:
    """Asks the application's scaler how many replicas one deployment should have."""

    def __init__(self, expert: int, min_replicas: int, max_replicas: int, options: dict[str, Any]) -> None:
        """`expert`: the deployment's first. `options` are the fields of `AutoscaleOptions`, as JSON has them."""
        self._expert, self._bounds = expert, (min_replicas, max_replicas)
        self._options = AutoscaleOptions(**options)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return (replicas, no state). Never raises: that would stop Serve's control loop."""

        def measure() -> ExpertState:
            busy, waiting = measured(context.raw_metrics or {})
            least, most = within_serve(self._bounds, context)
            return ExpertState(context.target_num_replicas, busy, waiting, least, most)

        def decide() -> int:
            scaler = scaler_of(context.app_name or "")
            return scaler.replicas(self._expert, context.current_time or 0.0, measure, self._options)

        return decided_or(context.target_num_replicas, decide), {}


class TrunkPolicy:
    """Decides how many trunks an application should have."""

    def __init__(self, min_replicas: int, max_replicas: int, options: dict[str, Any], unit: str = TRUNK) -> None:
        """`options` are the fields of `TrunkScaleOptions`, as JSON has them; `unit`: what numbers set by hand name."""
        self._bounds, self._unit = (min_replicas, max_replicas), unit
        self._scaler = TrunkScaler(TrunkScaleOptions(**options))

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return (replicas, no state). Never raises: that would stop Serve's control loop."""

        def measure() -> TrunksState:
            least, most = within_serve(self._bounds, context)
            state = measured_trunks(context.raw_metrics or {}, context.target_num_replicas)
            return replace(state, min_replicas=least, max_replicas=most)

        def wanted() -> int | None:
            return set_by_hand(context.app_name or "", [self._unit]).get(self._unit)

        def decide() -> int:
            return self._scaler.replicas(context.current_time or 0.0, measure, wanted)

        return decided_or(context.target_num_replicas, decide), {}
