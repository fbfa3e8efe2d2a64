"""The native host adds each row's adapter as the worker does, and lets adapters come and go while it computes."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from backends import ffn_of, open_backend, random

from moe_ray.config import load_config
from moe_ray.core import AdapterRows, ExpertCall, ReplicaInfo
from moe_ray.errors import AdapterNotHeld
from moe_ray.experts.server.worker import ExpertWorker
from moe_ray.model.expert import ExpertFFN
from moe_ray.model.lora.parts import ExpertPart, LowRank
from moe_ray.pb import moe_ray_pb2 as pb
from moe_ray.transport import connect
from moe_ray.transport.base import Link, LinkOptions
from moe_ray.transport.handshake import connect as shake_hands
from moe_ray.transport.socket import SocketExpertServer

CACHE = load_config().cache_dir
KEY, WIDTH, INNER = (1, 5), 64, 96
OPTIONS = LinkOptions(token="t")


def low_rank(n: int, k: int, rank: int, seed: int) -> LowRank:
    a, b = (random(*shape, scale=0.4, seed=seed).float().numpy() for shape in ((rank, k), (n, rank)))
    return LowRank(a, b, 0.5)


PARTS = {
    3: ExpertPart(low_rank(INNER, WIDTH, 4, 1), low_rank(INNER, WIDTH, 20, 2), low_rank(WIDTH, INNER, 16, 3)),
    4: ExpertPart(down=low_rank(WIDTH, INNER, 1, 4)),
    2**63 - 1: ExpertPart(),
}


class Replica:
    """A worker with adapters, on a socket."""

    def __init__(self, backend: str) -> None:
        compute = open_backend(backend)
        shapes = [(INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)]
        ffn = ffn_of(compute, *(random(*shape, scale=0.2, seed=i) for i, shape in enumerate(shapes)))
        self.dtype, self.exact = compute.torch_dtype, compute.kernels is not None
        self.ffn = ExpertFFN({KEY: ffn})
        self.worker = ExpertWorker(self.ffn, WIDTH, compute, native_dir=CACHE)
        if self.worker.native is None:
            pytest.skip("the native host cannot be built here")
        self.host = self.worker.native
        for adapter_id in PARTS:
            self.add(adapter_id)
        self.server = SocketExpertServer(self.worker.forward, options=OPTIONS, native=self.host)

    def add(self, adapter_id: int) -> None:
        self.ffn.add_adapter(KEY, adapter_id, PARTS[adapter_id])
        self.host.add_adapter(*KEY, adapter_id, self.ffn[KEY].adapter_handle(adapter_id), self.ffn[KEY])

    def remove(self, adapter_id: int) -> None:
        self.host.remove_adapter(*KEY, adapter_id)
        self.ffn.remove_adapter(KEY, adapter_id)

    def link(self, native: bool = True) -> Link:
        info = ReplicaInfo("e", "n", 1, frozenset(), WIDTH, "float32", {"socket": self.server.address})
        return connect("socket", info, LinkOptions(token="t", native_dir=CACHE if native else None))

    def call(self, *runs: tuple[int, int], seed: int = 0) -> ExpertCall:
        rows = sum(count for _, count in runs)
        weights = torch.rand(rows, generator=torch.Generator().manual_seed(seed))
        asked = ExpertCall(*KEY, random(rows, WIDTH, seed=seed).to(self.dtype), weights)
        asked.adapters = tuple(AdapterRows(*run) for run in runs)
        return asked

    def same(self, rows: torch.Tensor, wanted: torch.Tensor) -> None:
        if self.exact:
            assert torch.equal(rows, wanted)
        else:
            torch.testing.assert_close(rows, wanted)


@pytest.fixture(scope="module", params=["native bfloat16", "native float32", "torch float32"])
def replica(request: pytest.FixtureRequest) -> Iterator[Replica]:
    replica = Replica(request.param)
    yield replica
    replica.server.close()


@pytest.mark.parametrize("native", [True, False])
def test_each_row_has_its_adapter(replica: Replica, native: bool) -> None:
    link = replica.link(native)
    last = 2**63 - 1
    for runs in ([(3, 1)], [(0, 2), (3, 5), (4, 1), (last, 2)], [(4, 1), (3, 1)] * 30, [(0, 9), (4, 40)]):
        asked = replica.call(*runs)
        got = link.send(asked).result(20).rows
        replica.same(got, replica.worker.forward(asked).rows)
        start = 0
        for adapter_id, count in runs:
            part = slice(start, start + count)
            alone = ExpertCall(*KEY, asked.rows[part], asked.weights[part])
            plain = replica.worker.forward(alone).rows
            if PARTS.get(adapter_id, ExpertPart()).down is None:
                replica.same(got[part], plain)  # without an adapter, or with one that adds nothing here
            else:
                assert not torch.equal(got[part], plain)
                alone.adapters = (AdapterRows(adapter_id, count),)
                replica.same(got[part], replica.worker.forward(alone).rows)
            start += count
    link.close()


def test_an_adapter_is_added_once_and_to_keys_that_are_held(replica: Replica) -> None:
    before = replica.ffn[KEY].adapter_handle(3)
    replica.add(3)
    assert replica.ffn[KEY].adapter_handle(3) == before
    with pytest.raises(KeyError):
        replica.host.add_adapter(0, 5, 3, None, None)
    replica.host.remove_adapter(0, 5, 3)
    replica.host.remove_adapter(*KEY, 99)
    with pytest.raises(AdapterNotHeld):
        replica.ffn[KEY].adapter_handle(99)


def test_it_is_the_product_with_the_sum_of_both(replica: Replica) -> None:
    asked = replica.call((3, 7))
    part = PARTS[3]
    w1, w3, w2 = (random(*s, scale=0.2, seed=i).double() for i, s in enumerate([(INNER, WIDTH)] * 2 + [(WIDTH, INNER)]))

    def sum_of(w: torch.Tensor, added: LowRank | None) -> torch.Tensor:
        assert added is not None
        return w + added.scale * torch.from_numpy(added.b.astype(np.float64) @ added.a.astype(np.float64))

    x = asked.rows.double()
    gate, up = x @ sum_of(w1, part.gate).T, x @ sum_of(w3, part.up).T
    exact = (torch.nn.functional.silu(gate) * up) @ sum_of(w2, part.down).T * asked.weights[:, None]
    error = (replica.worker.forward(asked).rows.double() - exact).abs().max() / exact.abs().max()
    assert error < (2e-2 if replica.dtype == torch.bfloat16 else 1e-5)


def test_adapters_come_and_go_while_calls_are_computed(replica: Replica) -> None:
    plans = [[(0, 2), (3, 3)], [(4, 2)], [(3, 1), (4, 1)], [(0, 5)]]
    asked = [replica.call(*runs, seed=i) for i, runs in enumerate(plans)]
    wanted = [replica.worker.forward(one).rows for one in asked]
    answered = [0] * len(plans)
    refusals: list[list[str]] = [[] for _ in plans]
    over = threading.Event()

    def trunk(number: int) -> None:
        link = replica.link()
        while not over.is_set():
            one = replica.call(*plans[number], seed=number)
            try:
                replica.same(link.send(one).result(20).rows, wanted[number])
                answered[number] += 1
            except AdapterNotHeld as error:
                refusals[number].append(str(error))
        link.close()

    threads = [threading.Thread(target=trunk, args=(number,)) for number in range(len(plans))]
    for thread in threads:
        thread.start()
    for _ in range(60):
        replica.remove(4)
        replica.add(4)
    replica.remove(4)
    link = replica.link()
    with pytest.raises(AdapterNotHeld):
        link.send(replica.call((4, 1))).result(20)
    link.close()
    replica.add(4)
    deadline = time.monotonic() + 30
    while not all(answered) and time.monotonic() < deadline:
        time.sleep(0.01)
    over.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert all(answered)
    assert not refusals[0], "it does not name it"
    assert not refusals[3]
    assert all("adapter 4 is not held by this replica" in said for said in refusals[1] + refusals[2])


@pytest.mark.parametrize(
    ("ids", "rows"),
    [([1, 2], [2]), ([1], [3]), ([1, 2], [2, 0]), ([3, 0], [1, 2**32 - 1]), (list(range(65)), [1] * 65)],
)
def test_a_header_whose_runs_do_not_fit_ends_the_connection(ids: list[int], rows: list[int]) -> None:
    replica = Replica("native float32")
    sock = shake_hands(replica.server.address, OPTIONS)
    sock.settimeout(20)
    count = 65 if len(ids) == 65 else 2
    header = pb.ExpertCallHeader(call_id=1, layer=1, expert=5, num_rows=count, hidden_size=WIDTH, dtype=pb.FLOAT32)
    header.adapter_ids.extend(ids)
    header.adapter_rows.extend(rows)
    packed = header.SerializeToString()
    sock.sendall(struct.pack("<I", len(packed)) + packed)
    assert sock.recv(1) == b""
    sock.close()
    link = replica.link()
    assert link.send(replica.call((3, 1))).result(20).rows.shape == (1, WIDTH)
    link.close()
    replica.server.close()
