"""The native host behind the carrier's own server, from several trunks: it calls kernels, or torch through Python."""

from __future__ import annotations

import collections
import itertools
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from backends import BACKENDS, ffn_of, open_backend, random

from moe_ray.config import load_config
from moe_ray.core import AdapterRows, ExpertCall, ReplicaInfo
from moe_ray.errors import CallRefused, ExpertFailed, LinkBroken
from moe_ray.experts.server.load_counters import KeyLoad
from moe_ray.experts.server.worker import ExpertWorker
from moe_ray.model.compute.base import FFN
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.compute.torch.expert import TorchFFN
from moe_ray.model.expert import ExpertFFN
from moe_ray.native.host import DTYPE_CODES
from moe_ray.native.links import DONE, ERROR, Links
from moe_ray.transport import connect
from moe_ray.transport.base import Link, LinkOptions
from moe_ray.transport.handshake import connect as shake_hands
from moe_ray.transport.socket import SocketExpertServer

WIDTH, INNER, LAYERS, EXPERT = 64, 96, 3, 5
CACHE = load_config().cache_dir
OPTIONS = LinkOptions(token="t")


def ffn(layer: int, compute: Compute) -> FFN:
    """A network of random weights."""
    shapes = [(INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)]
    return ffn_of(compute, *(random(*shape, scale=0.2, seed=3 * layer + i) for i, shape in enumerate(shapes)))


@pytest.fixture(scope="module", params=list(BACKENDS))
def worker(request: pytest.FixtureRequest) -> ExpertWorker:
    compute = open_backend(request.param)
    ffns = ExpertFFN({(layer, EXPERT): ffn(layer, compute) for layer in range(LAYERS)})
    worker = ExpertWorker(ffns, WIDTH, compute, native_dir=CACHE)
    if worker.native is None:
        pytest.skip("the native host cannot be built here")
    return worker


@pytest.fixture(scope="module")
def dtype(worker: ExpertWorker) -> torch.dtype:
    return worker.compute.torch_dtype


@pytest.fixture(scope="module")
def address(worker: ExpertWorker) -> Iterator[str]:
    assert worker.native is not None
    server = SocketExpertServer(worker.forward, options=OPTIONS, native=worker.native)
    yield server.address
    server.close()


def link_to(address: str, native: bool = True) -> Link:
    info = ReplicaInfo("Expert5#0", "n", 1, frozenset(), WIDTH, "bfloat16", {"socket": address})
    return connect("socket", info, LinkOptions(token="t", native_dir=CACHE if native else None))


def call(layer: int, rows: int, dtype: torch.dtype, seed: int = 0, width: int = WIDTH) -> ExpertCall:
    generator = torch.Generator().manual_seed(1000 * layer + rows + seed)
    return ExpertCall(
        layer, EXPERT, torch.randn(rows, width, generator=generator).to(dtype), torch.rand(rows, generator=generator)
    )


def same(rows: torch.Tensor, wanted: torch.Tensor, worker: ExpertWorker) -> None:
    """The same bits from native kernels, in whatever batch; torch's products depend on how many rows there are."""
    if worker.compute.kernels is None:
        torch.testing.assert_close(rows, wanted)
    else:
        assert torch.equal(rows, wanted)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("way", ["unix", "tcp"])
def test_replies_are_those_of_the_worker(
    worker: ExpertWorker, dtype: torch.dtype, address: str, native: bool, way: str
) -> None:
    link = link_to(address if way == "unix" else address.split(",")[0] + ",", native)
    before = worker.stats()
    for layer, rows in [(0, 1), (1, 7), (2, 300), (0, 4000)]:
        asked = call(layer, rows, dtype)
        reply = link.send(asked).result(20)
        assert torch.equal(reply.rows, worker.forward(asked).rows)
    after = worker.stats()
    assert after.calls - before.calls == 8, "those that came by socket and those asked of the worker itself"
    assert after.rows - before.rows == 2 * 4308
    assert after.busy_s > before.busy_s
    assert after.queued_rows == 0
    link.close()


def test_each_layer_is_counted_for_itself(worker: ExpertWorker, dtype: torch.dtype, address: str) -> None:
    assert worker.native is not None
    before, totals = worker.key_loads(), worker.stats()
    sent: collections.Counter[int] = collections.Counter()

    plans = [[((number + turn) % LAYERS, 1 + turn % 5) for turn in range(30)] for number in range(4)]
    for layer, rows in itertools.chain(*plans):
        sent[layer] += rows

    def trunk(plan: list[tuple[int, int]]) -> int:
        link = link_to(address)
        waits = [link.send(call(*one, dtype)).result(20).load.queue_us for one in plan]
        link.close()
        return sum(waits)

    with ThreadPoolExecutor(4) as pool:
        waits = list(pool.map(trunk, plans))
    worker.forward(call(1, 7, dtype))  # not by socket: counted with the others
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


def test_several_trunks_at_once(worker: ExpertWorker, dtype: torch.dtype, address: str) -> None:
    asked = [call(i % LAYERS, 1 + i % 40, dtype, seed=i) for i in range(60)]
    wanted = [worker.forward(one).rows for one in asked]
    before = worker.stats()

    def trunk(number: int) -> None:
        link = link_to(address)
        for turn in range(40):
            picked = [(7 * number + turn + k) % len(asked) for k in range(3)]
            pending = [link.send(ExpertCall(asked[i].layer, EXPERT, asked[i].rows, asked[i].weights)) for i in picked]
            for i, reply in zip(picked, pending, strict=True):
                same(reply.result(20).rows, wanted[i], worker)
        link.close()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(trunk, range(6)))
    after = worker.stats()
    assert after.calls - before.calls == 6 * 40 * 3
    assert after.batches - before.batches <= 6 * 40 * 3
    assert after.queued_rows == 0


@pytest.mark.parametrize("fault", ["layer", "width", "dtype", "adapter"])
def test_what_does_not_fit_is_refused_and_the_link_lives_on(
    worker: ExpertWorker, dtype: torch.dtype, address: str, fault: str
) -> None:
    name = str(dtype).removeprefix("torch.")
    other = torch.float32 if dtype != torch.float32 else torch.float16
    wrong, says = {
        "layer": (call(LAYERS, 2, dtype), "layer 3 expert 5 is not held by this replica"),
        "width": (call(0, 2, dtype, width=WIDTH + 1), "rows have 65 columns, expected 64"),
        "dtype": (call(0, 2, other), f"rows are {other}, this replica computes in {name}".replace("torch.", "")),
        "adapter": (call(0, 2, dtype), "adapter 7 is not held by this replica"),
    }[fault]
    link = link_to(address, native=fault != "adapter")
    if fault == "adapter":
        wrong.adapters = (AdapterRows(0, 1), AdapterRows(7, 1))
    right = call(1, 3, dtype)
    first, second = link.send(wrong), link.send(right)
    with pytest.raises(CallRefused, match=says):
        first.result(20)
    assert torch.equal(second.result(20).rows, worker.forward(right).rows)
    link.close()


class Faulty(TorchFFN):
    """A network that fails as its layer says."""

    def __init__(self, layer: int) -> None:
        super().__init__(torch.ones(INNER, WIDTH), torch.ones(INNER, WIDTH), torch.ones(WIDTH, INNER), "silu")
        self.layer = layer

    def forward(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self.layer == 0:
            raise RuntimeError("out of memory, say: " + 400 * "ü")
        if self.layer == 1:
            raise ZeroDivisionError
        if self.layer == 2:
            return super().forward(rows, weights)[:1]
        return super().forward(rows, weights)


@pytest.mark.parametrize("native", [True, False])
def test_what_computing_raises_reaches_the_trunk(native: bool) -> None:
    ffns = ExpertFFN({(layer, EXPERT): Faulty(layer) for layer in range(4)})
    worker = ExpertWorker(ffns, WIDTH, Compute(Backend("float32")), native_dir=CACHE)
    if worker.native is None:
        pytest.skip("the native host cannot be built here")
    server = SocketExpertServer(worker.forward, options=OPTIONS, native=worker.native)
    link = link_to(server.address, native)
    asked = [link.send(call(layer, 3, torch.float32)) for layer in range(4)]
    says = [r"layer 0 expert 5: RuntimeError: out of memory, say: üüü", "layer 1 expert 5: ZeroDivisionError", "became"]
    for pending, said in zip(asked, says, strict=False):
        with pytest.raises(ExpertFailed, match=said):
            pending.result(20)
    assert torch.equal(asked[3].result(20).rows, worker.forward(call(3, 3, torch.float32)).rows)
    assert worker.stats().queued_rows == 0
    link.close()
    server.close()


def test_a_process_that_exits_while_it_computes_ends_as_it_should(tmp_path: Path) -> None:
    """Its threads must not come back into an interpreter that has ended."""
    code = f"""
import sys, threading, time, torch
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
import test_host as t
class Slow(t.TorchFFN):
    def forward(self, rows, weights):
        time.sleep(0.3)
        return super().forward(rows, weights)
w = [torch.ones(t.INNER, t.WIDTH), torch.ones(t.INNER, t.WIDTH), torch.ones(t.WIDTH, t.INNER)]
ffn = t.ExpertFFN({{(0, t.EXPERT): Slow(*w, "silu")}})
worker = t.ExpertWorker(ffn, t.WIDTH, t.Compute(t.Backend("float32")), native_dir=t.CACHE)
server = t.SocketExpertServer(worker.forward, options=t.OPTIONS, native=worker.native)
links = [t.link_to(server.address) for _ in range(3)]
kept = [link.send(t.call(0, 1, torch.float32)) for link in links for _ in range(3)]
time.sleep(0.4)
print("exits")
"""
    said = tmp_path / "said"
    with said.open("w") as stream:  # not a pipe: what is asked is when the process ends
        done = subprocess.run([sys.executable, "-c", code], stdout=stream, stderr=stream, timeout=60, check=False)
    assert (done.returncode, said.read_text()) == (0, "exits\n")


@pytest.fixture
def busy_host(worker: ExpertWorker, dtype: torch.dtype, address: str) -> Iterator[ExpertWorker]:
    """The worker while other trunks keep its compute thread busy, so that calls queue."""
    ended = threading.Event()

    def trunk() -> None:
        link = link_to(address)
        while not ended.is_set():
            link.send(call(0, 4000, dtype)).result(20)
        link.close()

    with ThreadPoolExecutor(2) as pool:
        trunks = [pool.submit(trunk) for _ in range(2)]
        yield worker
        ended.set()
        for running in trunks:
            running.result()
    deadline = time.monotonic() + 20
    while worker.stats().queued_rows and time.monotonic() < deadline:
        time.sleep(0.01)  # calls of links that are closed are still withdrawn
    assert worker.stats().queued_rows == 0


@pytest.mark.parametrize("native", [True, False])
def test_a_call_taken_back_while_it_queues_is_not_computed(
    busy_host: ExpertWorker, dtype: torch.dtype, address: str, native: bool
) -> None:
    link, key, turns = link_to(address, native), (2, EXPERT), 50
    wanted = busy_host.forward(call(2, 5, dtype)).rows
    before, cancelled = busy_host.key_loads()[key], busy_host.stats().cancelled
    for _ in range(turns):
        link.send(call(2, 3, dtype)).cancel()
        assert torch.equal(link.send(call(2, 5, dtype)).result(20).rows, wanted), "the call behind it"
    skipped = busy_host.stats().cancelled - cancelled
    done = busy_host.key_loads()[key]
    assert skipped > 0
    assert (done.calls - before.calls, done.rows - before.rows) == (2 * turns - skipped, 8 * turns - 3 * skipped)
    link.close()


def test_a_call_of_a_trunk_that_went_away_is_not_computed(
    busy_host: ExpertWorker, dtype: torch.dtype, address: str
) -> None:
    before = busy_host.stats().cancelled
    for _ in range(100):
        link = link_to(address)
        link.send(call(1, 3, dtype))
        link.close()
        if busy_host.stats().cancelled > before:
            return
    raise AssertionError("every call was computed for nobody")


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", struct.pack("<I", 3) + b"\xff\xff\xff", b"\x05"])
def test_garbage_ends_that_connection_alone(
    worker: ExpertWorker, dtype: torch.dtype, address: str, garbage: bytes
) -> None:
    healthy = link_to(address)
    rude = shake_hands(address, OPTIONS)
    rude.settimeout(20)
    rude.sendall(garbage)
    rude.shutdown(socket.SHUT_WR)
    assert rude.recv(1) == b""
    rude.close()
    asked = call(2, 5, dtype)
    assert torch.equal(healthy.send(asked).result(20).rows, worker.forward(asked).rows)
    healthy.close()


def test_closing_the_server_ends_its_threads(worker: ExpertWorker, dtype: torch.dtype) -> None:
    server = SocketExpertServer(worker.forward, options=OPTIONS, native=worker.native)
    link = link_to(server.address)
    link.send(call(0, 1, dtype)).result(20)
    serving = [thread for thread in threading.enumerate() if thread.name == "expert-connection"]
    server.close()
    with pytest.raises(LinkBroken):
        link.send(call(0, 1, dtype)).result(20)
    assert link.broken
    newest = max(serving, key=lambda thread: thread.ident or 0)
    newest.join(20)
    assert any(not thread.is_alive() for thread in serving)


def test_an_adapter_travels_in_the_headers_of_both_links(
    worker: ExpertWorker, dtype: torch.dtype, address: str
) -> None:
    """By the library itself: whatever the link above it does, the number reaches the replica."""
    links = Links(CACHE)
    sock = shake_hands(address, OPTIONS)
    sock.setblocking(False)
    link, asked = links.open(sock.fileno()), call(0, 2, dtype)
    target = torch.empty_like(asked.rows)
    for number, adapter in enumerate((0, 2**63 + 5), 1):
        code, runs = DTYPE_CODES[worker.compute.dtype], [[(0, 1), (adapter, 1)]]
        links.scatter([link], [number], 0, [EXPERT], [2], code, asked.rows, asked.weights, target, runs)
        (result,) = links.gather([link], [number], 20)
        assert result.outcome == (ERROR if adapter else DONE)
    assert links.error(link, 2) == f"adapter {2**63 + 5} is not held by this replica"
    links.free(link)
    sock.close()
