"""The `trunk` section: the trunks, how they scale, and how gateways choose among them."""

from __future__ import annotations

from pydantic import Field

from moe_ray.config.actors import ReportsSection, ScaledOptions


class TrunkAutoscaleSection(ReportsSection):
    """When trunks come and go by themselves."""

    enabled: bool = False
    target_kv_use: float = Field(default=0.8, gt=0, le=1)
    """The share of its KV blocks that a trunk's sequences should hold at most."""
    target_waiting: float = Field(default=2.0, gt=0)
    """How many requests may wait per trunk, on average."""
    up_after_s: float = Field(default=5.0, ge=0)
    """How long more must be asked for before it is given."""
    down_after_s: float = Field(default=60.0, ge=0)
    """How long all must have fitted on fewer trunks before one goes."""


class TrunkSection(ScaledOptions):
    """The trunks, which share the experts, and how gateways choose among them."""

    autoscale: TrunkAutoscaleSection = TrunkAutoscaleSection()
    max_replicas_by_hand: int = Field(default=16, ge=1)
    """Most that `moe-ray scale trunk` may ask for."""
    affinity: bool = True
    """Gateways prefer the trunk that has computed the beginning of a prompt. false: they go by load alone."""
    drain_s: float = Field(default=20.0, ge=0)
    """How long a trunk that is told to go lets its requests end; those left go on, token for token, on another."""
