"""The calls of one layer under way: waited for together, the late ones sent twice, the failed ones again."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol

import torch

from moe_ray.core import ReplicaLoad
from moe_ray.errors import ExpertUnavailable, LinkTimeout, TransportError
from moe_ray.model.moe import Routed
from moe_ray.transport.base import PendingReply, Replies

if TYPE_CHECKING:
    from moe_ray.experts.client.pool import ExpertPool, InFlight, Part

logger = logging.getLogger(__name__)

LOOK_S: Final = 0.5
"""How often it is looked whether the machine of a replica that does not answer is there at all."""
TURN_S: Final = 0.001
"""How long a late call and its second one are waited for in turns."""

Outcome = ReplicaLoad | TransportError | None
"""What became of a call; None: it is under way."""


class Sent(Protocol):
    """Calls as their carrier carries them."""

    def poll(self, timeout_s: float) -> list[Outcome]:
        """Wait for all of them, `timeout_s` at most. The carrier's errors are outcomes."""
        ...

    def forget(self, index: int | None = None) -> None:
        """Wait no more for one call, or for all."""
        ...

    def cancel(self, index: int) -> None:
        """Forget one call and let its replica skip it."""
        ...

    def place(self, index: int, rows: torch.Tensor) -> None:
        """Put rows where those of a call that failed, or was forgotten, would be."""
        ...

    def rows(self) -> torch.Tensor:
        """All rows, in the order of the calls."""
        ...


class SentAtOnce:
    """`Sent` by `base.Together`."""

    def __init__(self, replies: Replies, parts: list[Part]) -> None:
        self._replies, self._parts = replies, parts
        self.poll, self.forget, self.cancel = replies.wait, replies.forget, replies.cancel

    def place(self, index: int, rows: torch.Tensor) -> None:
        self._replies.rows[self._parts[index].rows] = rows

    def rows(self) -> torch.Tensor:
        return self._replies.rows


class SentOneByOne:
    """`Sent` by `Link.send`. A call that could not even be sent has None for its reply."""

    def __init__(self) -> None:
        self.pending: list[PendingReply | None] = []
        self._outcomes: list[Outcome] = []
        self._rows: list[torch.Tensor | None] = []

    def add(self, pending: PendingReply | None) -> None:
        """One more call."""
        self.pending.append(pending)
        self._outcomes.append(None)
        self._rows.append(None)

    def poll(self, timeout_s: float) -> list[Outcome]:
        deadline = time.monotonic() + timeout_s
        for index, pending in enumerate(self.pending):
            if self._outcomes[index] is not None or pending is None:
                continue
            try:
                reply = pending.result(max(0.0, deadline - time.monotonic()))
            except LinkTimeout:
                continue
            except TransportError as error:
                self._outcomes[index] = error
            else:
                self._outcomes[index], self._rows[index] = reply.load, reply.rows
        return list(self._outcomes)

    def forget(self, index: int | None = None) -> None:
        for i in range(len(self.pending)) if index is None else (index,):
            self.pending[i] = None

    def cancel(self, index: int) -> None:
        pending, self.pending[index] = self.pending[index], None
        if pending is not None:
            pending.cancel()

    def place(self, index: int, rows: torch.Tensor) -> None:
        self._rows[index] = rows

    def rows(self) -> torch.Tensor:
        rows = [rows for rows in self._rows if rows is not None]
        return rows[0] if len(rows) == 1 else torch.cat(rows)


def renormalise(rows: torch.Tensor, routed: Routed, lost: Sequence[Part]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale what the surviving experts gave to each token that lost one, so that their weights sum to 1 again.

    `rows` [T * K, D] with zeros where experts are `lost`. Returns the rows, and the tokens that lost an expert (bool
    [T]); one that lost all of them gets nothing from this layer but what it had.
    """
    gone = torch.zeros(rows.shape[0], dtype=torch.bool, device=rows.device)
    for part in lost:
        gone[part.rows] = True
    row_of = routed.row_of.long()
    weights, without = routed.weights[row_of], gone[row_of]  # [T, K] each
    left = (weights * ~without).sum(-1)  # [T]
    scale = torch.where(left > 0, weights.sum(-1) / left.clamp_min(1e-9), 1.0)
    of_row = torch.ones(rows.shape[0], device=rows.device)
    of_row[row_of.flatten()] = scale.repeat_interleave(row_of.shape[1])
    return (rows.float() * of_row[:, None]).to(rows.dtype), without.any(-1)


class CallsUnderWay:
    """`moe.PendingCalls` of an `ExpertPool`."""

    def __init__(self, pool: ExpertPool, layer: int, routed: Routed, parts: list[Part], sent: Sent) -> None:
        self._pool, self._layer, self._routed, self._parts, self._sent = pool, layer, routed, parts, sent
        self._at = time.monotonic()
        self._left = [index for index, part in enumerate(parts) if part.replica is not None]
        """Calls that are counted as outstanding."""
        self._again = [index for index, part in enumerate(parts) if part.replica is None]
        """Calls that have to be sent (again) by `ExpertPool.wait`."""
        self._failures: dict[int, TransportError] = {}
        self.degraded: torch.Tensor | None = None

    def gather(self) -> torch.Tensor:
        """Rows [T * K, D] in the order of the calls. Raises `ExpertUnavailable`."""
        pool, parts = self._pool, self._parts
        late_s = pool.late_after_s(self._layer, parts)
        if late_s is not None and late_s < pool.options.call_timeout_s:
            self._note(self._sent.poll(max(0.0, self._at + late_s - time.monotonic())))
            if self._left:
                self._hedge()
        self._wait_long()
        pool.came_home(parts, time.monotonic() - self._at)
        for index in list(self._left):
            part = parts[index]
            self._sent.forget(index)
            asked, limit = f"layer {self._layer} expert {part.expert}", pool.options.call_timeout_s
            who = part.replica.replica_id if part.replica else "?"
            self._failures[index] = LinkTimeout(f"expert replica {who} did not answer {asked} within {limit:g} s")
            self._left.remove(index)
            self._again.append(index)
        lost = []
        while self._again:
            index = self._again.pop()
            try:
                rows = pool.again(self._layer, self._routed, parts[index], self._failures.get(index))
            except ExpertUnavailable as error:
                if pool.options.on_loss != "renormalise":
                    raise
                logger.warning("going on without it: %s", error)
                rows = torch.zeros_like(self._routed.rows[parts[index].rows])
                lost.append(parts[index])
            self._sent.place(index, rows)
        if not lost:
            return self._sent.rows()
        out, self.degraded = renormalise(self._sent.rows(), self._routed, lost)
        return out

    def _wait_long(self) -> None:
        """Wait for what is left until the call timeout, or until its machine is seen to have fallen silent."""
        end = self._at + self._pool.options.call_timeout_s
        while self._left:
            left_s = end - time.monotonic()
            self._note(self._sent.poll(min(max(0.0, left_s), LOOK_S)))
            if left_s <= 0:
                return
            for index in self._left:
                if (replica := self._parts[index].replica) is not None:
                    self._pool.part_from_silent(replica)

    def abandon(self) -> None:
        """Forget the calls not gathered yet. Idempotent."""
        self._sent.forget()
        for index in (*self._left, *self._again):
            self._pool.drop(self._parts[index])
        self._left, self._again = [], []

    def _note(self, outcomes: list[Outcome]) -> None:
        for index in list(self._left):
            outcome, replica = outcomes[index], self._parts[index].replica
            if outcome is None or replica is None:
                continue
            self._left.remove(index)
            if isinstance(outcome, ReplicaLoad):
                self._pool.settle(replica, self._parts[index].count, outcome)
            else:
                self._failures[index] = outcome
                self._again.append(index)

    def _hedge(self) -> None:
        """Send what is late to other replicas too, and wait until of each pair one has answered."""
        pool = self._pool
        seconds: dict[int, InFlight] = {}
        for index in self._left:
            flight = pool.hedge(self._layer, self._routed, self._parts[index], time.monotonic() - self._at)
            if flight is not None:
                seconds[index] = flight
        deadline, look_at = self._at + pool.options.call_timeout_s, time.monotonic() + LOOK_S
        try:
            while seconds and (now := time.monotonic()) < deadline:
                self._note(self._sent.poll(TURN_S))
                if now >= look_at:
                    look_at = now + LOOK_S
                    for replica in {r for i, f in seconds.items() for r in (self._parts[i].replica, f.replica) if r}:
                        pool.part_from_silent(replica)
                for index, flight in list(seconds.items()):
                    if index not in self._left and index not in self._again:
                        pool.lost_race(seconds.pop(index))  # the first call was answered after all
                    elif (rows := pool.try_result(flight, TURN_S)) is not None:
                        del seconds[index]
                        self._won(index, rows)
                    elif flight.pending is None:
                        del seconds[index]  # it failed: the first call, or `again`, is what is left
        finally:
            for flight in seconds.values():
                pool.lost_race(flight)

    def _won(self, index: int, rows: torch.Tensor) -> None:
        if index in self._left:
            self._sent.cancel(index)
            self._left.remove(index)
            self._pool.drop(self._parts[index])
            self._pool.counters.cancelled += 1
        else:
            self._again.remove(index)
            self._pool.forgive(self._parts[index], self._failures.pop(index, None))
        self._sent.place(index, rows)
