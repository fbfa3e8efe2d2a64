"""Which adapters the experts' replicas hold: asks them to, waits until they do, notes what they have lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Protocol

from moe_ray.core import AdapterRef, ExpertKey
from moe_ray.errors import AdapterUnavailable
from moe_ray.experts.client.replica import Replica
from moe_ray.experts.client.replica_table import ReplicaTable


class AdapterAsker(Protocol):
    """Tells replicas which adapters are wanted, with the next look at them."""

    def want(self, wanted: Mapping[int, str]) -> None:
        """Have every replica hold these adapters (id → source), and forget those that were wanted before."""
        ...

    def lost(self, replica_id: str, adapters: Collection[int]) -> None:
        """Note that a replica no longer holds adapters: it is asked again."""
        ...


class AdapterTable:
    """`engine.adapter_shelf.AdapterHolder` over the replicas of a table. From any thread."""

    def __init__(self, table: ReplicaTable, asker: AdapterAsker | None, deadline_s: float) -> None:
        """`asker`: None where replicas hold no adapters. `deadline_s`: how long `hold` waits."""
        self._table, self._asker, self._deadline_s = table, asker, deadline_s
        self._lock = threading.Lock()
        self._wanted: dict[int, str] = {}
        table.awaits_more = lambda: any(self.lacking(adapter_id) for adapter_id in list(self._wanted))

    def lacking(self, adapter_id: int) -> list[ExpertKey]:
        """The (layer, expert) pairs without a replica that holds an adapter."""
        by_key = self._table.by_key
        return sorted(
            key for key in self._table.keys if not any(adapter_id in r.info.adapters for r in by_key.get(key, ()))
        )

    def hold(self, adapter: AdapterRef) -> None:
        """Return once every key has a replica that holds the adapter.

        Raises `AdapterUnavailable` when a replica cannot load it and no other has it, or after `deadline_s`.
        """
        if self._asker is None:
            raise AdapterUnavailable(f"adapter {adapter.source}: it changes experts, and these hold no adapters")
        adapter_id = adapter.adapter_id
        self._tell(adapter_id, adapter.source)
        deadline = time.monotonic() + self._deadline_s
        while lacking := self.lacking(adapter_id):
            version = self._table.version
            if not (lacking := self.lacking(adapter_id)):
                return
            if fault := self._fault(adapter_id, lacking[0]):
                self.drop(adapter_id)
                raise AdapterUnavailable(f"adapter {adapter.source}: {fault}")
            if not self._table.wait_change(version, deadline - time.monotonic()):
                layer, expert = lacking[0]
                self.drop(adapter_id)
                raise AdapterUnavailable(
                    f"adapter {adapter.source}: layer {layer} expert {expert} has no replica that holds it after "
                    f"{self._deadline_s:g} s"
                )

    def drop(self, adapter_id: int) -> None:
        """Have replicas forget an adapter."""
        self._tell(adapter_id, None)

    def lost(self, replica: Replica, adapters: Collection[int]) -> None:
        """Note that a replica has refused a call for want of adapters: it is asked to load them again."""
        replica.info = replace(replica.info, adapters=replica.info.adapters - set(adapters))
        if self._asker is not None:
            self._asker.lost(replica.replica_id, adapters)
        self._table.look_again()

    def _fault(self, adapter_id: int, key: ExpertKey) -> str | None:
        """Why all replicas of a key lack an adapter; None while one of them may yet load it."""
        faults = [replica.info.adapter_faults.get(adapter_id) for replica in self._table.replicas_of(*key)]
        return faults[0] if faults and all(faults) else None

    def _tell(self, adapter_id: int, source: str | None) -> None:
        with self._lock:
            if source is None:
                self._wanted.pop(adapter_id, None)
            else:
                self._wanted[adapter_id] = source
            if self._asker is not None:
                self._asker.want(dict(self._wanted))
        self._table.look_again()
