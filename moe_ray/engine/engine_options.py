"""What an engine is told at construction."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from moe_ray.engine.scheduler import SchedulerLimits


@dataclass(frozen=True, slots=True)
class TierOptions:
    """What is below the KV cache."""

    swap_bytes: int = 0
    """Of host memory."""
    disk: Path | None = None
    """A directory; None: no disk."""
    disk_bytes: int = 0
    """The most that all files in it take."""
    identity: bytes = bytes(16)
    """Of everything that determines the bits of a block: see `tiers/cache_identity.py`."""


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
    """"auto": as the trunk's rows; or "int8", or "fp8"."""
    tiers: TierOptions | None = None
    """None: nothing is below the KV cache."""
