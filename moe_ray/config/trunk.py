"""The `trunk` section: the trunks, how they scale, and how gateways choose among them."""

from __future__ import annotations

from pydantic import Field

from moe_ray.config.actors import ReportsSection, ScaledOptions


class TrunkAutoscaleSection(ReportsSection):
    """When trunks come and go by themselves."""

    enabled: bool = False
    """Change the number of trunks by queue and KV cache."""
    target_kv_use: float = Field(default=0.8, gt=0, le=1)
    """Share of its KV blocks that a trunk's sequences should hold at most."""
    target_waiting: float = Field(default=2.0, gt=0)
    """Most requests that may wait per trunk, on average."""
    up_after_s: float = Field(default=5.0, ge=0)
    """Seconds for which more trunks must be wanted before one is started."""
    down_after_s: float = Field(default=60.0, ge=0)
    """Seconds for which fewer trunks must be enough before one is stopped."""


class TrunkSection(ScaledOptions):
    """The trunks, which share the experts, and how gateways choose among them."""

    autoscale: TrunkAutoscaleSection = TrunkAutoscaleSection()
    """When trunks are started and stopped by load."""
    max_replicas_by_hand: int = Field(default=16, ge=1)
    """Most trunks that `moe-ray scale trunk` may ask for."""
    affinity: bool = True
    """Prefer the trunk whose prefix cache holds most of a prompt. false: choose by load alone."""
    drain_s: float = Field(default=20.0, ge=0)
    """Seconds that a trunk which is being stopped has to finish its requests; the rest continue on another trunk, with
    the same tokens."""
