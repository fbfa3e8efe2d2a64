"""Sends expert calls to replicas: to whoever is done first, late ones twice, failed ones again elsewhere."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

import torch

from moe_ray.core import ExpertCall, ExpertReply, ReplicaLoad
from moe_ray.errors import ExpertUnavailable, LinkBroken, LinkTimeout, ProtocolError, TransportError
from moe_ray.experts.client.replica_table import Directory, Replica
from moe_ray.experts.client.selection import Costs, Lateness, choose, split
from moe_ray.experts.client.under_way import LOOK_S, CallsUnderWay, Sent, SentAtOnce, SentOneByOne
from moe_ray.model.moe import PendingCalls, Routed
from moe_ray.transport.base import PendingReply

logger = logging.getLogger(__name__)

SUSPECT_S = 5.0
"""How long the other replicas of a machine that fell silent are called only where there is nobody else."""
LATE_PACE = 10.0
"""How many times slower than usual a replica is taken to have been when a call to it was late, at least."""


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """How long the pool is patient, and what it does before it no longer is."""

    deadline_s: float = 60.0
    """A call without a live replica waits this long for one, then ends in `ExpertUnavailable`."""
    call_timeout_s: float = 30.0
    """A replica that does not answer within this is taken for lost."""
    max_attempts: int = 3
    """Tries of one call that replicas answered with an error, before it ends in `ExpertUnavailable`."""
    on_loss: Literal["wait", "fail", "renormalise"] = "wait"
    """What a call without a live replica does: wait for one, fail at once, or leave its expert out.

    renormalise: the token goes on with the weight of its other experts scaled to make up for it; `degraded` says which
    tokens did. A call that ends in an error is left out in the same way.
    """
    hedge: bool = True
    """Send a late call to a second replica too, where there is one, and take the first answer."""
    hedge_budget: float = 0.02
    """Second calls per call, at most, in the long run."""
    split: bool = True
    """Share large batches among an expert's replicas, where that pays."""
    node_id: str | None = None
    """Where the trunk is: of replicas as good as each other, those on its node are preferred."""


@dataclass(slots=True, eq=False)
class Part:
    """Rows of one expert in one layer that go to one replica: rows [start, start + count) of `Routed`."""

    expert: int
    start: int
    count: int
    replica: Replica | None

    @property
    def rows(self) -> slice:
        """Where they are in `Routed.rows`."""
        return slice(self.start, self.start + self.count)


@dataclass(slots=True, eq=False)
class InFlight:
    call: ExpertCall
    replica: Replica | None
    pending: PendingReply | None
    """None when sending failed: `wait` sends again."""


@dataclass(slots=True)
class Counters:
    """What the pool has done since it was made."""

    calls: int = 0
    splits: int = 0
    """Batches of one expert that were shared among replicas."""
    retries: int = 0
    """Calls that were sent again after they had failed."""
    hedges: int = 0
    """Calls that were sent a second time because they were late."""
    hedge_wins: int = 0
    """Second calls that were answered first."""
    cancelled: int = 0
    """Calls that were taken back because the other of two was answered first."""
    quarantines: int = 0


@dataclass(slots=True, eq=False)
class ExpertPool:
    """All experts of one model, wherever they live. `submit` and `gather` belong to one thread."""

    directory: Directory
    options: PoolOptions = field(default_factory=PoolOptions)
    counters: Counters = field(default_factory=Counters)
    _costs: Costs = field(default_factory=Costs)
    _lateness: Lateness = field(default_factory=Lateness)
    _draw: random.Random = field(default_factory=lambda: random.Random(0))

    def __post_init__(self) -> None:
        self._lateness.budget = self.options.hedge_budget

    def missing(self) -> list[int]:
        """Experts that have no live replica for some layer, ascending."""
        return self.directory.missing()

    def wait_complete(self, timeout_s: float) -> list[int]:
        """Wait until every layer of every expert has a live replica; after `timeout_s`, return whose have none."""
        deadline = time.monotonic() + timeout_s
        while True:
            version, missing = self.directory.version, self.missing()
            if not missing or not self.directory.wait_change(version, deadline - time.monotonic()):
                return self.missing()

    def replicas(self) -> list[Replica]:
        """The live replicas, by id."""
        found = {r.replica_id: r for group in self.directory.table.values() for r in group}
        return [found[replica_id] for replica_id in sorted(found)]

    def submit(self, layer: int, routed: Routed) -> PendingCalls:
        """Put the rows of one layer on their way, without waiting; large batches to several replicas of an expert."""
        parts = self._parts(layer, routed.counts)
        return CallsUnderWay(self, layer, routed, parts, self._together(layer, routed, parts))

    def close(self) -> None:
        """Close every link."""
        self.directory.close()

    def _parts(self, layer: int, counts: list[int]) -> list[Part]:
        table, parts, start, now = self.directory.table, list[Part](), 0, time.monotonic()
        for expert, count in enumerate(counts):
            if not count:
                continue
            replicas = table.get((layer, expert), ())
            if len(replicas) == 1 and not replicas[0].link.broken:
                parts.append(Part(expert, start, count, replicas[0]))
            else:
                parts += self._shared(replicas, expert, start, count, now)
            start += count
        return parts

    def _shared(self, replicas: tuple[Replica, ...], expert: int, start: int, count: int, now: float) -> list[Part]:
        first = self._choose(replicas, count, now)
        if first is None or not self.options.split:
            return [Part(expert, start, count, first)]
        others = [r for r in replicas if r is not first and r.usable and r.trusted(now) and not r.outstanding_rows]
        others.sort(key=lambda r: r.pace(now))
        shares = split(count, [r.pace(now) for r in (first, *others)], self._costs) if others else [count]
        parts = []
        for replica, share in zip((first, *others), shares, strict=False):
            if share:
                parts.append(Part(expert, start, share, replica))
                start += share
        self.counters.splits += len(parts) > 1
        return parts

    def _choose(
        self, replicas: tuple[Replica, ...], rows: int, now: float, avoid: Collection[str] = ()
    ) -> Replica | None:
        return choose(replicas, rows, now, avoid, self.options.node_id, self._draw)

    def _together(self, layer: int, routed: Routed, parts: list[Part]) -> Sent:
        """Send the calls of a layer at once, if the carrier of all the chosen replicas can do that."""
        replicas = [part.replica for part in parts if part.replica is not None]
        links = [replica.link for replica in replicas]
        how = links[0].together if links else None
        if how is None or len(replicas) < len(parts) or any(link.together != how for link in links):
            return self._one_by_one(layer, routed, parts)
        experts, counts = [part.expert for part in parts], [part.count for part in parts]
        replies = how.scatter(links, layer, experts, counts, routed.rows, routed.weights)
        for replica, count in zip(replicas, counts, strict=True):
            self._sent(replica, count)
        return SentAtOnce(replies, parts)

    def _one_by_one(self, layer: int, routed: Routed, parts: list[Part]) -> Sent:
        sent = SentOneByOne()
        try:
            for part in parts:
                flight = self._send(part_call(layer, routed, part), (), part.replica)
                part.replica = flight.replica
                sent.add(flight.pending)
        except BaseException:
            for part in parts[: len(sent.pending)]:
                self.drop(part)
            raise
        return sent

    def _send(self, call: ExpertCall, avoid: Collection[str], replica: Replica | None = None) -> InFlight:
        if replica is None:
            group = self.directory.table.get((call.layer, call.expert), ())
            replica = self._choose(group, call.rows.shape[0], time.monotonic(), avoid)
        if replica is None:
            return InFlight(call, None, None)
        self._sent(replica, call.rows.shape[0])
        try:
            return InFlight(call, replica, replica.link.send(call))
        except LinkBroken as error:
            self.settle(replica, call.rows.shape[0])
            self._lost(replica, error)
            return InFlight(call, None, None)
        except BaseException:  # a call that no carrier could carry
            self.settle(replica, call.rows.shape[0])
            raise

    def _sent(self, replica: Replica, rows: int) -> None:
        replica.outstanding_rows += rows
        replica.calls += 1
        self.counters.calls += 1

    def wait(self, flight: InFlight, failure: TransportError | None = None) -> torch.Tensor:
        """Return the rows of one call, sending it again as often as patience allows.

        `failure`: how its first try has ended already.
        """
        call, deadline = flight.call, time.monotonic() + self.options.deadline_s
        refused: dict[str, TransportError] = {}
        while True:
            version = self.directory.version
            if flight.replica is None or (flight.pending is None and failure is None):
                flight = self._send(call, refused)
            replica, pending = flight.replica, flight.pending
            if replica is None or (pending is None and failure is None):
                if refused:
                    # Every replica that there is has answered with an error: waiting will not change that.
                    self._give_up(call, "; ".join(map(str, refused.values())))
                if self.options.on_loss != "wait":
                    self._give_up(call, "no live replica")
                if not self.directory.wait_change(version, deadline - time.monotonic()):
                    self._give_up(call, f"no live replica within {self.options.deadline_s:g} s")
                continue
            if failure is None and pending is not None:
                try:
                    reply = self._result(replica, pending)
                except TransportError as error:
                    failure = error
                else:
                    self.settle(replica, call.rows.shape[0], reply.load)
                    return reply.rows
            self.settle(replica, call.rows.shape[0])
            if failure is not None:
                self._note_failure(replica, failure)
            if failure is not None and not isinstance(failure, LinkBroken | LinkTimeout):
                refused[replica.replica_id] = failure
                if len(refused) >= self.options.max_attempts:
                    self._give_up(call, "; ".join(map(str, refused.values())))
            if time.monotonic() >= deadline:
                self._give_up(call, f"no answer within {self.options.deadline_s:g} s")
            self.counters.retries += 1
            flight, failure = InFlight(call, None, None), None

    def _result(self, replica: Replica, pending: PendingReply) -> ExpertReply:
        """The reply, if it comes within the call timeout and the replica's machine does not fall silent meanwhile."""
        end = time.monotonic() + self.options.call_timeout_s
        while True:
            try:
                return pending.result(min(LOOK_S, max(0.0, end - time.monotonic())))
            except LinkTimeout:
                if time.monotonic() >= end:
                    raise
                self.part_from_silent(replica)

    def drop(self, part: Part) -> None:
        """Stop counting a call as outstanding without waiting for its reply."""
        if part.replica is not None:
            self.settle(part.replica, part.count)

    def settle(self, replica: Replica, rows: int, load: ReplicaLoad | None = None) -> None:
        """Stop counting `rows` as outstanding at `replica`; `load`: what it said when it answered."""
        replica.outstanding_rows -= rows
        if load is not None:
            now = time.monotonic()
            replica.answered(load, now)
            replica.slowness.observe(self._costs.observe(rows, load.compute_us), now)

    def late_after_s(self, layer: int, parts: list[Part]) -> float | None:
        """Seconds after which the calls of a layer are late; None: no second call could be made."""
        if not self.options.hedge:
            return None
        table = self.directory.table
        if all(len(table.get((layer, part.expert), ())) < 2 for part in parts):
            return None
        return self._lateness.limit_s(max(part.count for part in parts))

    def came_home(self, parts: list[Part], took_s: float) -> None:
        """Learn how long the calls of one layer took."""
        self._lateness.observe(max(part.count for part in parts), took_s, len(parts))

    def hedge(self, layer: int, routed: Routed, part: Part, took_s: float) -> InFlight | None:
        """Send a late call to another replica too, on another node if any; None: no other, or no budget left."""
        late = part.replica
        if late is not None:
            usual_us = self._costs.expect(part.count)
            times = max(LATE_PACE, 1e6 * took_s / usual_us) if usual_us else LATE_PACE
            late.slowness.observe(times, time.monotonic())
        others = [r for r in self.directory.table.get((layer, part.expert), ()) if r is not late and r.usable]
        if late is None or not others or not self._lateness.spend():
            return None
        elsewhere = any(other.node_id != late.node_id for other in others)
        avoid = {other.replica_id for other in others if elsewhere and other.node_id == late.node_id}
        flight = self._send(part_call(layer, routed, part), {late.replica_id, *avoid})
        self.part_from_silent(late)  # which may owe an answer since an earlier call
        if flight.pending is None:
            return None
        self.counters.hedges += 1
        return flight

    def try_result(self, flight: InFlight, timeout_s: float) -> torch.Tensor | None:
        """The rows of a second call, if they come within `timeout_s`; its `pending` is None once it has failed."""
        replica, pending, rows = flight.replica, flight.pending, flight.call.rows.shape[0]
        if replica is None or pending is None:
            return None
        try:
            reply = pending.result(timeout_s)
        except LinkTimeout:
            return None
        except TransportError as error:
            flight.pending = None
            self.settle(replica, rows)
            self._note_failure(replica, error)
            return None
        self.settle(replica, rows, reply.load)
        self.counters.hedge_wins += 1
        return reply.rows

    def lost_race(self, flight: InFlight) -> None:
        """Take a second call back: the first was answered."""
        if flight.replica is not None and flight.pending is not None:
            flight.pending.cancel()
            self.counters.cancelled += 1
            self.settle(flight.replica, flight.call.rows.shape[0])

    def forgive(self, part: Part, failure: TransportError | None) -> None:
        """Settle a first call that failed while its second one was under way, which was answered."""
        if part.replica is not None and failure is not None:
            self.settle(part.replica, part.count)
            self._note_failure(part.replica, failure)

    def again(self, layer: int, routed: Routed, part: Part, failure: TransportError | None) -> torch.Tensor:
        """The rows of a call that has failed, or could not be sent; errors as of `wait`."""
        return self.wait(InFlight(part_call(layer, routed, part), part.replica, None), failure)

    def _note_failure(self, replica: Replica, failure: TransportError) -> None:
        if isinstance(failure, LinkBroken | LinkTimeout):
            self._lost(replica, failure)
        else:
            self._refused(replica, failure)

    def _refused(self, replica: Replica, failure: TransportError) -> None:
        logger.warning("expert replica %s failed a call: %s", replica.replica_id, failure)
        if isinstance(failure, ProtocolError):
            seconds = replica.misbehaved(time.monotonic())
            self.counters.quarantines += 1
            logger.warning("expert replica %s is quarantined for %g s", replica.replica_id, seconds)

    def part_from_silent(self, replica: Replica) -> None:
        """End the link to a replica whose machine no longer acknowledges anything: its calls fail and go elsewhere."""
        if not replica.link.silent:
            replica.link.probe()  # the next look will tell
            return
        logger.warning("expert replica %s: its machine has fallen silent", replica.replica_id)
        replica.link.close()
        for other in self.replicas():
            if other.node_id == replica.node_id != self.options.node_id:
                other.quarantined_until = max(other.quarantined_until, time.monotonic() + SUSPECT_S)

    def _lost(self, replica: Replica, error: Exception) -> None:
        logger.warning("lost expert replica %s: %s", replica.replica_id, error)
        self.directory.report_broken(replica)

    def _give_up(self, call: ExpertCall, why: str) -> None:
        raise ExpertUnavailable(f"expert {call.expert} (layer {call.layer}) is unavailable: {why}")


def part_call(layer: int, routed: Routed, part: Part) -> ExpertCall:
    """The call that carries `part`."""
    return ExpertCall(layer, part.expert, routed.rows[part.rows], routed.weights[part.rows])
