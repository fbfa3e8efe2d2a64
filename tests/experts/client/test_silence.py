"""A machine that is cut off swallows packets and refuses nothing: the dispatcher must notice by itself. Real TCP."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from moe_ray.bench.lab.hosts import Hosts, check_machine, hosts
from moe_ray.config import load_config
from moe_ray.core import ExpertCall, ExpertReply, ReplicaInfo
from moe_ray.errors import ConfigError
from moe_ray.experts.client.dispatcher import ExpertDispatcher
from moe_ray.experts.client.options import DispatchOptions
from moe_ray.experts.client.replica_table import ReplicaTable
from moe_ray.model.moe import Routed
from moe_ray.transport import connect
from moe_ray.transport.base import ExpertHandler, LinkOptions
from moe_ray.transport.socket import SocketExpertServer

pytestmark = pytest.mark.slow
CACHE = load_config().cache_dir
EXPERTS, WIDTH = 4, 8
KEYS = frozenset((0, expert) for expert in range(EXPERTS))
try:
    check_machine()
except ConfigError as error:
    pytest.skip(str(error), allow_module_level=True)


def handle(call: ExpertCall) -> ExpertReply:
    time.sleep(0.001)
    return ExpertReply(call.call_id, call.rows * call.weights[:, None])


@pytest.fixture
def three() -> Iterator[Hosts]:
    with hosts(3, CACHE) as made:
        yield made


def serve(on: Hosts, number: int, expert: int, handler: ExpertHandler) -> tuple[SocketExpertServer, ReplicaInfo]:
    with on[number].inside():
        server = SocketExpertServer(handler, on[number].address)
    name, where = f"Expert{expert}-{server.address}", {"socket": server.address}
    return server, ReplicaInfo(name, on[number].name, 1, frozenset({(0, expert)}), WIDTH, "float32", where)


@pytest.mark.parametrize(("native", "hedge"), [(True, True), (False, False)])
def test_a_machine_that_falls_silent_costs_seconds_and_comes_back(three: Hosts, native: bool, hedge: bool) -> None:
    """Every expert has two replicas on one machine and one on another; the call timeout of 30 s must play no part."""
    made = [serve(three, number, expert, handle) for number in (1, 1, 2) for expert in range(EXPERTS)]
    servers, infos = [server for server, _ in made], [info for _, info in made]
    options = LinkOptions(native_dir=CACHE if native else None, connect_timeout_s=2.0)
    rows, weights = torch.randn(8, WIDTH), torch.rand(8)
    layer = Routed(rows, weights, [2] * EXPERTS, torch.arange(8).view(-1, 2))

    def longest(seconds: float) -> float:
        took, end = 0.0, time.monotonic() + seconds
        while time.monotonic() < end:
            began = time.monotonic()
            assert torch.equal(dispatcher.submit(0, layer).gather().rows, rows * weights[:, None])
            took = max(took, time.monotonic() - began)
        return took

    with three[0].inside():
        table = ReplicaTable(lambda: infos, lambda info: connect("socket", info, options), KEYS, 0.5)
        table.refresh()
        table.start()
        dispatcher = ExpertDispatcher(table, DispatchOptions(node_id=three[0].name, hedge=hedge))
        longest(1.0)
        assert len(dispatcher.table.replicas()) == 3 * EXPERTS
        three.switch.cut(1)
        assert longest(8.0) < 5.0, "one machine's silence is noticed once, not once for each of its replicas"
        three.switch.heal(1)
        deadline = time.monotonic() + 15
        while len(dispatcher.table.replicas()) < 3 * EXPERTS and time.monotonic() < deadline:
            longest(0.2)
        assert len(dispatcher.table.replicas()) == 3 * EXPERTS
        dispatcher.close()
    for server in servers:
        server.close()


@pytest.mark.parametrize("native", [True, False])
def test_a_machine_that_took_a_call_and_went_away(three: Hosts, native: bool) -> None:
    """What it was sent it has acknowledged: nothing is owed that would show its silence."""
    began, gate = threading.Event(), threading.Event()

    def blocks(call: ExpertCall) -> ExpertReply:
        began.set()
        gate.wait(60)
        return handle(call)

    made = [serve(three, 1, 0, blocks), serve(three, 2, 0, handle)]
    infos = [made[0][1]]
    options = LinkOptions(native_dir=CACHE if native else None, connect_timeout_s=2.0)
    rows, weights = torch.randn(2, WIDTH), torch.rand(2)
    with three[0].inside():
        table = ReplicaTable(lambda: infos, lambda info: connect("socket", info, options), frozenset({(0, 0)}), 0.2)
        table.refresh()
        table.start()
        dispatcher = ExpertDispatcher(table, DispatchOptions(node_id=three[0].name))
        pending = dispatcher.submit(0, Routed(rows, weights, [2], torch.arange(2).view(-1, 1)))
        assert began.wait(10)
        time.sleep(0.3)  # its acknowledgement has come
        three.switch.cut(1)
        infos.append(made[1][1])
        started = time.monotonic()
        assert torch.equal(pending.gather().rows, rows * weights[:, None])
        assert time.monotonic() - started < 6.0
        dispatcher.close()
    gate.set()
    for server, _ in made:
        server.close()
