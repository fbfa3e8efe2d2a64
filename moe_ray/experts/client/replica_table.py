"""The replica table: (layer, expert) → linked replicas, kept up to date by a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for

from moe_ray.core import ExpertKey, ReplicaInfo
from moe_ray.errors import MoeRayError
from moe_ray.experts.client.replica import Replica
from moe_ray.transport.base import Link

logger = logging.getLogger(__name__)

Discover = Callable[[], Sequence[ReplicaInfo]]
"""Returns the replicas that exist. Raises `NotReady` while that is not known: then the table keeps what it has."""
Connect = Callable[[ReplicaInfo], Link]
"""Opens a link. Raises `LinkBroken`, or `ConfigError` when the replica offers no allowed carrier."""
Members = Callable[[], object]
"""Returns a value that differs once replicas have been added or removed; cheap."""
WATCH_S = 0.1
"""How often `Members` is called."""
CONNECTIONS = 8
"""Links that are opened at a time."""
SUSPECT_S = 5.0
"""How long the other replicas of a machine that fell silent are called only where there is no other."""
CONNECT_S = 0.5
"""How long a refresh waits for them; one that takes longer (a machine that does not answer) delays no other."""


class ReplicaTable:
    """(layer, expert) → the replicas that can be called for it.

    Each change makes a new mapping, so that readers need no lock. A thread refreshes the table every `refresh_s`, and
    at once after `report_broken` or when `members` changes; while `discover` fails, the table keeps what it has.
    """

    def __init__(
        self,
        discover: Discover,
        connect: Connect,
        keys: frozenset[ExpertKey],
        refresh_s: float = 2.0,
        members: Members | None = None,
    ) -> None:
        """`keys` are the (layer, expert) pairs that the model needs."""
        self._discover, self._connect, self._refresh_s = discover, connect, refresh_s
        self._keys, self._members = keys, members
        self._seen: object = None  # what `members` returned before the last refresh
        self._replicas: dict[str, Replica] = {}
        self._backoff: dict[str, tuple[float, float]] = {}  # replica id → (not before, delay)
        self._opening: dict[str, tuple[ReplicaInfo, Future[Link]]] = {}
        self._connections = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="expert-connect")
        self._changed = threading.Condition()
        self._by_key: Mapping[ExpertKey, tuple[Replica, ...]] = {}
        self._adapters: Mapping[str, object] = {}  # replica id → its adapters, and why it lacks others
        self._version = 0
        self.awaits_more: Callable[[], bool] = lambda: False
        """Whether replicas are to be looked at often, because one is awaited that holds more than is known."""
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="replica-table", daemon=True)

    def start(self) -> None:
        """Begin to refresh in the background; `missing` is empty once every key has a linked replica."""
        self._thread.start()

    @property
    def keys(self) -> frozenset[ExpertKey]:
        """The (layer, expert) pairs that the model needs."""
        return self._keys

    @property
    def by_key(self) -> Mapping[ExpertKey, tuple[Replica, ...]]:
        """(layer, expert) → the replicas that can be called for it; never changed, only replaced."""
        return self._by_key

    def replicas_of(self, layer: int, expert: int) -> tuple[Replica, ...]:
        """The replicas that can be called for a key; empty where there is none."""
        return self._by_key.get((layer, expert), ())

    def replicas(self) -> list[Replica]:
        """All replicas that can be called, by id."""
        found = {replica.replica_id: replica for group in self._by_key.values() for replica in group}
        return [found[replica_id] for replica_id in sorted(found)]

    @property
    def version(self) -> int:
        """Grows with every change of the table."""
        return self._version

    def missing(self) -> list[int]:
        """Experts that have no live replica for some layer, ascending."""
        return sorted({expert for layer, expert in self._keys if (layer, expert) not in self._by_key})

    def wait_change(self, version: int, timeout_s: float) -> bool:
        """Wait until the version differs from `version`; False after `timeout_s` or when the table is closed."""
        with self._changed:
            changed = self._changed.wait_for(lambda: self._version != version or self._closed, timeout_s)
        return changed and not self._closed

    def wait_complete(self, timeout_s: float) -> list[int]:
        """Wait until each layer of each expert has a live replica; the experts that have none after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while True:
            version = self.version
            missing = self.missing()
            if not missing or not self.wait_change(version, deadline - time.monotonic()):
                return self.missing()

    def end_if_silent(self, replica: Replica, node_id: str | None) -> None:
        """Close the link to a replica whose machine acknowledges nothing any more: its calls fail and go elsewhere.

        The other replicas of that machine are quarantined for a while, unless it is the caller's own (`node_id`).
        """
        if not replica.link.silent:
            replica.link.probe()  # so that the next check can tell
            return
        logger.warning("expert replica %s: its machine has fallen silent", replica.replica_id)
        replica.link.close()
        for other in self.replicas():
            if other.node_id == replica.node_id != node_id:
                other.quarantined_until = max(other.quarantined_until, time.monotonic() + SUSPECT_S)

    def report_broken(self, replica: Replica) -> None:
        """Close a replica's link, remove it from the table and refresh at once."""
        replica.link.close()
        self._publish()
        self._wake.set()

    def look_again(self) -> None:
        """Refresh at once: on the table's thread, or here where it has none."""
        if self._thread.is_alive():
            self._wake.set()
        else:
            self.refresh()

    def refresh(self) -> None:
        """Ask discovery, connect to new and lost replicas, retire those that are gone."""
        try:
            found = {info.replica_id: info for info in self._discover()}
        except MoeRayError as error:
            logger.debug("discovery failed, keeping %d replicas: %s", len(self._replicas), error)
            found = {replica_id: replica.info for replica_id, replica in self._replicas.items()}
        for replica_id, replica in self._replicas.items():
            replica.retiring = replica_id not in found
            if replica.retiring:
                replica.link.probe()
        held = self._held()
        for replica_id, replica in list(self._replicas.items()):
            needless = not replica.outstanding_rows and replica.info.keys <= held
            if replica.retiring and (replica.link.broken or needless):
                replica.link.close()
                del self._replicas[replica_id]
        begun: list[Future[Link]] = []
        for replica_id, info in found.items():
            known = self._replicas.get(replica_id)
            if known is not None and known.info.addresses != info.addresses:
                known.link.close()  # it restarted under its name: calls in flight on the old link are sent again
                self._backoff.pop(replica_id, None)
            if known is None or known.link.broken:
                begun += self._open(replica_id, info)
            else:
                known.info = info  # a replica may hold more keys than when the link was opened
        for late in wait_for(begun, CONNECT_S).not_done if begun else ():
            late.add_done_callback(lambda _: self._wake.set())
        self._take_opened(found)
        self._publish()

    def close(self) -> None:
        """Stop the thread and close every link. Idempotent."""
        self._closed = True
        self._wake.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        self._connections.shutdown(wait=False, cancel_futures=True)
        for _, future in self._opening.values():
            future.add_done_callback(_close_opened)
        for replica in self._replicas.values():
            replica.link.close()

    def _open(self, replica_id: str, info: ReplicaInfo) -> list[Future[Link]]:
        """Begin to connect, unless that is in progress or failed a moment ago; return what was begun."""
        not_before, _ = self._backoff.get(replica_id, (0.0, 0.0))
        if replica_id in self._opening or time.monotonic() < not_before:
            return []
        future = self._connections.submit(self._connect, info)
        self._opening[replica_id] = (info, future)
        return [future]

    def _take_opened(self, found: Mapping[str, ReplicaInfo]) -> None:
        """Add the links that have been opened, of replicas whose address has not changed meanwhile."""
        for replica_id, (info, future) in list(self._opening.items()):
            if not future.done():
                continue
            del self._opening[replica_id]
            try:
                link = future.result()
            except MoeRayError as error:  # LinkBroken or ConfigError: one replica must not delay the others
                _, delay = self._backoff.get(replica_id, (0.0, 0.0))
                delay = min(2 * delay or 0.25, 5.0)
                self._backoff[replica_id] = (time.monotonic() + delay, delay)
                logger.warning("cannot reach expert replica %s: %s", replica_id, error)
                continue
            now = found.get(replica_id)
            if now is None or now.addresses != info.addresses:
                link.close()
                continue
            self._backoff.pop(replica_id, None)
            self._replicas[replica_id] = Replica(now, link)
            logger.info("linked to expert replica %s", replica_id)

    def _held(self) -> frozenset[ExpertKey]:
        """The keys of linked replicas that are not retiring."""
        staying = (r.info.keys for r in list(self._replicas.values()) if not r.link.broken and not r.retiring)
        return frozenset().union(*staying)

    def _publish(self) -> None:
        table: dict[ExpertKey, list[Replica]] = {}
        held = self._held()
        for replica in list(self._replicas.values()):
            if not replica.link.broken:
                for key in replica.info.keys - held if replica.retiring else replica.info.keys:
                    table.setdefault(key, []).append(replica)
        fresh = {key: tuple(replicas) for key, replicas in table.items()}
        adapters = {r.replica_id: (r.info.adapters, r.info.adapter_faults) for r in list(self._replicas.values())}
        with self._changed:
            if fresh != self._by_key or adapters != self._adapters:
                self._by_key = fresh
                self._adapters = adapters
                self._version += 1
                self._changed.notify_all()

    def _run(self) -> None:
        while not self._closed:
            self._wait(self._pause())
            self._wake.clear()
            if self._closed:
                return
            self._seen = self._look()
            try:
                self.refresh()
            except Exception:  # the thread must go on: without it no link is ever renewed
                logger.exception("refreshing the replica table failed")

    def _wait(self, seconds: float) -> None:
        """Wait `seconds`, or until woken, or until the members differ."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self._wake.wait(left if self._members is None else min(left, WATCH_S)):
                return
            if self._members is not None and self._look() != self._seen:
                return

    def _look(self) -> object:
        """What `members` returns. If it fails, it is not called again: the table refreshes every `refresh_s` only."""
        try:
            return None if self._members is None else self._members()
        except Exception:  # as in `_run`
            logger.exception("replicas cannot be watched: they are looked for every %g s", self._refresh_s)
            self._members = None
            return self._seen

    def _pause(self) -> float:
        # While a key is missing or a replica starts or stops, refresh often: calls may be waiting for it.
        replicas = list(self._replicas.values())
        urgent = (
            self.awaits_more() or self.missing() or any(r.link.broken or r.retiring or r.info.loading for r in replicas)
        )
        return min(self._refresh_s, 0.25) if urgent else self._refresh_s


def _close_opened(future: Future[Link]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().close()
