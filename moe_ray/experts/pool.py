"""Sends expert calls to replicas: least outstanding rows first, failed calls again elsewhere, never without an end."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch

from moe_ray.core import ExpertCall, ExpertReply
from moe_ray.errors import ExpertUnavailable, LinkBroken, LinkTimeout, TransportError
from moe_ray.experts.discovery import Directory, Replica
from moe_ray.transport.base import PendingReply

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
        self._options = options or PoolOptions()
        self.retries = 0
        """Calls that were sent again."""

    def missing(self) -> list[int]:
        """Experts that have no live replica for some layer, ascending."""
        return self._directory.missing()

    def replicas(self) -> list[Replica]:
        """The live replicas, by id."""
        found = {r.info.replica_id: r for group in self._directory.table.values() for r in group}
        return [found[replica_id] for replica_id in sorted(found)]

    def submit(self, calls: list[ExpertCall]) -> Scattered:
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
            self._settle(call, replica)
            self._lost(replica, error)
            return _InFlight(call, None, None)
        except BaseException:  # a call that no carrier could carry
            self._settle(call, replica)
            raise

    def wait(self, flight: _InFlight) -> torch.Tensor:
        """Return the rows of one call, sending it again as often as patience allows."""
        call, deadline = flight.call, time.monotonic() + self._options.deadline_s
        refused: dict[str, TransportError] = {}
        while True:
            version = self._directory.version
            if flight.pending is None or flight.replica is None:
                flight = self._send(call, refused)
            if flight.pending is None or flight.replica is None:
                if refused:
                    # Every replica that there is has answered with an error: waiting will not change that.
                    self._give_up(call, "; ".join(map(str, refused.values())))
                if not self._directory.wait_change(version, deadline - time.monotonic()):
                    self._give_up(call, f"no live replica within {self._options.deadline_s:g} s")
                continue
            replica = flight.replica
            try:
                reply = flight.pending.result(self._options.call_timeout_s)
            except (LinkBroken, LinkTimeout) as error:
                self._settle(call, replica)
                self._lost(replica, error)
            except TransportError as error:
                self._settle(call, replica)
                refused[replica.info.replica_id] = error
                logger.warning("expert replica %s failed a call: %s", replica.info.replica_id, error)
                if len(refused) >= self._options.max_attempts:
                    self._give_up(call, "; ".join(map(str, refused.values())))
            else:
                self._settle(call, replica, reply)
                return reply.rows
            if time.monotonic() >= deadline:
                self._give_up(call, f"no answer within {self._options.deadline_s:g} s")
            self.retries += 1
            flight = _InFlight(call, None, None)

    def drop(self, flight: _InFlight) -> None:
        """Stop counting a call as outstanding without waiting for its reply."""
        if flight.replica is not None:
            self._settle(flight.call, flight.replica)

    def _settle(self, call: ExpertCall, replica: Replica, reply: ExpertReply | None = None) -> None:
        replica.outstanding_rows -= call.rows.shape[0]
        if reply is not None:
            replica.load = reply.load

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
