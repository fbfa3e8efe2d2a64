"""Cuts the routed rows of a layer into calls, and selects a replica for each."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

from moe_ray.core import AdapterRows
from moe_ray.experts.client.accounting import Accounting
from moe_ray.experts.client.call import Call, ids_of
from moe_ray.experts.client.replica import Replica
from moe_ray.experts.client.replica_table import ReplicaTable
from moe_ray.experts.client.selection import select_replica, split_rows
from moe_ray.model.moe import cut_runs


class Assigner:
    """Assigns calls to replicas of a table. One thread."""

    def __init__(self, table: ReplicaTable, accounting: Accounting, node_id: str | None, split: bool) -> None:
        """`node_id`: of the trunk. `split`: whether several replicas may share a large batch."""
        self._table = table
        self._accounting = accounting
        self._node_id = node_id
        self._split = split
        self._draw = random.Random(0)

    def assign(
        self, layer: int, counts: Sequence[int], adapters: Sequence[tuple[AdapterRows, ...]] = ()
    ) -> list[tuple[Call, Replica | None]]:
        """Calls for `counts[e]` rows of each expert e, in row order, and the replica of each; None: none is usable.

        `adapters[e]`: the runs of expert e's rows; (): no row of the layer has an adapter.
        """
        assigned: list[tuple[Call, Replica | None]] = []
        start = 0
        now = time.monotonic()
        for expert, count in enumerate(counts):
            if not count:
                continue
            runs = adapters[expert] if adapters else ()
            replicas = self._replicas_of(layer, expert, ids_of(runs))
            if len(replicas) == 1 and not replicas[0].link.broken:
                assigned.append((Call(layer, expert, start, count, runs), replicas[0]))
            else:
                for replica, first, rows in self._shares(replicas, start, count, now):
                    cut = cut_runs(runs, first - start, rows)
                    assigned.append((Call(layer, expert, first, rows, cut), replica))
            start += count
        return assigned

    def select(self, call: Call, avoid: Sequence[str] = ()) -> Replica | None:
        """The replica to send `call` to now; None if none is usable but those that refused it or are in `avoid`."""
        replicas = self._replicas_of(call.layer, call.expert, ids_of(call.adapters))
        return self._select(replicas, call.count, time.monotonic(), [*call.refusals, *avoid])

    def select_second(self, call: Call, late: Replica) -> Replica | None:
        """The replica to hedge a late call with: on another node than `late`, where there is one."""
        replicas = self._replicas_of(call.layer, call.expert, ids_of(call.adapters))
        others = [replica for replica in replicas if replica is not late and replica.usable]
        elsewhere = [other for other in others if other.node_id != late.node_id]
        return self._select(elsewhere or others, call.count, time.monotonic(), list(call.refusals))

    def _replicas_of(self, layer: int, expert: int, adapters: frozenset[int]) -> Sequence[Replica]:
        """The replicas that can be called for a key and hold all of `adapters`."""
        replicas = self._table.replicas_of(layer, expert)
        return [replica for replica in replicas if adapters <= replica.info.adapters] if adapters else replicas

    def _select(self, replicas: Sequence[Replica], rows: int, now: float, avoid: Sequence[str] = ()) -> Replica | None:
        return select_replica(replicas, rows, now, avoid, self._node_id, self._draw)

    def _shares(
        self, replicas: Sequence[Replica], start: int, count: int, now: float
    ) -> list[tuple[Replica | None, int, int]]:
        """(replica, first row, rows) for each replica that gets some of an expert's rows."""
        preferred = self._select(replicas, count, now)
        if preferred is None or not self._split:
            return [(preferred, start, count)]
        idle = [r for r in replicas if r is not preferred and r.usable and r.trusted(now) and not r.outstanding_rows]
        if not idle:
            return [(preferred, start, count)]
        group = [preferred, *sorted(idle, key=lambda replica: replica.slowdown_at(now))]
        shares = split_rows(count, [replica.slowdown_at(now) for replica in group], self._accounting.costs)
        made: list[tuple[Replica | None, int, int]] = []
        for replica, rows in zip(group, shares, strict=True):
            if rows:
                made.append((replica, start, rows))
                start += rows
        self._accounting.counters.splits += len(made) > 1
        return made
