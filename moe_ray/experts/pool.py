"""Sends expert calls to replicas: least outstanding rows first, failed calls again elsewhere, never without an end."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch

from moe_ray.core import ExpertCall, ReplicaLoad
from moe_ray.errors import ExpertUnavailable, LinkBroken, LinkTimeout, TransportError
from moe_ray.experts.discovery import Directory, Replica
from moe_ray.model.moe import PendingCalls, Routed, calls_of
from moe_ray.transport.base import PendingReply, Replies

logger = logging.getLogger(__name__)


def choose(replicas: Iterable[Replica], avoid: Collection[str] = ()) -> Replica | None:
    """Return the live replica with the fewest outstanding rows (then the fewest calls so far) outside `avoid`."""
    usable = [r for r in replicas if not r.link.broken and r.info.replica_id not in avoid]
    return min(usable, key=lambda r: (r.outstanding_rows, r.calls), default=None)


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """How long the pool is patient."""

    deadline_s: float = 60.0
    """A call without a live replica waits this long for one, then ends in `ExpertUnavailable`."""
    call_timeout_s: float = 30.0
    """A replica that does not answer within this is taken for lost."""
    max_attempts: int = 3
    """Tries of one call that replicas answered with an error, before it ends in `ExpertUnavailable`."""


@dataclass(slots=True, eq=False)
class _InFlight:
    call: ExpertCall
    replica: Replica | None
    pending: PendingReply | None
    """None when sending failed: `gather` sends again."""


class ExpertPool:
    """All experts of one model, wherever they live. `submit` and `gather` belong to one thread."""

    def __init__(self, directory: Directory, options: PoolOptions | None = None) -> None:
        self._directory = directory
        self.options = options or PoolOptions()
        self.retries = 0
        """Calls that were sent again."""

    def missing(self) -> list[int]:
        """Experts that have no live replica for some layer, ascending."""
        return self._directory.missing()

    def replicas(self) -> list[Replica]:
        """The live replicas, by id."""
        found = {r.info.replica_id: r for group in self._directory.table.values() for r in group}
        return [found[replica_id] for replica_id in sorted(found)]

    def submit(self, layer: int, routed: Routed) -> PendingCalls:
        """Put the rows of one layer on their way, each expert's to one replica, without waiting."""
        return self._together(layer, routed) or _OneByOne(self.send(calls_of(layer, routed)))

    def send(self, calls: list[ExpertCall]) -> Scattered:
        """Put the calls on their way, each to one replica, without waiting."""
        scattered = Scattered(self, [])
        try:
            for call in calls:
                scattered.flights.append(self._send(call, ()))
        except BaseException:
            scattered.abandon()
            raise
        return scattered

    def close(self) -> None:
        """Close every link."""
        self._directory.close()

    def _send(self, call: ExpertCall, avoid: Collection[str]) -> _InFlight:
        replica = choose(self._directory.table.get((call.layer, call.expert), ()), avoid)
        if replica is None:
            return _InFlight(call, None, None)
        replica.outstanding_rows += call.rows.shape[0]
        replica.calls += 1
        try:
            return _InFlight(call, replica, replica.link.send(call))
        except LinkBroken as error:
            self.settle(replica, call.rows.shape[0])
            self._lost(replica, error)
            return _InFlight(call, None, None)
        except BaseException:  # a call that no carrier could carry
            self.settle(replica, call.rows.shape[0])
            raise

    def _together(self, layer: int, routed: Routed) -> _Together | None:
        """The calls of a layer sent at once, if the carrier of all the chosen replicas can do that."""
        replicas, experts, counts = [], [], []
        table = self._directory.table
        for expert, count in enumerate(routed.counts):
            if count:
                replica = choose(table.get((layer, expert), ()))
                if replica is None or replica.link.together is None:
                    return None
                replicas.append(replica)
                experts.append(expert)
                counts.append(count)
        how = replicas[0].link.together
        if how is None or any(replica.link.together != how for replica in replicas):
            return None
        for replica, count in zip(replicas, counts, strict=True):
            replica.outstanding_rows += count
            replica.calls += 1
        links = [replica.link for replica in replicas]
        replies = how.scatter(links, layer, experts, counts, routed.rows, routed.weights)
        return _Together(self, layer, routed, replicas, replies)

    def wait(self, flight: _InFlight, failure: TransportError | None = None) -> torch.Tensor:
        """Return the rows of one call, sending it again as often as patience allows.

        `failure`: how its first try has ended already.
        """
        call, deadline = flight.call, time.monotonic() + self.options.deadline_s
        refused: dict[str, TransportError] = {}
        while True:
            version = self._directory.version
            if flight.replica is None or (flight.pending is None and failure is None):
                flight = self._send(call, refused)
            replica, pending = flight.replica, flight.pending
            if replica is None or (pending is None and failure is None):
                if refused:
                    # Every replica that there is has answered with an error: waiting will not change that.
                    self._give_up(call, "; ".join(map(str, refused.values())))
                if not self._directory.wait_change(version, deadline - time.monotonic()):
                    self._give_up(call, f"no live replica within {self.options.deadline_s:g} s")
                continue
            if failure is None and pending is not None:
                try:
                    reply = pending.result(self.options.call_timeout_s)
                except TransportError as error:
                    failure = error
                else:
                    self.settle(replica, call.rows.shape[0], reply.load)
                    return reply.rows
            self.settle(replica, call.rows.shape[0])
            if isinstance(failure, LinkBroken | LinkTimeout):
                self._lost(replica, failure)
            elif failure is not None:
                refused[replica.info.replica_id] = failure
                logger.warning("expert replica %s failed a call: %s", replica.info.replica_id, failure)
                if len(refused) >= self.options.max_attempts:
                    self._give_up(call, "; ".join(map(str, refused.values())))
            if time.monotonic() >= deadline:
                self._give_up(call, f"no answer within {self.options.deadline_s:g} s")
            self.retries += 1
            flight, failure = _InFlight(call, None, None), None

    def drop(self, flight: _InFlight) -> None:
        """Stop counting a call as outstanding without waiting for its reply."""
        if flight.replica is not None:
            self.settle(flight.replica, flight.call.rows.shape[0])

    def settle(self, replica: Replica, rows: int, load: ReplicaLoad | None = None) -> None:
        """Stop counting `rows` as outstanding at `replica`."""
        replica.outstanding_rows -= rows
        if load is not None:
            replica.load = load

    def _lost(self, replica: Replica, error: Exception) -> None:
        logger.warning("lost expert replica %s: %s", replica.info.replica_id, error)
        self._directory.report_broken(replica)

    def _give_up(self, call: ExpertCall, why: str) -> None:
        raise ExpertUnavailable(f"expert {call.expert} (layer {call.layer}) is unavailable: {why}")


class Scattered:
    """The calls of one layer under way; `gather` brings their rows home, once."""

    def __init__(self, pool: ExpertPool, flights: list[_InFlight]) -> None:
        self._pool, self.flights = pool, flights

    def gather(self) -> list[torch.Tensor]:
        """Wait for every reply; rows [T_e, D] in the order of the calls. Raises `ExpertUnavailable`."""
        rows = []
        while self.flights:
            rows.append(self._pool.wait(self.flights.pop(0)))
        return rows

    def abandon(self) -> None:
        """Forget the calls not gathered yet; their replies are dropped when they come. Idempotent."""
        while self.flights:
            self._pool.drop(self.flights.pop())


class _OneByOne:
    """`moe.PendingCalls` over calls that travel one by one."""

    def __init__(self, scattered: Scattered) -> None:
        self._scattered = scattered
        self.abandon = scattered.abandon

    def gather(self) -> torch.Tensor:
        """Rows [T * K, D] in the order of the calls. Raises `ExpertUnavailable`."""
        rows = self._scattered.gather()
        return rows[0] if len(rows) == 1 else torch.cat(rows)


class _Together:
    """`moe.PendingCalls` over calls that were sent at once."""

    def __init__(self, pool: ExpertPool, layer: int, routed: Routed, replicas: list[Replica], replies: Replies) -> None:
        self._pool, self._layer, self._routed = pool, layer, routed
        self._replicas, self._replies, self._counts = replicas, replies, [count for count in routed.counts if count]
        self._left = list(range(len(replicas)))  # calls still counted as outstanding

    def gather(self) -> torch.Tensor:
        """Rows [T * K, D] in the order of the calls. Raises `ExpertUnavailable`."""
        rows, calls = self._replies.rows, None
        for index, outcome in enumerate(self._replies.wait(self._pool.options.call_timeout_s)):
            self._left.remove(index)
            if isinstance(outcome, ReplicaLoad):
                self._pool.settle(self._replicas[index], self._counts[index], outcome)
                continue
            calls = calls or calls_of(self._layer, self._routed)
            start = sum(self._counts[:index])
            flight = _InFlight(calls[index], self._replicas[index], None)
            rows[start : start + self._counts[index]] = self._pool.wait(flight, outcome)
        return rows

    def abandon(self) -> None:
        """Forget the calls not gathered yet. Idempotent."""
        self._replies.forget()
        while self._left:
            index = self._left.pop()
            self._pool.settle(self._replicas[index], self._counts[index])
