"""The expert calls of one layer between their sending and their gathering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from moe_ray.experts.client.call import Call
from moe_ray.model.moe import Gathered, Routed
from moe_ray.transport.base import Replies


class Gatherer(Protocol):
    """Who sent the calls: `ExpertDispatcher`."""

    def gather(self, flight: InFlightLayer) -> Gathered: ...
    def abandon(self, flight: InFlightLayer) -> None: ...


@dataclass(slots=True, eq=False)
class InFlightLayer:
    """`moe.PendingCalls`: the calls of one layer, from `ExpertDispatcher.submit` to `gather`."""

    dispatcher: Gatherer
    layer: int
    routed: Routed
    calls: list[Call]
    sent_at: float
    first: Replies | None = None
    """The replies of the calls that had a replica when the layer was submitted."""

    def gather(self) -> Gathered:
        """`ExpertDispatcher.gather`."""
        return self.dispatcher.gather(self)

    def abandon(self) -> None:
        """`ExpertDispatcher.abandon`."""
        self.dispatcher.abandon(self)
