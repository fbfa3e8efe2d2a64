"""The pool and its directory over real links, gRPC and native sockets: who is chosen, who answers when one dies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from moe_ray.config import load_config
from moe_ray.core import ExpertCall, ExpertReply, ReplicaInfo, ReplicaLoad
from moe_ray.errors import ConfigError, ExpertFailed, ExpertUnavailable, NotReady, ProtocolError, TransportError
from moe_ray.experts.client.pool import ExpertPool, PoolOptions
from moe_ray.experts.client.replica_table import Directory
from moe_ray.experts.client.selection import Pace
from moe_ray.model.moe import PendingCalls, Routed, combine, group
from moe_ray.transport import connect
from moe_ray.transport.base import Link, LinkOptions
from moe_ray.transport.grpc import GrpcExpertServer
from moe_ray.transport.socket import SocketExpertServer

NATIVE = LinkOptions(native_dir=load_config().cache_dir)
WIDTH, EXPERT, KEY = 8, 3, (0, 3)


def call(rows: int = 2, expert: int = EXPERT, layer: int = 0) -> ExpertCall:
    return ExpertCall(layer, expert, torch.arange(rows * WIDTH).view(rows, WIDTH).float(), torch.full((rows,), 0.5))


class Many:
    """Calls under way, each as a layer of its own would send it."""

    def __init__(self, pool: ExpertPool, calls: list[ExpertCall]) -> None:
        self.under_way: list[PendingCalls] = []
        try:
            for one in calls:
                counts = [0] * one.expert + [len(one.rows)]
                routed = Routed(one.rows, one.weights, counts, torch.arange(len(one.rows)).view(-1, 1))
                self.under_way.append(pool.submit(one.layer, routed))
        except BaseException:
            self.abandon()
            raise

    def gather(self) -> list[torch.Tensor]:
        return [calls.gather() for calls in self.under_way]

    def abandon(self) -> None:
        for calls in self.under_way:
            calls.abandon()


send = Many


def expected(asked: ExpertCall) -> torch.Tensor:
    return asked.rows * 0.5


@dataclass(eq=False)
class Server:
    """A real expert in this process whose behaviour a test can change."""

    name: str
    carrier: str
    keys: frozenset[tuple[int, int]] = frozenset({KEY})
    error: TransportError | None = None
    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    calls: int = 0
    spoil: bool = False
    """Answer with NaN."""
    delay_s: float = 0.0

    def __post_init__(self) -> None:
        self.gate.set()
        self.listen()

    def listen(self) -> None:
        self.server = {"grpc": GrpcExpertServer, "socket": SocketExpertServer}[self.carrier](self.handle)

    def handle(self, asked: ExpertCall) -> ExpertReply:
        self.calls += 1
        self.entered.release()
        assert self.gate.wait(30)
        time.sleep(self.delay_s)
        if self.error is not None:
            raise self.error
        rows = asked.rows * (float("nan") if self.spoil else asked.weights[:, None])
        return ExpertReply(asked.call_id, rows, ReplicaLoad(queued_rows=self.calls))

    def info(self) -> ReplicaInfo:
        return ReplicaInfo(self.name, "node", 1, self.keys, WIDTH, "float32", {self.carrier: self.server.address})

    def die(self) -> None:
        """End at once; a call being computed is lost."""
        self.server.close()
        self.gate.set()


class World:
    """Servers, what discovery says of them, and everything to be closed in the end."""

    def __init__(self, carrier: str) -> None:
        self.carrier = carrier
        self.servers: list[Server] = []
        self.found: list[Server] = []
        self.away = False
        self.links: list[Link] = []
        self.directories: list[Directory] = []

    def server(self, name: str, **how: object) -> Server:
        server = Server(name, self.carrier, **how)  # type: ignore[arg-type]
        self.servers.append(server)
        self.found.append(server)
        return server

    def discover(self) -> list[ReplicaInfo]:
        if self.away:
            raise NotReady("the controller is away")
        return [server.info() for server in self.found]

    def connect(self, info: ReplicaInfo) -> Link:
        link = connect(self.carrier, info, NATIVE)
        self.links.append(link)
        return link

    def directory(self, refresh_s: float = 0.05, start: bool = True) -> Directory:
        directory = Directory(self.discover, self.connect, frozenset({KEY}), refresh_s)
        self.directories.append(directory)
        directory.refresh()
        if start:
            directory.start()
        return directory

    def pool(
        self, deadline_s: float = 20.0, call_timeout_s: float = 10.0, start: bool = True, **more: Any
    ) -> ExpertPool:
        return ExpertPool(self.directory(start=start), PoolOptions(deadline_s, call_timeout_s, **more))

    def close(self) -> None:
        for directory in self.directories:
            directory.close()
        for server in self.servers:
            server.gate.set()
            server.die()


@pytest.fixture(params=["grpc", "socket"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(request.param)
    yield world
    world.close()
    assert all(link.broken for link in world.links), "a link outlived its directory"


def eventually(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it never came to pass"
        time.sleep(0.005)


def idle(pool: ExpertPool) -> bool:
    return all(replica.outstanding_rows == 0 for replica in pool.replicas())


def test_rows_come_home_in_the_order_of_the_calls(world: World) -> None:
    world.server("a", keys=frozenset((0, e) for e in range(8)))
    pool = world.pool()
    calls = [call(rows=e + 1, expert=e) for e in range(8)]
    rows = send(pool, calls).gather()
    assert all(torch.equal(got, expected(asked)) for got, asked in zip(rows, calls, strict=True))
    assert idle(pool)
    assert pool.replicas()[0].load.queued_rows == 8, "the reply's load is noted"


def test_calls_spread_over_replicas_by_outstanding_rows(world: World) -> None:
    servers = [world.server(name) for name in "abc"]
    pool = world.pool()
    for server in servers:
        server.gate.clear()
    scattered = send(pool, [call(rows=5), call(rows=1), call(rows=1), call(rows=1), call(rows=1)])
    assert sorted(r.outstanding_rows for r in pool.replicas()) == [2, 2, 5]
    for server in servers:
        server.gate.set()
    scattered.gather()
    assert idle(pool)
    assert sorted(server.calls for server in servers) == [1, 2, 2]
    assert pool.counters.retries == 0


def test_a_replica_that_dies_in_the_middle_of_a_call(world: World) -> None:
    dying, other = world.server("a"), world.server("b")
    pool = world.pool()
    dying.gate.clear()
    asked = call()
    scattered = send(pool, [asked, call()])
    assert dying.entered.acquire(timeout=10)
    world.found.remove(dying)
    killer = threading.Thread(target=dying.die)
    killer.start()
    rows = scattered.gather()
    dying.gate.set()
    killer.join()
    assert [torch.equal(got, expected(asked)) for got in rows] == [True, True]
    assert (dying.calls, other.calls) == (1, 2)
    assert pool.counters.retries == 1
    eventually(lambda: [r.info.replica_id for r in pool.replicas()] == ["b"])
    assert idle(pool)


def test_without_a_replica_the_call_waits_for_one(world: World) -> None:
    pool = world.pool()
    assert pool.missing() == [EXPERT]
    scattered = send(pool, [call()])
    timer = threading.Timer(0.3, lambda: world.server("late"))
    timer.start()
    started = time.monotonic()
    (rows,) = scattered.gather()
    timer.join()
    assert torch.equal(rows, expected(call()))
    assert 0.2 < time.monotonic() - started < 10
    assert pool.missing() == []


def test_the_deadline_names_expert_and_layer(world: World) -> None:
    pool = world.pool(deadline_s=0.2)
    started = time.monotonic()
    with pytest.raises(ExpertUnavailable, match=r"expert 3 \(layer 0\).*no live replica within 0.2 s"):
        send(pool, [call()]).gather()
    assert 0.15 < time.monotonic() - started < 5


def test_a_replica_that_answers_with_an_error_and_another_that_does_not(world: World) -> None:
    failing, fine = world.server("a", error=ExpertFailed("out of memory")), world.server("b")
    pool = world.pool()
    for _ in range(4):
        (rows,) = send(pool, [call()]).gather()
        assert torch.equal(rows, expected(call()))
    assert failing.calls > 0
    assert fine.calls == 4
    assert pool.counters.retries == failing.calls
    assert idle(pool)
    assert not any(replica.link.broken for replica in pool.replicas()), "an answered error is no reason to hang up"


def test_all_replicas_answer_with_errors(world: World) -> None:
    world.server("a", error=ExpertFailed("out of memory"))
    world.server("b", error=ProtocolError("layer 0 expert 3 is not held"))
    pool = world.pool()
    started = time.monotonic()
    with pytest.raises(ExpertUnavailable) as caught:
        send(pool, [call()]).gather()
    message = str(caught.value)
    for part in ("expert 3 (layer 0)", "out of memory", "is not held", "replica a", "replica b"):
        assert part in message
    assert time.monotonic() - started < 5, "waiting changes nothing here"
    assert idle(pool)


def test_a_call_is_tried_at_most_so_often(world: World) -> None:
    servers = [world.server(f"r{i}", error=ExpertFailed("no")) for i in range(5)]
    with pytest.raises(ExpertUnavailable):
        send(world.pool(), [call()]).gather()
    assert sum(server.calls for server in servers) == PoolOptions().max_attempts


def test_a_replica_that_hangs_is_given_up_after_the_call_timeout(world: World) -> None:
    hanging, other = world.server("a"), world.server("b")
    pool = world.pool(call_timeout_s=0.3)
    hanging.gate.clear()
    rows = send(pool, [call(), call()]).gather()
    assert all(torch.equal(got, expected(call())) for got in rows)
    assert other.calls == 2
    hanging.gate.set()


def test_outstanding_rows_return_to_zero_when_calls_are_abandoned(world: World) -> None:
    servers = [world.server(name) for name in "ab"]
    pool = world.pool()
    for server in servers:
        server.gate.clear()
    scattered = send(pool, [call(rows=n) for n in (1, 2, 3)])
    assert not idle(pool)
    scattered.abandon()
    scattered.abandon()
    assert idle(pool)
    for server in servers:
        server.gate.set()
    assert torch.equal(send(pool, [call(rows=4)]).gather()[0], expected(call(rows=4))), "late replies mix nothing up"
    assert idle(pool)


def test_outstanding_rows_return_to_zero_when_gathering_fails(world: World) -> None:
    world.server("a", keys=frozenset({KEY, (0, 1)}))
    pool = world.pool(deadline_s=0.1)
    scattered = send(pool, [call(expert=1), call(expert=7), call(rows=5)])
    with pytest.raises(ExpertUnavailable, match="expert 7"):
        scattered.gather()
    scattered.abandon()
    assert idle(pool)


def test_a_call_that_cannot_be_sent_leaves_nothing_outstanding(world: World) -> None:
    world.server("a")
    pool = world.pool()
    bad = replace(call(), rows=call().rows.int())
    with pytest.raises(ProtocolError, match="rows"):
        send(pool, [call(rows=5), bad])
    assert idle(pool)


def test_while_discovery_is_away_what_is_known_stays(world: World) -> None:
    server = world.server("a")
    pool = world.pool()
    world.away = True
    time.sleep(0.2)
    assert torch.equal(send(pool, [call()]).gather()[0], expected(call()))
    # and a link that breaks meanwhile is opened again to where the replica was last seen
    pool.replicas()[0].link.close()
    assert torch.equal(send(pool, [call()]).gather()[0], expected(call()))
    assert server.calls == 2
    assert pool.missing() == []


def test_a_retiring_replica_gets_no_calls_and_is_closed_when_idle(world: World) -> None:
    old, new = world.server("old"), world.server("new")
    pool = world.pool(start=False)
    (directory,) = world.directories
    by_name = {r.info.replica_id: r for r in pool.replicas()}
    old.gate.clear()
    new.gate.clear()
    scattered = send(pool, [call(), call()])
    assert by_name["old"].outstanding_rows == 2
    world.found.remove(old)
    directory.refresh()
    assert by_name["old"].retiring
    assert [r.info.replica_id for r in pool.replicas()] == ["new"]
    assert not by_name["old"].link.broken, "it still owes an answer"
    new.gate.set()
    send(pool, [call(), call()]).gather()
    assert old.calls <= 1
    old.gate.set()
    assert len(scattered.gather()) == 2
    assert not by_name["old"].link.broken
    directory.refresh()
    assert by_name["old"].link.broken
    assert idle(pool)


def test_what_nobody_else_holds_yet_a_retiring_replica_computes(world: World) -> None:
    """Its successor runs and still loads: to let the old one go at once would leave a layer without anybody."""
    second = (KEY[0], KEY[1] + 1)
    old = world.server("old", keys=frozenset({KEY, second}))
    pool = world.pool(start=False)
    (directory,) = world.directories
    world.found.remove(old)
    new = world.server("new")
    for _ in range(2):  # also once it has been retiring for a while
        directory.refresh()
        assert [r.replica_id for r in directory.table[KEY]] == ["new"]
        assert [r.replica_id for r in directory.table[second]] == ["old"]
    asked = call(expert=second[1])
    assert torch.equal(send(pool, [asked]).gather()[0], expected(asked))
    assert (old.calls, new.calls) == (1, 0)
    new.keys = frozenset({KEY, second})
    directory.refresh()
    directory.refresh()
    assert [r.replica_id for r in directory.table[second]] == ["new"]
    assert {r.replica_id for r in pool.replicas()} == {"new"}
    assert sum(not link.broken for link in world.links) == 1


def test_a_retiring_replica_that_is_gone_is_not_relied_on(world: World) -> None:
    """Nobody calls it, so only a look at its link tells that it has died, and health must not say that all is well."""
    server = world.server("a")
    pool = world.pool(start=False)
    (directory,) = world.directories
    world.found.remove(server)
    directory.refresh()
    assert pool.missing() == []
    server.die()
    deadline = time.monotonic() + 5
    while not pool.missing():
        assert time.monotonic() < deadline
        directory.refresh()
    assert pool.missing() == [EXPERT]


def test_to_watch_who_is_there_may_fail(world: World) -> None:
    """The thread that renews links lives on, whatever the handles' insides say."""
    world.server("a")

    def members() -> object:
        raise AttributeError("another Ray")

    directory = Directory(world.discover, world.connect, frozenset({KEY}), 0.1, members)
    world.directories.append(directory)
    directory.start()
    for count in (1, 2):
        if count > 1:
            world.server("b")
        deadline = time.monotonic() + 5
        while len(directory.table.get(KEY, ())) < count:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_replica_that_is_found_again_is_not_retired(world: World) -> None:
    server = world.server("a")
    pool = world.pool(start=False)
    (directory,) = world.directories
    (replica,) = pool.replicas()
    server.gate.clear()
    scattered = send(pool, [call()])
    world.found.remove(server)
    directory.refresh()
    assert replica.retiring
    world.found.append(server)
    directory.refresh()
    assert pool.replicas() == [replica]
    assert not replica.retiring
    server.gate.set()
    scattered.gather()
    assert not replica.link.broken


def test_a_replica_that_restarts_under_its_name_at_another_address(world: World) -> None:
    server = world.server("a")
    pool = world.pool()
    send(pool, [call()]).gather()
    server.server.close()
    server.listen()
    assert torch.equal(send(pool, [call()]).gather()[0], expected(call()))
    eventually(lambda: [r.info.addresses[world.carrier] for r in pool.replicas()] == [server.server.address])


def test_a_new_address_counts_even_while_the_old_one_still_answers(world: World) -> None:
    server = world.server("a")
    pool = world.pool(start=False)
    (directory,) = world.directories
    (old,) = pool.replicas()
    left_behind = server.server
    server.listen()
    directory.refresh()
    (new,) = pool.replicas()
    assert old.link.broken
    assert new.info.addresses == {world.carrier: server.server.address}
    assert torch.equal(send(pool, [call()]).gather()[0], expected(call()))
    left_behind.close()


def test_a_replica_that_comes_to_hold_more_is_used_for_it(world: World) -> None:
    server = world.server("a", keys=frozenset({(1, 3)}))
    pool = world.pool(start=False)
    (directory,) = world.directories
    assert pool.missing() == [EXPERT]
    links = len(world.links)
    server.keys = frozenset({(1, 3), KEY})
    directory.refresh()
    assert pool.missing() == []
    assert torch.equal(send(pool, [call()]).gather()[0], expected(call()))
    assert len(world.links) == links, "no reason to connect anew"


def test_one_replica_that_cannot_be_linked_does_not_hide_the_others(world: World) -> None:
    def connect(info: ReplicaInfo) -> Link:
        if info.replica_id == "a":
            raise ConfigError("expert replica a offers ray, and this process may use grpc")
        return world.connect(info)

    for name in "abc":
        world.server(name)
    directory = Directory(world.discover, connect, frozenset({KEY}))
    world.directories.append(directory)
    directory.refresh()
    assert [r.info.replica_id for r in ExpertPool(directory).replicas()] == ["b", "c"]


def test_a_dead_address_is_not_knocked_at_in_a_loop(world: World) -> None:
    world.server("a").die()
    attempts = []

    def connect(info: ReplicaInfo) -> Link:
        attempts.append(time.monotonic())
        return world.connect(info)

    directory = Directory(world.discover, connect, frozenset({KEY}))
    world.directories.append(directory)
    end = time.monotonic() + 0.6
    while time.monotonic() < end:
        directory.refresh()
    assert 1 <= len(attempts) <= 3
    assert directory.missing() == [EXPERT]


def test_close_ends_the_thread_and_every_wait(world: World) -> None:
    directory = world.directory()
    waiting = threading.Thread(target=lambda: directory.wait_change(directory.version, 30))
    waiting.start()
    directory.close()
    waiting.join(timeout=5)
    assert not waiting.is_alive()
    assert not [t for t in threading.enumerate() if t.name == "expert-directory"]


TWO = frozenset({(0, 3), (0, 6)})


def routed() -> tuple[Routed, torch.Tensor]:
    """Two rows for expert 3 and three for expert 6, and what comes of them."""
    rows, weights = torch.randn(5, WIDTH), torch.rand(5)
    return Routed(rows, weights, [0, 0, 0, 2, 0, 0, 3, 0], torch.arange(5).view(5, 1)), rows * weights[:, None]


def spoil(reply: ExpertReply) -> ExpertReply:
    reply.rows[0, 0] = float("nan")
    return reply


def test_a_layer_goes_out_at_once_and_comes_home_in_order(world: World) -> None:
    servers = [world.server(name, keys=TWO) for name in "ab"]
    pool = world.pool()
    for _ in range(20):
        layer, wanted = routed()
        pending = pool.submit(0, layer)
        assert torch.equal(pending.gather(), wanted)
        pending.abandon()
    assert idle(pool)
    assert sum(server.calls for server in servers) == 40
    assert {replica.load.queued_rows for replica in pool.replicas()} == {server.calls for server in servers}
    assert pool.counters.retries == 0


@pytest.mark.parametrize("fault", ["fails", "refuses", "nan", "dies", "late"])
def test_a_layer_survives_a_replica(world: World, fault: str) -> None:
    """The replica that is chosen first spoils its part; the other has to do all."""
    bad = world.server("a", keys=TWO)
    pool = world.pool(call_timeout_s=0.3 if fault == "late" else 10.0)
    world.server("b", keys=TWO)
    eventually(lambda: len(pool.replicas()) == 2)
    if fault == "nan":
        good = bad.handle
        world.found.remove(bad)
        bad.server.close()
        bad.handle = lambda asked: spoil(good(asked))  # type: ignore[method-assign]
        bad.listen()
        bad.name = "a2"
        world.found.insert(0, bad)
        eventually(lambda: {r.info.replica_id for r in pool.replicas()} == {"a2", "b"})
    bad.error = {"fails": ExpertFailed("no"), "refuses": ProtocolError("no")}.get(fault)
    if fault in ("dies", "late"):
        bad.gate.clear()
    layer, wanted = routed()
    for replica in pool.replicas():
        replica.calls += 10 * (replica.info.replica_id == "b")  # so that the bad one is chosen first
    pending = pool.submit(0, layer)
    if fault == "dies":
        assert bad.entered.acquire(timeout=10)
        bad.die()
    assert torch.equal(pending.gather(), wanted)
    assert pool.counters.retries >= 1
    assert idle(pool)
    bad.gate.set()


def test_a_layer_that_is_given_up_leaves_nothing_behind(world: World) -> None:
    server = world.server("a", keys=TWO)
    pool = world.pool()
    server.gate.clear()
    layer, _ = routed()
    pending = pool.submit(0, layer)
    assert sum(replica.outstanding_rows for replica in pool.replicas()) == 5
    pending.abandon()
    pending.abandon()
    assert idle(pool)
    server.gate.set()
    layer, wanted = routed()
    assert torch.equal(pool.submit(0, layer).gather(), wanted)


def test_a_layer_without_an_expert_waits_and_says_who_is_missing(world: World) -> None:
    world.server("a", keys=frozenset({(0, 3)}))
    pool = world.pool(deadline_s=0.3)
    with pytest.raises(ExpertUnavailable, match="expert 6"):
        pool.submit(0, routed()[0]).gather()
    assert idle(pool)


def warm(pool: ExpertPool) -> None:
    """Let the pool learn how long calls take here."""
    for _ in range(80):
        layer, wanted = routed()
        assert torch.equal(pool.submit(0, layer).gather(), wanted)


def test_a_late_call_is_sent_to_another_replica_too(world: World) -> None:
    servers = [world.server(name, keys=TWO) for name in "ab"]
    pool = world.pool()
    warm(pool)
    for replica in pool.replicas():
        replica.slowness = Pace()  # what a busy machine taught it is not what is shown here
    stalling = servers[0]
    stalling.gate.clear()
    started = time.monotonic()
    hedged = pool.counters.hedges
    for _ in range(6):
        layer, wanted = routed()
        assert torch.equal(pool.submit(0, layer).gather(), wanted)
    assert time.monotonic() - started < 10, "the stall lasts until the gate opens"
    assert pool.counters.hedge_wins >= 1
    assert pool.counters.hedges - hedged <= 6
    assert pool.counters.cancelled == pool.counters.hedges, "of two calls one is taken back, whichever was first"
    assert idle(pool)
    stalling.gate.set()
    for _ in range(20):
        layer, wanted = routed()
        assert torch.equal(pool.submit(0, layer).gather(), wanted), "answers that came too late mix nothing up"
    assert idle(pool)
    assert pool.counters.retries == 0
    assert not any(replica.link.broken for replica in pool.replicas())


def test_hedging_can_be_turned_off_and_keeps_to_its_budget(world: World) -> None:
    servers = [world.server(name, keys=TWO) for name in "ab"]
    patient = world.pool(hedge=False, call_timeout_s=0.3)
    warm(patient)
    servers[0].gate.clear()
    for _ in range(3):
        layer, wanted = routed()
        assert torch.equal(patient.submit(0, layer).gather(), wanted)
    assert patient.counters.hedges == 0
    servers[0].gate.set()
    for server in servers:
        server.delay_s = 0.004
    eager = world.pool()
    eager._lateness.least_s, eager._lateness.factor = 0.0, 0.0  # every call is late
    for _ in range(200):
        layer, wanted = routed()
        assert torch.equal(eager.submit(0, layer).gather(), wanted)
    assert 0 < eager.counters.hedges <= 4 + 0.02 * eager.counters.calls
    assert idle(eager)


def test_a_large_batch_is_shared(world: World) -> None:
    servers = [world.server(name) for name in "abc"]
    pool = world.pool()
    rows, weights = torch.randn(1000, WIDTH), torch.rand(1000)
    layer = Routed(rows, weights, [0, 0, 0, 1000], torch.arange(1000).view(-1, 1))
    assert torch.equal(pool.submit(0, layer).gather(), rows * weights[:, None])
    assert [server.calls for server in servers] == [1, 1, 1]
    assert pool.counters.splits == 1
    alone = world.pool(split=False)
    assert torch.equal(alone.submit(0, layer).gather(), rows * weights[:, None])
    assert sum(server.calls for server in servers) == 4


def test_a_replica_whose_answers_cannot_be_used_is_quarantined(world: World) -> None:
    bad, good = world.server("a"), world.server("b")
    bad.spoil = True
    pool = world.pool()
    for _ in range(20):
        (rows,) = send(pool, [call()]).gather()
        assert torch.equal(rows, expected(call()))
    assert bad.calls == 1
    assert good.calls == 20
    assert pool.counters.quarantines == 1
    good.die()
    bad.spoil = False
    (rows,) = send(pool, [call()]).gather()
    assert torch.equal(rows, expected(call())), "better than nobody"


THREE = (2, 3, 6)


def three_experts(width: int = WIDTH) -> tuple[Routed, torch.Tensor]:
    """Four tokens with two of three experts each, and the tokens' experts' weights [T, E]."""
    chosen = torch.tensor([[2, 3], [3, 6], [2, 6], [3, 6]])
    weights = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.5, 0.5], [0.9, 0.1]])
    return group(torch.randn(4, width), chosen, weights, 8), weights


def test_renormalise_goes_on_with_the_other_experts_and_says_so(world: World) -> None:
    world.server("a", keys=frozenset({(0, 2), (0, 6)}))  # nobody has expert 3
    pool = world.pool(on_loss="renormalise")
    layer, _ = three_experts()
    calls = pool.submit(0, layer)
    rows = calls.gather()
    assert calls.degraded is not None
    assert calls.degraded.tolist() == [True, True, False, True]
    inputs = torch.empty(4, WIDTH)
    inputs[torch.arange(4)] = layer.rows[layer.row_of[:, 0]]
    # An expert here returns its rows times their weights: with weights that sum to 1, the sum is the rows themselves.
    torch.testing.assert_close(combine(rows, layer.row_of), inputs)
    assert idle(pool)
    assert pool.counters.retries == 0


def test_a_token_that_lost_all_its_experts_gets_nothing(world: World) -> None:
    world.server("a", keys=frozenset({(0, 2)}))
    layer, _ = three_experts()
    calls = world.pool(on_loss="renormalise").submit(0, layer)
    out = combine(calls.gather(), layer.row_of)
    assert calls.degraded is not None
    assert calls.degraded.all()
    assert out[1].eq(0).all()
    assert out[3].eq(0).all()
    assert out[0].ne(0).any()


def test_fail_does_not_wait(world: World) -> None:
    world.server("a", keys=frozenset({(0, 2), (0, 6)}))
    pool = world.pool(on_loss="fail", deadline_s=30.0)
    started = time.monotonic()
    with pytest.raises(ExpertUnavailable, match=r"expert 3 \(layer 0\) is unavailable: no live replica"):
        pool.submit(0, three_experts()[0]).gather()
    assert time.monotonic() - started < 5
    assert idle(pool)


def test_nothing_is_degraded_while_all_are_there(world: World) -> None:
    world.server("a", keys=frozenset((0, e) for e in THREE))
    calls = world.pool(on_loss="renormalise").submit(0, three_experts()[0])
    calls.gather()
    assert calls.degraded is None
