"""What a gateway knows of a trunk by the messages of its stream."""

from __future__ import annotations

from dataclasses import dataclass

from moe_ray.core import TrunkInfo
from moe_ray.pb import moe_ray_pb2 as pb


@dataclass(frozen=True, slots=True)
class TrunkTold:
    """What one trunk last said of itself to this gateway; all zeros where it has said nothing yet."""

    info: TrunkInfo
    load: pb.TrunkLoad
    counters: pb.TrunkCounters

    @property
    def kv_use(self) -> float:
        """The share of its KV blocks that sequences hold."""
        return 1 - self.load.kv_blocks_free / self.load.kv_blocks_total if self.load.kv_blocks_total else 0.0
