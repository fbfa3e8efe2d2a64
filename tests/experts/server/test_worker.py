"""Calls that wait together: computed as one batch, each answered with its own rows."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moe_ray.config import load_config
from moe_ray.core import AdapterRows, ExpertCall, ExpertReply, ReplicaInfo
from moe_ray.errors import CallRefused, ExpertFailed, ReplicaBusy
from moe_ray.experts.server.load_counters import KeyLoad
from moe_ray.experts.server.worker import MAX_BATCHED_ROWS, ExpertWorker
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.compute.torch.expert import TorchFFN
from moe_ray.model.expert import ExpertFFN
from moe_ray.transport import connect
from moe_ray.transport.base import LinkOptions
from moe_ray.transport.socket import SocketExpertServer

WIDTH = 16


class Gated(TorchFFN):
    """A real expert that computes when it is let, and remembers how many rows came at once."""

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        super().__init__(*(torch.randn(WIDTH, WIDTH, generator=g) for _ in range(3)), "silu")
        self.gate, self.entered = threading.Event(), threading.Event()
        self.batches: list[int] = []
        self.fail: type[Exception] | None = None

    def forward(
        self, rows: torch.Tensor, weights: torch.Tensor, adapters: tuple[AdapterRows, ...] = ()
    ) -> torch.Tensor:
        self.batches.append(len(rows))
        self.entered.set()
        assert self.gate.wait(20)
        if self.fail is not None:
            raise self.fail("the device fell off")
        return super().forward(rows, weights, adapters)


@pytest.fixture
def layers() -> list[Gated]:
    return [Gated(layer) for layer in range(2)]


@pytest.fixture
def worker(layers: list[Gated]) -> ExpertWorker:
    ffn = ExpertFFN({(layer, 5): gated for layer, gated in enumerate(layers)})
    return ExpertWorker(ffn, WIDTH, Compute(Backend("float32")))


def call(layer: int, rows: int, seed: int = 0) -> ExpertCall:
    g = torch.Generator().manual_seed(seed)
    return ExpertCall(layer, 5, torch.randn(rows, WIDTH, generator=g), torch.rand(rows, generator=g), seed)


def queue_up(worker: ExpertWorker, layers: list[Gated], pool: ThreadPoolExecutor, calls: list[ExpertCall]) -> list:
    """The first call is being computed; the others wait behind it."""
    futures = [pool.submit(worker.forward, calls[0])]
    assert layers[calls[0].layer].entered.wait(20)
    rows = calls[0].rows.shape[0]
    for one in calls[1:]:
        futures.append(pool.submit(worker.forward, one))
        rows += one.rows.shape[0]
        deadline = time.monotonic() + 20
        while worker.stats().queued_rows < rows:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    return futures


def let_go(layers: list[Gated], futures: list) -> list[ExpertReply]:
    """Let all compute; what came of it."""
    for layer in layers:
        layer.gate.set()
    return [future.result(20) for future in futures]


def test_waiting_calls_of_a_layer_are_one_batch(worker: ExpertWorker, layers: list[Gated]) -> None:
    calls = [call(0, 3, 1), call(1, 2, 2), call(0, 4, 3), call(1, 5, 4), call(1, 1, 5), call(0, 1, 6)]
    with ThreadPoolExecutor(len(calls)) as pool:
        replies = let_go(layers, queue_up(worker, layers, pool, calls))
    assert layers[0].batches == [3, 5]
    assert layers[1].batches == [8]
    for one, reply in zip(calls, replies, strict=True):
        alone = TorchFFN.forward(layers[one.layer], one.rows, one.weights)
        torch.testing.assert_close(reply.rows, alone, rtol=1e-5, atol=1e-4)  # sums in an order of the CPU's own
        assert reply.call_id == one.call_id
        assert reply.load.compute_us >= 0
    stats = worker.stats()
    assert (stats.calls, stats.batches, stats.rows, stats.queued_rows) == (6, 3, 16, 0)


def test_each_layer_is_counted_for_itself(worker: ExpertWorker, layers: list[Gated]) -> None:
    assert worker.key_loads() == {(0, 5): KeyLoad(), (1, 5): KeyLoad()}
    calls, held_s = [call(0, 3, 1), call(1, 2, 2), call(1, 5, 3), call(0, 4, 4)], 0.05
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = queue_up(worker, layers, pool, calls)
        layers[1].gate.set()
        time.sleep(held_s)
        layers[0].gate.set()
        replies = [future.result(20) for future in futures]
    loads, stats = worker.key_loads(), worker.stats()
    assert {key: (load.calls, load.rows) for key, load in loads.items()} == {(0, 5): (2, 7), (1, 5): (2, 7)}
    assert loads[0, 5].busy_s >= held_s
    assert loads[1, 5].queue_s >= 2 * held_s, "both of its calls waited for the other layer's"
    for layer, load in ((0, loads[0, 5]), (1, loads[1, 5])):
        waits = [r.load.queue_us for one, r in zip(calls, replies, strict=True) if one.layer == layer]
        assert load.queue_s == pytest.approx(sum(waits) / 1e6, abs=1e-5)
    total = sum(loads.values(), KeyLoad())
    assert (total.calls, total.rows) == (stats.calls, stats.rows) == (4, 14)
    assert (total.busy_s, total.queue_s) == (stats.busy_s, stats.queue_s)


def test_a_batch_has_a_limit(worker: ExpertWorker, layers: list[Gated]) -> None:
    calls = [call(0, 1), call(1, MAX_BATCHED_ROWS), call(1, 1)]
    with ThreadPoolExecutor(len(calls)) as pool:
        let_go(layers, queue_up(worker, layers, pool, calls))
    assert sorted(layers[1].batches) == [1, MAX_BATCHED_ROWS]


def test_a_failure_reaches_every_call_of_the_batch_and_no_other(worker: ExpertWorker, layers: list[Gated]) -> None:
    layers[1].fail = RuntimeError
    calls = [call(0, 1), call(1, 2), call(1, 3), call(0, 2)]
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = queue_up(worker, layers, pool, calls)
        for layer in layers:
            layer.gate.set()
        for one, future in zip(calls, futures, strict=True):
            if one.layer == 1:
                with pytest.raises(ExpertFailed, match="fell off"):
                    future.result(20)
            else:
                assert future.result(20).rows.shape == one.rows.shape
    layers[1].fail = None
    assert worker.forward(call(1, 2)).rows.shape == (2, WIDTH)
    assert worker.stats().queued_rows == 0


def test_an_unforeseen_error_leaves_nobody_waiting(worker: ExpertWorker, layers: list[Gated]) -> None:
    layers[0].fail = TypeError
    calls = [call(0, 1, 1), call(0, 2, 2), call(0, 3, 3), call(1, 4, 4)]
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = queue_up(worker, layers, pool, calls)
        for layer in layers:
            layer.gate.set()
        errors = [future.exception(20) for future in futures]
    assert [type(error) for error in errors] == [TypeError, TypeError, ExpertFailed, type(None)]
    assert worker.stats().queued_rows == 0


def test_turns_come_in_the_order_of_arrival(layers: list[Gated]) -> None:
    """So that experts that several trunks call at once all answer the same trunk first."""
    ffn = ExpertFFN({(layer, 5): gated for layer, gated in enumerate(layers)})
    worker = ExpertWorker(ffn, WIDTH, Compute(Backend("float32")), max_batched_rows=1)  # each call by itself
    layers[0].batches = layers[1].batches
    calls = [call(number % 2, 1 + number, number) for number in range(8)]
    with ThreadPoolExecutor(len(calls)) as pool:
        let_go(layers, queue_up(worker, layers, pool, calls))
    assert layers[0].batches == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_call_that_does_not_fit_is_refused_before_it_waits(worker: ExpertWorker) -> None:
    with pytest.raises(CallRefused, match="not held"):
        worker.forward(ExpertCall(7, 5, torch.zeros(1, WIDTH), torch.ones(1)))
    with pytest.raises(CallRefused, match="shape"):
        worker.forward(ExpertCall(0, 5, torch.zeros(1, WIDTH + 1), torch.ones(1)))
    assert worker.stats().queued_rows == 0


@pytest.mark.parametrize("native_host", [True, False])
def test_a_full_replica_says_that_it_is_busy(layers: list[Gated], native_host: bool) -> None:
    """Over a socket, answered by the native host and by the interpreter: the call beyond the bound is not queued."""
    ffn = ExpertFFN({(0, 5): layers[0]})
    cache = load_config().cache_dir
    native_dir = cache if native_host else None
    worker = ExpertWorker(ffn, WIDTH, Compute(Backend("float32")), max_queued_rows=8, native_dir=native_dir)
    if native_host and worker.native is None:
        pytest.skip("no native host on this machine")
    server = SocketExpertServer(worker.forward, native=worker.native)
    info = ReplicaInfo("Expert5#0", "n", 1, frozenset(), WIDTH, "float32", {"socket": server.address})
    links = [connect("socket", info, LinkOptions(native_dir=native_dir)) for _ in range(2)]
    first = links[0].send(call(0, 12))  # more than the bound, and accepted: nothing else is queued
    assert layers[0].entered.wait(20)
    with pytest.raises(ReplicaBusy, match="queued"):
        links[1].send(call(0, 1)).result(20)
    layers[0].gate.set()
    assert first.result(20).rows.shape == (12, WIDTH)
    assert links[1].send(call(0, 1)).result(20).rows.shape == (1, WIDTH)
    for link in links:
        link.close()
    server.close()
