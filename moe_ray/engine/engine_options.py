"""What an engine is told at construction."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe_ray.engine.scheduler import SchedulerLimits


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Everything an engine is told at construction."""

    num_blocks: int
    block_size: int = 16
    limits: SchedulerLimits = field(default_factory=SchedulerLimits)
    max_model_len: int = 4096
    micro_batches: int | None = 1
    """None: as many as turn out to be fastest."""
    eos_token_ids: frozenset[int] = frozenset()
    kv_cache_dtype: str = "auto"
    """"auto": as the trunk's rows; or "int8"."""
