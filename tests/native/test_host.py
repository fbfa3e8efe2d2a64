"""Experts served without the interpreter: the carrier's own server around the native host, from several trunks."""

from __future__ import annotations

import collections
import itertools
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from moe_ray.config import load_config
from moe_ray.core import ExpertCall, ReplicaInfo
from moe_ray.errors import CallRefused, KernelsUnavailable, LinkBroken
from moe_ray.experts.server.load_counters import KeyLoad
from moe_ray.experts.server.worker import ExpertWorker
from moe_ray.model.compute.numerics import Numerics
from moe_ray.model.expert import ExpertFFN, NativeFFN
from moe_ray.native.kernels import Kernels
from moe_ray.transport import connect
from moe_ray.transport.base import Link, LinkOptions
from moe_ray.transport.handshake import connect as shake_hands
from moe_ray.transport.socket import SocketExpertServer

WIDTH, INNER, LAYERS, EXPERT = 64, 96, 3, 5
CACHE = load_config().cache_dir
OPTIONS = LinkOptions(token="t")
try:
    KERNELS = Kernels(CACHE, 1)
except KernelsUnavailable as error:
    pytest.skip(str(error), allow_module_level=True)


def matrix(*shape: int, seed: int) -> np.ndarray:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.2
    return values.bfloat16().view(torch.int16).numpy()


@pytest.fixture(scope="module")
def worker() -> ExpertWorker:
    ffns = {
        (layer, EXPERT): NativeFFN(
            *(matrix(INNER, WIDTH, seed=3 * layer), matrix(INNER, WIDTH, seed=3 * layer + 1)),
            *(matrix(WIDTH, INNER, seed=3 * layer + 2), KERNELS),
        )
        for layer in range(LAYERS)
    }
    return ExpertWorker(ExpertFFN(ffns), WIDTH, Numerics("bfloat16", "cpu"))


@pytest.fixture(scope="module")
def address(worker: ExpertWorker) -> Iterator[str]:
    assert worker.native is not None
    server = SocketExpertServer(worker.forward, options=OPTIONS, native=worker.native)
    yield server.address
    server.close()


def link_to(address: str, native: bool = True) -> Link:
    info = ReplicaInfo("Expert5#0", "n", 1, frozenset(), WIDTH, "bfloat16", {"socket": address})
    return connect("socket", info, LinkOptions(token="t", native_dir=CACHE if native else None))


def call(layer: int, rows: int, seed: int = 0, width: int = WIDTH, dtype: torch.dtype = torch.bfloat16) -> ExpertCall:
    generator = torch.Generator().manual_seed(1000 * layer + rows + seed)
    return ExpertCall(
        layer, EXPERT, torch.randn(rows, width, generator=generator).to(dtype), torch.rand(rows, generator=generator)
    )


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("way", ["unix", "tcp"])
def test_replies_are_those_of_the_worker(worker: ExpertWorker, address: str, native: bool, way: str) -> None:
    link = link_to(address if way == "unix" else address.split(",")[0] + ",", native)
    before = worker.stats()
    for layer, rows in [(0, 1), (1, 7), (2, 300), (0, 4000)]:
        asked = call(layer, rows)
        reply = link.send(asked).result(20)
        assert torch.equal(reply.rows, worker.forward(asked).rows)
    after = worker.stats()
    assert after.calls - before.calls == 8, "those that came by socket and those asked of the worker itself"
    assert after.rows - before.rows == 2 * 4308
    assert after.busy_s > before.busy_s
    assert after.queued_rows == 0
    link.close()


def test_each_layer_is_counted_for_itself(worker: ExpertWorker, address: str) -> None:
    assert worker.native is not None
    before, totals = worker.key_loads(), worker.stats()
    sent: collections.Counter[int] = collections.Counter()

    plans = [[((number + turn) % LAYERS, 1 + turn % 5) for turn in range(30)] for number in range(4)]
    for layer, rows in itertools.chain(*plans):
        sent[layer] += rows

    def trunk(plan: list[tuple[int, int]]) -> int:
        link = link_to(address)
        waits = [link.send(call(*one)).result(20).load.queue_us for one in plan]
        link.close()
        return sum(waits)

    with ThreadPoolExecutor(4) as pool:
        waits = list(pool.map(trunk, plans))
    worker.forward(call(1, 7))  # not by socket: counted with the others
    sent[1] += 7
    after, now = worker.key_loads(), worker.stats()
    assert {layer: after[layer, EXPERT].rows - before[layer, EXPERT].rows for layer in range(LAYERS)} == sent
    assert [after[layer, EXPERT].calls - before[layer, EXPERT].calls for layer in range(LAYERS)] == [40, 41, 40]
    assert all(after[key].busy_s > before[key].busy_s for key in before)
    queue_s, total = now.queue_s - totals.queue_s, sum(after.values(), KeyLoad())
    assert queue_s == pytest.approx(sum(waits) / 1e6, abs=121 * 1e-6), "the sum of what the replies said, in whole us"
    assert (total.calls, total.rows) == (now.calls, now.rows)
    assert (total.busy_s, total.queue_s) == pytest.approx((now.busy_s, now.queue_s))
    assert len(worker.native.key_stats()) == LAYERS


def test_several_trunks_at_once(worker: ExpertWorker, address: str) -> None:
    asked = [call(i % LAYERS, 1 + i % 40, seed=i) for i in range(60)]
    wanted = [worker.forward(one).rows for one in asked]
    before = worker.stats()

    def trunk(number: int) -> None:
        link = link_to(address)
        for turn in range(40):
            picked = [(7 * number + turn + k) % len(asked) for k in range(3)]
            pending = [link.send(ExpertCall(asked[i].layer, EXPERT, asked[i].rows, asked[i].weights)) for i in picked]
            for i, reply in zip(picked, pending, strict=True):
                assert torch.equal(reply.result(20).rows, wanted[i])
        link.close()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(trunk, range(6)))
    after = worker.stats()
    assert after.calls - before.calls == 6 * 40 * 3
    assert after.batches - before.batches <= 6 * 40 * 3
    assert after.queued_rows == 0


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (call(LAYERS, 2), "layer 3 expert 5 is not held by this replica"),
        (call(0, 2, width=WIDTH + 1), "rows have 65 columns, expected 64"),
        (call(0, 2, dtype=torch.float32), "rows are not bfloat16"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_link_lives_on(
    worker: ExpertWorker, address: str, wrong: ExpertCall, says: str
) -> None:
    link = link_to(address)
    right = call(1, 3)
    first, second = link.send(wrong), link.send(right)
    with pytest.raises(CallRefused, match=says):
        first.result(20)
    assert torch.equal(second.result(20).rows, worker.forward(right).rows)
    link.close()


@pytest.fixture
def busy_host(worker: ExpertWorker, address: str) -> Iterator[ExpertWorker]:
    """The worker while other trunks keep its compute thread busy, so that calls queue."""
    ended = threading.Event()

    def trunk() -> None:
        link = link_to(address)
        while not ended.is_set():
            link.send(call(0, 4000)).result(20)
        link.close()

    with ThreadPoolExecutor(2) as pool:
        trunks = [pool.submit(trunk) for _ in range(2)]
        yield worker
        ended.set()
        for running in trunks:
            running.result()
    assert worker.stats().queued_rows == 0


@pytest.mark.parametrize("native", [True, False])
def test_a_call_taken_back_while_it_queues_is_not_computed(busy_host: ExpertWorker, address: str, native: bool) -> None:
    link, key, turns = link_to(address, native), (2, EXPERT), 50
    wanted = busy_host.forward(call(2, 5)).rows
    before, cancelled = busy_host.key_loads()[key], busy_host.stats().cancelled
    for _ in range(turns):
        link.send(call(2, 3)).cancel()
        assert torch.equal(link.send(call(2, 5)).result(20).rows, wanted), "the call behind it"
    skipped = busy_host.stats().cancelled - cancelled
    done = busy_host.key_loads()[key]
    assert skipped > 0
    assert (done.calls - before.calls, done.rows - before.rows) == (2 * turns - skipped, 8 * turns - 3 * skipped)
    link.close()


def test_a_call_of_a_trunk_that_went_away_is_not_computed(busy_host: ExpertWorker, address: str) -> None:
    before = busy_host.stats().cancelled
    for _ in range(100):
        link = link_to(address)
        link.send(call(1, 3))
        link.close()
        if busy_host.stats().cancelled > before:
            return
    raise AssertionError("every call was computed for nobody")


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", struct.pack("<I", 3) + b"\xff\xff\xff", b"\x05"])
def test_garbage_ends_that_connection_alone(worker: ExpertWorker, address: str, garbage: bytes) -> None:
    healthy = link_to(address)
    rude = shake_hands(address, OPTIONS)
    rude.settimeout(20)
    rude.sendall(garbage)
    rude.shutdown(socket.SHUT_WR)
    assert rude.recv(1) == b""
    rude.close()
    asked = call(2, 5)
    assert torch.equal(healthy.send(asked).result(20).rows, worker.forward(asked).rows)
    healthy.close()


def test_closing_the_server_ends_its_threads(worker: ExpertWorker) -> None:
    server = SocketExpertServer(worker.forward, options=OPTIONS, native=worker.native)
    link = link_to(server.address)
    link.send(call(0, 1)).result(20)
    serving = [thread for thread in threading.enumerate() if thread.name == "expert-connection"]
    server.close()
    with pytest.raises(LinkBroken):
        link.send(call(0, 1)).result(20)
    assert link.broken
    newest = max(serving, key=lambda thread: thread.ident or 0)
    newest.join(20)
    assert any(not thread.is_alive() for thread in serving)
