"""The autoscaling policy of an expert's deployment. Serve runs it in its controller, some times a second.

Serve ships this file by value and everything that it imports by name: so it holds the class alone, and what the experts
of an application share is in `scaling`. (A policy for a whole application would fit better, but Serve takes one from
config files only, not from `serve.run`.)
"""

from __future__ import annotations

from typing import Any

from ray.serve.config import AutoscalingContext

from moe_ray.experts.autoscale import ExpertState, ScaleOptions
from moe_ray.serve.scaling import measured, scaler_of


class ExpertPolicy:
    """Asks the application's scaler how many replicas one expert should have."""

    def __init__(self, expert: int, min_replicas: int, max_replicas: int, options: dict[str, Any]) -> None:
        """`options` are the fields of `ScaleOptions`, as JSON has them."""
        self._expert, self._bounds = expert, (min_replicas, max_replicas)
        self._options = ScaleOptions(**options)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return (replicas, no state). Never raises: that would stop Serve's control loop."""

        def measure() -> ExpertState:
            busy, queued = measured(context.raw_metrics or {})
            least, most = self._bounds
            return ExpertState(context.target_num_replicas, busy, queued, least, most)

        scaler = scaler_of(context.app_name or "")
        return scaler.replicas(self._expert, context.current_time or 0.0, measure, self._options), {}
