"""The dispatcher and its table over real links, gRPC and native sockets: who is chosen, who answers when one dies."""

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
from moe_ray.errors import (
    CallRefused,
    ConfigError,
    ExpertFailed,
    ExpertUnavailable,
    InvalidCall,
    NotReady,
    ReplicaBusy,
    TransportError,
)
from moe_ray.experts.client.cost_model import SlowdownEstimate
from moe_ray.experts.client.dispatcher import ExpertDispatcher
from moe_ray.experts.client.options import DispatchOptions
from moe_ray.experts.client.replica_table import ReplicaTable
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
    """Calls in flight, each as a layer of its own would send it."""

    def __init__(self, dispatcher: ExpertDispatcher, calls: list[ExpertCall]) -> None:
        self.in_flight: list[PendingCalls] = []
        try:
            for one in calls:
                counts = [0] * one.expert + [len(one.rows)]
                routed = Routed(one.rows, one.weights, counts, torch.arange(len(one.rows)).view(-1, 1))
                self.in_flight.append(dispatcher.submit(one.layer, routed))
        except BaseException:
            self.abandon()
            raise

    def gather(self) -> list[torch.Tensor]:
        return [calls.gather().rows for calls in self.in_flight]

    def abandon(self) -> None:
        for calls in self.in_flight:
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
        self.tables: list[ReplicaTable] = []

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

    def table(self, refresh_s: float = 0.05, start: bool = True) -> ReplicaTable:
        table = ReplicaTable(self.discover, self.connect, frozenset({KEY}), refresh_s)
        self.tables.append(table)
        table.refresh()
        if start:
            table.start()
        return table

    def dispatcher(
        self, deadline_s: float = 20.0, call_timeout_s: float = 10.0, start: bool = True, **more: Any
    ) -> ExpertDispatcher:
        return ExpertDispatcher(self.table(start=start), DispatchOptions(deadline_s, call_timeout_s, **more))

    def close(self) -> None:
        for table in self.tables:
            table.close()
        for server in self.servers:
            server.gate.set()
            server.die()


@pytest.fixture(params=["grpc", "socket"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(request.param)
    yield world
    world.close()
    assert all(link.broken for link in world.links), "a link outlived its table"


def eventually(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it never came to pass"
        time.sleep(0.005)


def idle(dispatcher: ExpertDispatcher) -> bool:
    return all(replica.outstanding_rows == 0 for replica in dispatcher.table.replicas())


def test_rows_come_home_in_the_order_of_the_calls(world: World) -> None:
    world.server("a", keys=frozenset((0, e) for e in range(8)))
    dispatcher = world.dispatcher()
    calls = [call(rows=e + 1, expert=e) for e in range(8)]
    rows = send(dispatcher, calls).gather()
    assert all(torch.equal(got, expected(asked)) for got, asked in zip(rows, calls, strict=True))
    assert idle(dispatcher)
    assert dispatcher.table.replicas()[0].load.queued_rows == 8, "the reply's load is noted"


def test_calls_spread_over_replicas_by_outstanding_rows(world: World) -> None:
    servers = [world.server(name) for name in "abc"]
    dispatcher = world.dispatcher()
    for server in servers:
        server.gate.clear()
    scattered = send(dispatcher, [call(rows=5), call(rows=1), call(rows=1), call(rows=1), call(rows=1)])
    assert sorted(r.outstanding_rows for r in dispatcher.table.replicas()) == [2, 2, 5]
    for server in servers:
        server.gate.set()
    scattered.gather()
    assert idle(dispatcher)
    assert sorted(server.calls for server in servers) == [1, 2, 2]
    assert dispatcher.counters.retries == 0


def test_a_replica_that_dies_in_the_middle_of_a_call(world: World) -> None:
    dying, other = world.server("a"), world.server("b")
    dispatcher = world.dispatcher()
    dying.gate.clear()
    asked = call()
    scattered = send(dispatcher, [asked, call()])
    assert dying.entered.acquire(timeout=10)
    world.found.remove(dying)
    killer = threading.Thread(target=dying.die)
    killer.start()
    rows = scattered.gather()
    dying.gate.set()
    killer.join()
    assert [torch.equal(got, expected(asked)) for got in rows] == [True, True]
    assert (dying.calls, other.calls) == (1, 2)
    assert dispatcher.counters.retries == 1
    eventually(lambda: [r.info.replica_id for r in dispatcher.table.replicas()] == ["b"])
    assert idle(dispatcher)


def test_without_a_replica_the_call_waits_for_one(world: World) -> None:
    dispatcher = world.dispatcher()
    assert dispatcher.missing() == [EXPERT]
    scattered = send(dispatcher, [call()])
    timer = threading.Timer(0.3, lambda: world.server("late"))
    timer.start()
    started = time.monotonic()
    (rows,) = scattered.gather()
    timer.join()
    assert torch.equal(rows, expected(call()))
    assert 0.2 < time.monotonic() - started < 10
    assert dispatcher.missing() == []


def test_the_deadline_names_expert_and_layer(world: World) -> None:
    dispatcher = world.dispatcher(deadline_s=0.2)
    started = time.monotonic()
    with pytest.raises(ExpertUnavailable, match=r"expert 3 \(layer 0\).*no live replica within 0.2 s"):
        send(dispatcher, [call()]).gather()
    assert 0.15 < time.monotonic() - started < 5


def test_a_replica_that_answers_with_an_error_and_another_that_does_not(world: World) -> None:
    failing, fine = world.server("a", error=ExpertFailed("out of memory")), world.server("b")
    dispatcher = world.dispatcher()
    for _ in range(4):
        (rows,) = send(dispatcher, [call()]).gather()
        assert torch.equal(rows, expected(call()))
    assert failing.calls > 0
    assert fine.calls == 4
    assert dispatcher.counters.retries == failing.calls
    assert idle(dispatcher)
    assert not any(replica.link.broken for replica in dispatcher.table.replicas()), (
        "an answered error is no reason to hang up"
    )


def test_all_replicas_answer_with_errors(world: World) -> None:
    world.server("a", error=ExpertFailed("out of memory"))
    world.server("b", error=CallRefused("layer 0 expert 3 is not held"))
    dispatcher = world.dispatcher()
    started = time.monotonic()
    with pytest.raises(ExpertUnavailable) as caught:
        send(dispatcher, [call()]).gather()
    message = str(caught.value)
    for part in ("expert 3 (layer 0)", "out of memory", "is not held", "replica a", "replica b"):
        assert part in message
    assert time.monotonic() - started < 5, "waiting changes nothing here"
    assert idle(dispatcher)


def test_a_call_is_tried_at_most_so_often(world: World) -> None:
    servers = [world.server(f"r{i}", error=ExpertFailed("no")) for i in range(5)]
    with pytest.raises(ExpertUnavailable):
        send(world.dispatcher(), [call()]).gather()
    assert sum(server.calls for server in servers) == DispatchOptions().max_attempts


def test_a_replica_that_hangs_is_given_up_after_the_call_timeout(world: World) -> None:
    hanging, other = world.server("a"), world.server("b")
    dispatcher = world.dispatcher(call_timeout_s=0.3)
    hanging.gate.clear()
    rows = send(dispatcher, [call(), call()]).gather()
    assert all(torch.equal(got, expected(call())) for got in rows)
    assert other.calls == 2
    hanging.gate.set()


def test_outstanding_rows_return_to_zero_when_calls_are_abandoned(world: World) -> None:
    servers = [world.server(name) for name in "ab"]
    dispatcher = world.dispatcher()
    for server in servers:
        server.gate.clear()
    scattered = send(dispatcher, [call(rows=n) for n in (1, 2, 3)])
    assert not idle(dispatcher)
    scattered.abandon()
    scattered.abandon()
    assert idle(dispatcher)
    for server in servers:
        server.gate.set()
    assert torch.equal(send(dispatcher, [call(rows=4)]).gather()[0], expected(call(rows=4))), (
        "late replies mix nothing up"
    )
    assert idle(dispatcher)


def test_outstanding_rows_return_to_zero_when_gathering_fails(world: World) -> None:
    world.server("a", keys=frozenset({KEY, (0, 1)}))
    dispatcher = world.dispatcher(deadline_s=0.1)
    scattered = send(dispatcher, [call(expert=1), call(expert=7), call(rows=5)])
    with pytest.raises(ExpertUnavailable, match="expert 7"):
        scattered.gather()
    scattered.abandon()
    assert idle(dispatcher)


def test_a_call_that_cannot_be_sent_leaves_nothing_outstanding(world: World) -> None:
    world.server("a")
    dispatcher = world.dispatcher()
    bad = replace(call(), rows=call().rows.int())
    with pytest.raises(InvalidCall, match="rows"):
        send(dispatcher, [call(rows=5), bad])
    assert idle(dispatcher)


def test_while_discovery_is_away_what_is_known_stays(world: World) -> None:
    server = world.server("a")
    dispatcher = world.dispatcher()
    world.away = True
    time.sleep(0.2)
    assert torch.equal(send(dispatcher, [call()]).gather()[0], expected(call()))
    # and a link that breaks meanwhile is opened again to where the replica was last seen
    dispatcher.table.replicas()[0].link.close()
    assert torch.equal(send(dispatcher, [call()]).gather()[0], expected(call()))
    assert server.calls == 2
    assert dispatcher.missing() == []


def test_a_retiring_replica_gets_no_calls_and_is_closed_when_idle(world: World) -> None:
    old, new = world.server("old"), world.server("new")
    dispatcher = world.dispatcher(start=False)
    (table,) = world.tables
    by_name = {r.info.replica_id: r for r in dispatcher.table.replicas()}
    old.gate.clear()
    new.gate.clear()
    scattered = send(dispatcher, [call(), call()])
    assert by_name["old"].outstanding_rows == 2
    world.found.remove(old)
    table.refresh()
    assert by_name["old"].retiring
    assert [r.info.replica_id for r in dispatcher.table.replicas()] == ["new"]
    assert not by_name["old"].link.broken, "it still owes an answer"
    new.gate.set()
    send(dispatcher, [call(), call()]).gather()
    assert old.calls <= 1
    old.gate.set()
    assert len(scattered.gather()) == 2
    assert not by_name["old"].link.broken
    table.refresh()
    assert by_name["old"].link.broken
    assert idle(dispatcher)


def test_what_nobody_else_holds_yet_a_retiring_replica_computes(world: World) -> None:
    """Its successor runs and still loads: to let the old one go at once would leave a layer without anybody."""
    second = (KEY[0], KEY[1] + 1)
    old = world.server("old", keys=frozenset({KEY, second}))
    dispatcher = world.dispatcher(start=False)
    (table,) = world.tables
    world.found.remove(old)
    new = world.server("new")
    for _ in range(2):  # also once it has been retiring for a while
        table.refresh()
        assert [r.replica_id for r in table.by_key[KEY]] == ["new"]
        assert [r.replica_id for r in table.by_key[second]] == ["old"]
    asked = call(expert=second[1])
    assert torch.equal(send(dispatcher, [asked]).gather()[0], expected(asked))
    assert (old.calls, new.calls) == (1, 0)
    new.keys = frozenset({KEY, second})
    table.refresh()
    table.refresh()
    assert [r.replica_id for r in table.by_key[second]] == ["new"]
    assert {r.replica_id for r in dispatcher.table.replicas()} == {"new"}
    assert sum(not link.broken for link in world.links) == 1


def test_a_retiring_replica_that_is_gone_is_not_relied_on(world: World) -> None:
    """Nobody calls it, so only a look at its link tells that it has died, and health must not say that all is well."""
    server = world.server("a")
    dispatcher = world.dispatcher(start=False)
    (table,) = world.tables
    world.found.remove(server)
    table.refresh()
    assert dispatcher.missing() == []
    server.die()
    deadline = time.monotonic() + 5
    while not dispatcher.missing():
        assert time.monotonic() < deadline
        table.refresh()
    assert dispatcher.missing() == [EXPERT]


def test_to_watch_who_is_there_may_fail(world: World) -> None:
    """The thread that renews links lives on, whatever the handles' insides say."""
    world.server("a")

    def members() -> object:
        raise AttributeError("another Ray")

    table = ReplicaTable(world.discover, world.connect, frozenset({KEY}), 0.1, members)
    world.tables.append(table)
    table.start()
    for count in (1, 2):
        if count > 1:
            world.server("b")
        deadline = time.monotonic() + 5
        while len(table.by_key.get(KEY, ())) < count:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_replica_that_is_found_again_is_not_retired(world: World) -> None:
    server = world.server("a")
    dispatcher = world.dispatcher(start=False)
    (table,) = world.tables
    (replica,) = dispatcher.table.replicas()
    server.gate.clear()
    scattered = send(dispatcher, [call()])
    world.found.remove(server)
    table.refresh()
    assert replica.retiring
    world.found.append(server)
    table.refresh()
    assert dispatcher.table.replicas() == [replica]
    assert not replica.retiring
    server.gate.set()
    scattered.gather()
    assert not replica.link.broken


def test_a_replica_that_restarts_under_its_name_at_another_address(world: World) -> None:
    server = world.server("a")
    dispatcher = world.dispatcher()
    send(dispatcher, [call()]).gather()
    server.server.close()
    server.listen()
    assert torch.equal(send(dispatcher, [call()]).gather()[0], expected(call()))
    eventually(
        lambda: [r.info.addresses[world.carrier] for r in dispatcher.table.replicas()] == [server.server.address]
    )


def test_a_new_address_counts_even_while_the_old_one_still_answers(world: World) -> None:
    server = world.server("a")
    dispatcher = world.dispatcher(start=False)
    (table,) = world.tables
    (old,) = dispatcher.table.replicas()
    left_behind = server.server
    server.listen()
    table.refresh()
    (new,) = dispatcher.table.replicas()
    assert old.link.broken
    assert new.info.addresses == {world.carrier: server.server.address}
    assert torch.equal(send(dispatcher, [call()]).gather()[0], expected(call()))
    left_behind.close()


def test_a_replica_that_comes_to_hold_more_is_used_for_it(world: World) -> None:
    server = world.server("a", keys=frozenset({(1, 3)}))
    dispatcher = world.dispatcher(start=False)
    (table,) = world.tables
    assert dispatcher.missing() == [EXPERT]
    links = len(world.links)
    server.keys = frozenset({(1, 3), KEY})
    table.refresh()
    assert dispatcher.missing() == []
    assert torch.equal(send(dispatcher, [call()]).gather()[0], expected(call()))
    assert len(world.links) == links, "no reason to connect anew"


def test_one_replica_that_cannot_be_linked_does_not_hide_the_others(world: World) -> None:
    def connect(info: ReplicaInfo) -> Link:
        if info.replica_id == "a":
            raise ConfigError("expert replica a offers ray, and this process may use grpc")
        return world.connect(info)

    for name in "abc":
        world.server(name)
    table = ReplicaTable(world.discover, connect, frozenset({KEY}))
    world.tables.append(table)
    table.refresh()
    assert [r.info.replica_id for r in table.replicas()] == ["b", "c"]


def test_a_dead_address_is_not_knocked_at_in_a_loop(world: World) -> None:
    world.server("a").die()
    attempts = []

    def connect(info: ReplicaInfo) -> Link:
        attempts.append(time.monotonic())
        return world.connect(info)

    table = ReplicaTable(world.discover, connect, frozenset({KEY}))
    world.tables.append(table)
    end = time.monotonic() + 0.6
    while time.monotonic() < end:
        table.refresh()
    assert 1 <= len(attempts) <= 3
    assert table.missing() == [EXPERT]


def test_close_ends_the_thread_and_every_wait(world: World) -> None:
    table = world.table()
    waiting = threading.Thread(target=lambda: table.wait_change(table.version, 30))
    waiting.start()
    table.close()
    waiting.join(timeout=5)
    assert not waiting.is_alive()
    assert not [t for t in threading.enumerate() if t.name == "replica-table"]


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
    dispatcher = world.dispatcher()
    for _ in range(20):
        layer, wanted = routed()
        pending = dispatcher.submit(0, layer)
        assert torch.equal(pending.gather().rows, wanted)
        pending.abandon()
    assert idle(dispatcher)
    assert sum(server.calls for server in servers) == 40
    assert {replica.load.queued_rows for replica in dispatcher.table.replicas()} == {server.calls for server in servers}
    assert dispatcher.counters.retries == 0


@pytest.mark.parametrize("fault", ["fails", "refuses", "nan", "dies", "late"])
def test_a_layer_survives_a_replica(world: World, fault: str) -> None:
    """The replica that is chosen first spoils its part; the other has to do all."""
    bad = world.server("a", keys=TWO)
    dispatcher = world.dispatcher(call_timeout_s=0.3 if fault == "late" else 10.0)
    world.server("b", keys=TWO)
    eventually(lambda: len(dispatcher.table.replicas()) == 2)
    if fault == "nan":
        good = bad.handle
        world.found.remove(bad)
        bad.server.close()
        bad.handle = lambda asked: spoil(good(asked))  # type: ignore[method-assign]
        bad.listen()
        bad.name = "a2"
        world.found.insert(0, bad)
        eventually(lambda: {r.info.replica_id for r in dispatcher.table.replicas()} == {"a2", "b"})
    bad.error = {"fails": ExpertFailed("no"), "refuses": CallRefused("no")}.get(fault)
    if fault in ("dies", "late"):
        bad.gate.clear()
    layer, wanted = routed()
    for replica in dispatcher.table.replicas():
        replica.calls += 10 * (replica.info.replica_id == "b")  # so that the bad one is chosen first
    pending = dispatcher.submit(0, layer)
    if fault == "dies":
        assert bad.entered.acquire(timeout=10)
        bad.die()
    assert torch.equal(pending.gather().rows, wanted)
    assert dispatcher.counters.retries >= 1
    assert idle(dispatcher)
    bad.gate.set()


def test_a_layer_that_is_given_up_leaves_nothing_behind(world: World) -> None:
    server = world.server("a", keys=TWO)
    dispatcher = world.dispatcher()
    server.gate.clear()
    layer, _ = routed()
    pending = dispatcher.submit(0, layer)
    assert sum(replica.outstanding_rows for replica in dispatcher.table.replicas()) == 5
    pending.abandon()
    pending.abandon()
    assert idle(dispatcher)
    server.gate.set()
    layer, wanted = routed()
    assert torch.equal(dispatcher.submit(0, layer).gather().rows, wanted)


def test_a_layer_without_an_expert_waits_and_says_who_is_missing(world: World) -> None:
    world.server("a", keys=frozenset({(0, 3)}))
    dispatcher = world.dispatcher(deadline_s=0.3)
    with pytest.raises(ExpertUnavailable, match="expert 6"):
        dispatcher.submit(0, routed()[0]).gather()
    assert idle(dispatcher)


def warm(dispatcher: ExpertDispatcher) -> None:
    """Let the dispatcher learn how long calls take here."""
    for _ in range(80):
        layer, wanted = routed()
        assert torch.equal(dispatcher.submit(0, layer).gather().rows, wanted)


def test_a_late_call_is_sent_to_another_replica_too(world: World) -> None:
    servers = [world.server(name, keys=TWO) for name in "ab"]
    dispatcher = world.dispatcher()
    warm(dispatcher)
    for replica in dispatcher.table.replicas():
        replica.slowdown = SlowdownEstimate()  # what a busy machine taught it is not what is shown here
    stalling = servers[0]
    stalling.gate.clear()
    started = time.monotonic()
    hedged = dispatcher.counters.hedges
    asked = 0
    while asked < 6 or not dispatcher.counters.hedge_wins:  # a busy machine may ask the other one for a while
        asked += 1
        layer, wanted = routed()
        assert torch.equal(dispatcher.submit(0, layer).gather().rows, wanted)
        assert time.monotonic() - started < 10, "the stall lasts until the gate opens"
    assert dispatcher.counters.hedges - hedged <= asked
    assert dispatcher.counters.cancelled == dispatcher.counters.hedges, (
        "of two calls one is taken back, whichever was first"
    )
    assert idle(dispatcher)
    stalling.gate.set()
    for _ in range(20):
        layer, wanted = routed()
        assert torch.equal(dispatcher.submit(0, layer).gather().rows, wanted), (
            "answers that came too late mix nothing up"
        )
    assert idle(dispatcher)
    assert dispatcher.counters.retries == 0
    assert not any(replica.link.broken for replica in dispatcher.table.replicas())


def test_hedging_can_be_turned_off_and_keeps_to_its_budget(world: World) -> None:
    servers = [world.server(name, keys=TWO) for name in "ab"]
    patient = world.dispatcher(hedge=False, call_timeout_s=0.3)
    warm(patient)
    servers[0].gate.clear()
    for _ in range(3):
        layer, wanted = routed()
        assert torch.equal(patient.submit(0, layer).gather().rows, wanted)
    assert patient.counters.hedges == 0
    servers[0].gate.set()
    for server in servers:
        server.delay_s = 0.004
    eager = world.dispatcher()
    eager.hedging.least_s, eager.hedging.factor = 0.0, 0.0  # every call is late
    for _ in range(200):
        layer, wanted = routed()
        assert torch.equal(eager.submit(0, layer).gather().rows, wanted)
    assert 0 < eager.counters.hedges <= 4 + 0.02 * eager.counters.calls
    assert idle(eager)


def test_a_large_batch_is_shared(world: World) -> None:
    servers = [world.server(name) for name in "abc"]
    dispatcher = world.dispatcher()
    rows, weights = torch.randn(1000, WIDTH), torch.rand(1000)
    layer = Routed(rows, weights, [0, 0, 0, 1000], torch.arange(1000).view(-1, 1))
    assert torch.equal(dispatcher.submit(0, layer).gather().rows, rows * weights[:, None])
    assert [server.calls for server in servers] == [1, 1, 1]
    assert dispatcher.counters.splits == 1
    alone = world.dispatcher(split=False)
    assert torch.equal(alone.submit(0, layer).gather().rows, rows * weights[:, None])
    assert sum(server.calls for server in servers) == 4


def test_a_replica_whose_answers_cannot_be_used_is_quarantined(world: World) -> None:
    bad, good = world.server("a"), world.server("b")
    bad.spoil = True
    dispatcher = world.dispatcher()
    for _ in range(20):
        (rows,) = send(dispatcher, [call()]).gather()
        assert torch.equal(rows, expected(call()))
    assert bad.calls == 1
    assert good.calls == 20
    assert dispatcher.counters.quarantines == 1
    good.die()
    bad.spoil = False
    (rows,) = send(dispatcher, [call()]).gather()
    assert torch.equal(rows, expected(call())), "better than nobody"


@pytest.mark.parametrize("error", [ExpertFailed("no memory"), CallRefused("not held")], ids=["failed", "refused"])
def test_an_error_that_is_answered_quarantines_nothing(world: World, error: TransportError) -> None:
    world.server("a", error=error)
    world.server("b")
    dispatcher = world.dispatcher()
    for _ in range(4):
        (rows,) = send(dispatcher, [call()]).gather()
        assert torch.equal(rows, expected(call()))
    assert dispatcher.counters.quarantines == 0


def test_a_busy_replica_is_asked_again(world: World) -> None:
    server = world.server("a", error=ReplicaBusy("64 rows are queued"))
    dispatcher = world.dispatcher()
    timer = threading.Timer(0.2, lambda: setattr(server, "error", None))
    timer.start()
    (rows,) = send(dispatcher, [call()]).gather()
    timer.join()
    assert torch.equal(rows, expected(call()))
    assert 2 < server.calls < 40, "again, but not in a tight loop"
    assert dispatcher.counters.quarantines == 0
    assert idle(dispatcher)


def test_a_replica_that_stays_busy_ends_the_call_at_its_deadline(world: World) -> None:
    world.server("a", error=ReplicaBusy("64 rows are queued"))
    dispatcher = world.dispatcher(deadline_s=0.3)
    with pytest.raises(ExpertUnavailable, match=r"no answer within 0.3 s.*64 rows are queued"):
        send(dispatcher, [call()]).gather()
    assert idle(dispatcher)


THREE = (2, 3, 6)


def three_experts(width: int = WIDTH) -> tuple[Routed, torch.Tensor]:
    """Four tokens with two of three experts each, and the tokens' experts' weights [T, E]."""
    chosen = torch.tensor([[2, 3], [3, 6], [2, 6], [3, 6]])
    weights = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.5, 0.5], [0.9, 0.1]])
    return group(torch.randn(4, width), chosen, weights, 8), weights


def test_renormalise_goes_on_with_the_other_experts_and_says_so(world: World) -> None:
    world.server("a", keys=frozenset({(0, 2), (0, 6)}))  # nobody has expert 3
    dispatcher = world.dispatcher(on_loss="renormalise")
    layer, _ = three_experts()
    gathered = dispatcher.submit(0, layer).gather()
    assert gathered.degraded is not None
    assert gathered.degraded.tolist() == [True, True, False, True]
    inputs = torch.empty(4, WIDTH)
    inputs[torch.arange(4)] = layer.rows[layer.row_of[:, 0]]
    # An expert here returns its rows times their weights: with weights that sum to 1, the sum is the rows themselves.
    torch.testing.assert_close(combine(gathered.rows, layer.row_of), inputs)
    assert idle(dispatcher)
    assert dispatcher.counters.retries == 0


def test_a_token_that_lost_all_its_experts_gets_nothing(world: World) -> None:
    world.server("a", keys=frozenset({(0, 2)}))
    layer, _ = three_experts()
    gathered = world.dispatcher(on_loss="renormalise").submit(0, layer).gather()
    out = combine(gathered.rows, layer.row_of)
    assert gathered.degraded is not None
    assert gathered.degraded.all()
    assert out[1].eq(0).all()
    assert out[3].eq(0).all()
    assert out[0].ne(0).any()


def test_fail_does_not_wait(world: World) -> None:
    world.server("a", keys=frozenset({(0, 2), (0, 6)}))
    dispatcher = world.dispatcher(on_loss="fail", deadline_s=30.0)
    started = time.monotonic()
    with pytest.raises(ExpertUnavailable, match=r"expert 3 \(layer 0\) is unavailable: no live replica"):
        dispatcher.submit(0, three_experts()[0]).gather()
    assert time.monotonic() - started < 5
    assert idle(dispatcher)


def test_nothing_is_degraded_while_all_are_there(world: World) -> None:
    world.server("a", keys=frozenset((0, e) for e in THREE))
    gathered = world.dispatcher(on_loss="renormalise").submit(0, three_experts()[0]).gather()
    assert gathered.degraded is None
