"""What a dispatcher is told: how long it waits for replicas, and what it does with late and lost calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_ray.experts.sharing import ExpertNumbers


@dataclass(frozen=True, slots=True)
class DispatchOptions:
    """How long the dispatcher waits for replicas, and what it does when it has waited long enough."""

    deadline_s: float = 60.0
    """A call without a live replica waits this long for one, then ends in `ExpertUnavailable`."""
    call_timeout_s: float = 30.0
    """A replica that does not answer within this is taken for lost."""
    max_attempts: int = 3
    """Replicas that may answer one call with an error before it ends in `ExpertUnavailable`."""
    on_loss: Literal["wait", "fail", "renormalise"] = "wait"
    """What a call without a live replica does: wait for one, fail at once, or leave its expert out.

    renormalise: the weights of the token's other experts are scaled to make up for it; `Gathered.degraded` says for
    which tokens. A call that ends in an error is left out in the same way.
    """
    hedge: bool = True
    """Send a late call to a second replica too, where there is one, and take the first answer."""
    hedge_budget: float = 0.02
    """Second calls per call, at most, in the long run."""
    split: bool = True
    """Share large batches among an expert's replicas, where that pays."""
    in_process: bool = False
    """All experts are in this process: rows are handed over on the device where they are."""
    card_rows: bool = False
    """Links may take rows from this process's card (`Link.on_card`): they go through the host's memory where they must,
    not in any case."""
    numbers: ExpertNumbers | None = None
    """By which replicas know the model's experts; None: by its own."""
    node_id: str | None = None
    """Where the trunk is: of equally good replicas, those on its node are preferred."""
