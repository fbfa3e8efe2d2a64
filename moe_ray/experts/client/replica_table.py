"""Keeps a live link to every expert replica that discovery knows of."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field

from moe_ray.core import ExpertKey, ReplicaInfo, ReplicaLoad
from moe_ray.errors import MoeRayError
from moe_ray.experts.client.selection import Pace, backlog
from moe_ray.transport.base import Link

logger = logging.getLogger(__name__)

QUARANTINE_S, QUARANTINE_MOST_S = 10.0, 300.0
Discover = Callable[[], Sequence[ReplicaInfo]]
"""Asks who is there. Raises `NotReady` when it cannot be known now: then what is known is kept."""
Connect = Callable[[ReplicaInfo], Link]
"""Opens a link. Raises `LinkBroken`, or `ConfigError` when the replica offers no carrier that may be used."""
Members = Callable[[], object]
"""Something cheap that differs once replicas have come or gone."""
WATCH_S = 0.1
"""How often `Members` is called."""
CONNECTIONS = 8
"""Links that are opened at a time."""
CONNECT_S = 0.5
"""How long a refresh waits for them; one that takes longer (a machine that does not answer) holds up no other."""


@dataclass(slots=True, eq=False)
class Replica:
    """One replica as the pool sees it. All but `info`, `link` and `retiring` belongs to the pool's thread."""

    info: ReplicaInfo
    link: Link
    outstanding_rows: int = 0
    calls: int = 0
    load: ReplicaLoad = field(default_factory=ReplicaLoad)
    load_at: float = 0.0
    """When `load` came (monotonic seconds)."""
    retiring: bool = False
    """Gone from discovery while its link still lives: takes new calls only for what nobody else holds (its successor
    may still be loading), closed when there is nothing such and no call outstanding."""
    slowness: Pace = field(default_factory=Pace)
    faults: int = 0
    """Unusable answers in a row."""
    quarantined_until: float = 0.0
    """Monotonic seconds; until then it is called only where there is nobody else."""

    @property
    def replica_id(self) -> str:
        return self.info.replica_id

    @property
    def node_id(self) -> str:
        return self.info.node_id

    @property
    def usable(self) -> bool:
        return not self.link.broken

    def trusted(self, now: float) -> bool:
        return self.quarantined_until <= now

    def backlog(self, now: float) -> int:
        return backlog(self.outstanding_rows, self.load.queued_rows, now - self.load_at)

    def pace(self, now: float) -> float:
        return self.slowness.read(now)

    def answered(self, load: ReplicaLoad, now: float) -> None:
        """Note a usable answer and what it said."""
        self.load, self.load_at, self.faults = load, now, 0

    def misbehaved(self, now: float) -> float:
        """Note an unusable answer; return the seconds for which the replica is quarantined."""
        self.faults += 1
        seconds = min(QUARANTINE_S * 2 ** (self.faults - 1), QUARANTINE_MOST_S)
        self.quarantined_until = now + seconds
        return seconds


Table = dict[ExpertKey, tuple[Replica, ...]]


class Directory:
    """The table (layer, expert) → live replicas, renewed by a thread of its own.

    The table is replaced, never changed, so that readers need no lock. It is renewed every `refresh_s` and at once
    after `report_broken` or when `members` changes; while `discover` fails, what is known stays.
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
        self._seen: object = None  # what `members` said before the last refresh
        self._replicas: dict[str, Replica] = {}
        self._backoff: dict[str, tuple[float, float]] = {}  # replica id → (not before, delay)
        self._opening: dict[str, tuple[ReplicaInfo, Future[Link]]] = {}
        self._connections = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="expert-connect")
        self._changed = threading.Condition()
        self._table: Table = {}
        self._version = 0
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="expert-directory", daemon=True)

    def start(self) -> None:
        """Begin renewing in the background; `missing` is empty once everybody is linked."""
        self._thread.start()

    @property
    def table(self) -> Table:
        return self._table

    @property
    def version(self) -> int:
        """Grows with every change of the table."""
        return self._version

    def missing(self) -> list[int]:
        """Experts that have no live replica for some layer, ascending."""
        return sorted({expert for layer, expert in self._keys if (layer, expert) not in self._table})

    def wait_change(self, version: int, timeout_s: float) -> bool:
        """Wait until the table differs from `version`; False after `timeout_s` or when the directory is closed."""
        with self._changed:
            changed = self._changed.wait_for(lambda: self._version != version or self._closed, timeout_s)
        return changed and not self._closed

    def report_broken(self, replica: Replica) -> None:
        """Close a replica's link, take it out of the table and look for a new one at once."""
        replica.link.close()
        self._publish()
        self._wake.set()

    def refresh(self) -> None:
        """Ask discovery, connect to who is new or was lost, retire who is gone."""
        try:
            found = {info.replica_id: info for info in self._discover()}
        except MoeRayError as error:
            logger.debug("discovery is away, keeping %d replicas: %s", len(self._replicas), error)
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
                known.link.close()  # it restarted under its name: what is in flight on the old link is sent again
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
        """Stop renewing and close every link."""
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
        """Begin to connect, unless that is under way or was in vain a moment ago; what was begun."""
        not_before, _ = self._backoff.get(replica_id, (0.0, 0.0))
        if replica_id in self._opening or time.monotonic() < not_before:
            return []
        future = self._connections.submit(self._connect, info)
        self._opening[replica_id] = (info, future)
        return [future]

    def _take_opened(self, found: Mapping[str, ReplicaInfo]) -> None:
        """Take in the links that have been opened, of replicas that are still there as they were."""
        for replica_id, (info, future) in list(self._opening.items()):
            if not future.done():
                continue
            del self._opening[replica_id]
            try:
                link = future.result()
            except MoeRayError as error:  # LinkBroken or ConfigError: one replica must not hold up the others
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
        """What live replicas hold that do not retire."""
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
        with self._changed:
            if fresh != self._table:
                self._table = fresh
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
            except Exception:  # this thread must outlive any surprise: without it no link is ever renewed
                logger.exception("renewing the expert directory failed")

    def _wait(self, seconds: float) -> None:
        """Wait so long, or until woken, or until the members differ."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self._wake.wait(left if self._members is None else min(left, WATCH_S)):
                return
            if self._members is not None and self._look() != self._seen:
                return

    def _look(self) -> object:
        """What `members` says; if it fails, it is not asked again: `refresh_s` does without."""
        try:
            return None if self._members is None else self._members()
        except Exception:  # as in `_run`
            logger.exception("replicas cannot be watched: they are looked for every %g s", self._refresh_s)
            self._members = None
            return self._seen

    def _pause(self) -> float:
        # While something is missing, coming or going, look often: somebody is waiting for it.
        replicas = list(self._replicas.values())
        urgent = self.missing() or any(r.link.broken or r.retiring or r.info.loading for r in replicas)
        return min(self._refresh_s, 0.25) if urgent else self._refresh_s


def _close_opened(future: Future[Link]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().close()
