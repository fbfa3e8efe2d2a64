"""One contract, every carrier: what `transport/base.py` promises, with real servers, processes and actors."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import echo_expert as echo
import pytest
import torch
from shared_device import SharedDevice

from moe_ray.config import load_config
from moe_ray.core import AdapterRows, ExpertCall, ReplicaInfo, ReplicaLoad
from moe_ray.errors import (
    AdapterNotHeld,
    CallRefused,
    ConfigError,
    ExpertFailed,
    InvalidCall,
    LinkBroken,
    LinkTimeout,
    WrongAnswer,
)
from moe_ray.transport import CARRIERS, best_carrier, connect
from moe_ray.transport.base import Link, LinkOptions
from moe_ray.transport.mailbox.trunk_end import CardMailboxes
from moe_ray.transport.native_socket import links_library

OPTIONS = LinkOptions(token=echo.TOKEN, connect_timeout_s=10.0)
NATIVE = replace(OPTIONS, native_dir=load_config().cache_dir)
BY_CARD = replace(OPTIONS, mailboxes=CardMailboxes(SharedDevice()))
WAYS = {**dict.fromkeys(CARRIERS, OPTIONS), "native socket": NATIVE, "card socket": BY_CARD}
"""Every carrier, and socket's three clients."""
ON_RAY = pytest.param("ray", marks=pytest.mark.slow)
WAIT_S = 20.0  # far above what any passing test waits


@dataclass
class Replica:
    carrier: str
    info: ReplicaInfo
    kill: Callable[[], None]
    options: LinkOptions

    def connect(self) -> Link:
        return connect(self.carrier, self.info, self.options)


def start_replica(way: str, request: pytest.FixtureRequest) -> Replica:
    """A fresh replica; `kill` ends it the hard way."""
    carrier, options = way.rpartition(" ")[2], WAYS[way]
    if options.native_dir is not None and links_library(options.native_dir) is None:
        pytest.skip("the native library cannot be built here")
    if carrier == "local":
        from moe_ray.transport.local import LocalExpertServer

        server = LocalExpertServer(echo.behave)
        return Replica(carrier, echo.info({"local": server.address}), server.close, options)
    if carrier in ("grpc", "socket"):
        info, pid = request.getfixturevalue("expert_process")("card" if options is BY_CARD else carrier, echo.TOKEN)
    else:
        request.getfixturevalue("ray_cluster")
        import ray

        ray.cloudpickle.register_pickle_by_value(echo)  # workers do not have this directory on their path
        name = f"echo-{uuid.uuid4().hex}"
        actor = ray.remote(echo.EchoActor).options(name=name, namespace="experts", num_cpus=0).remote()
        request.addfinalizer(lambda: ray.kill(actor))  # holds the handle: a dropped one ends the actor
        address, pid = ray.get(actor.endpoint.remote(), timeout=30)
        assert address == f"experts/{name}"
        info = echo.info({"ray": address})
    return Replica(carrier, info, lambda: os.kill(pid, signal.SIGKILL), options)


@pytest.fixture(scope="module", params=[ON_RAY if way == "ray" else way for way in WAYS])
def replica(request: pytest.FixtureRequest) -> Replica:
    return start_replica(request.param, request)


@pytest.fixture
def link(replica: Replica) -> Iterator[Link]:
    link = replica.connect()
    assert link.on_card == (replica.options is BY_CARD)
    yield link
    link.close()


def make_call(
    expert: int = echo.ECHO,
    layer: int = 3,
    shape: tuple[int, int] = (5, 8),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> ExpertCall:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape, generator=generator).to(dtype)
    return ExpertCall(layer=layer, expert=expert, rows=rows, weights=torch.rand(shape[0], generator=generator))


def assert_answers(link: Link, call: ExpertCall | None = None) -> None:
    call = call or make_call()
    assert torch.equal(link.send(call).result(WAIT_S).rows, echo.weighted(call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 8), (3, 4097)])
def test_values_are_bit_exact(link: Link, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    call = make_call(dtype=dtype, shape=shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns about read-only buffers
        reply = link.send(call).result(WAIT_S)
        reply.rows.add_(0)  # writable, and ours
    assert reply.rows.dtype == dtype
    assert torch.equal(reply.rows, echo.weighted(call))
    assert reply.call_id == call.call_id
    assert reply.load == ReplicaLoad(queued_rows=3, compute_us=11, queue_us=7)


def test_awkward_tensors_arrive_as_they_are(link: Link) -> None:
    base = torch.randn(8, 6).t()[1:5]  # neither contiguous nor at offset 0
    assert not base.is_contiguous()
    assert_answers(link, ExpertCall(0, echo.ECHO, base, torch.rand(8)[::2]))
    values = torch.tensor([[-0.0, 1e-45, 3e38, -3e38]])
    reply = link.send(ExpertCall(0, echo.ECHO, values.clone().requires_grad_(), torch.ones(1))).result(WAIT_S)
    assert torch.equal(reply.rows.detach().view(torch.int32), values.view(torch.int32))


def test_more_than_64_mib(link: Link) -> None:
    assert_answers(link, make_call(shape=(4097, 4096)))


def test_calls_in_flight_get_their_own_replies(link: Link) -> None:
    calls = [make_call(seed=i, layer=i, shape=(1 + i % 7, 16)) for i in range(50)]
    pending = [link.send(call) for call in calls]
    assert len({call.call_id for call in calls}) == len(calls)
    for call, reply in reversed([*zip(calls, pending, strict=True)]):
        got = reply.result(WAIT_S)
        assert torch.equal(got.rows, echo.weighted(call))
        assert got.load.queued_rows == call.layer


@pytest.mark.parametrize(
    ("expert", "error", "says"),
    [
        (echo.FAILS, ExpertFailed, "out of luck"),
        (echo.BUG, ExpertFailed, "ZeroDivisionError: a bug in the handler"),
        (echo.REFUSES, CallRefused, r"key \(0, 3\) is not held here"),
        (echo.WRONG_ID, ExpertFailed, "answered call"),
        (echo.NO_TENSOR, ExpertFailed, "float64"),
        (echo.WRONG_SHAPE, WrongAnswer, r"\[10, 8\], expected"),
        (echo.WRONG_DTYPE, WrongAnswer, "expected torch.float32"),
        (echo.NAN, WrongAnswer, "not finite"),
    ],
)
def test_a_fault_belongs_to_its_call_alone(link: Link, expert: int, error: type[Exception], says: str) -> None:
    before, faulty, after = make_call(seed=1), make_call(expert), make_call(seed=2)
    pending = [link.send(call) for call in (before, faulty, after)]
    assert torch.equal(pending[0].result(WAIT_S).rows, echo.weighted(before))
    with pytest.raises(error, match=says) as raised:
        pending[1].result(WAIT_S)
    assert "echo-1" in str(raised.value)
    assert "Traceback" not in str(raised.value)
    assert raised.value.__cause__ is None
    assert torch.equal(pending[2].result(WAIT_S).rows, echo.weighted(after))
    assert not link.broken
    assert_answers(link)


@pytest.mark.parametrize(
    ("rows", "weights", "says"),
    [
        (torch.ones(2, 3, dtype=torch.float64), torch.ones(2), "rows is torch.float64"),
        (torch.ones(0, 3), torch.ones(0), "rows has shape"),
        (torch.ones(3), torch.ones(3), "rows has shape"),
        (torch.ones(2, 3), torch.ones(3), "weights is"),
        (torch.ones(2, 3), torch.ones(2, dtype=torch.float16), "weights is"),
    ],
)
def test_a_malformed_call_is_not_sent(link: Link, rows: torch.Tensor, weights: torch.Tensor, says: str) -> None:
    with pytest.raises(InvalidCall, match=says):
        link.send(ExpertCall(0, echo.ECHO, rows, weights))
    assert_answers(link)


@pytest.mark.parametrize(
    "runs",
    [
        (),
        (AdapterRows(7, 70),),
        (AdapterRows(0, 3), AdapterRows(2**63 - 1, 66), AdapterRows(300, 1)),
        tuple(AdapterRows(2**64 - 1 - i, 7 if i == 40 else 1) for i in range(64)),
    ],
    ids=lambda runs: str(len(runs)),
)
def test_a_call_tells_which_rows_have_which_adapter(link: Link, runs: tuple[AdapterRows, ...]) -> None:
    call = make_call(echo.ADAPTERS, shape=(70, 8))
    call.adapters = runs
    says = ", ".join(f"{run.count} of {run.adapter_id}" for run in runs) or "none"
    with pytest.raises(AdapterNotHeld, match=rf"{says}$"):
        link.send(call).result(WAIT_S)
    assert_answers(link)


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        ((AdapterRows(1, 4),), "runs of 4 rows in all, expected 70"),
        ((AdapterRows(1, 70), AdapterRows(2, 0)), "a run of 0 rows"),
        ((AdapterRows(-1, 70),), "adapter_id is -1"),
        ((AdapterRows(2**64, 70),), "adapter_id is"),
        ((*[AdapterRows(1, 1)] * 64, AdapterRows(2, 6)), "65 runs of rows, at most 64"),
    ],
)
def test_runs_that_do_not_fit_are_not_sent(link: Link, runs: tuple[AdapterRows, ...], says: str) -> None:
    call = make_call(shape=(70, 8))
    call.adapters = runs
    with pytest.raises(InvalidCall, match=says):
        link.send(call)
    assert_answers(link)


def test_a_late_reply_is_nobody_elses(replica: Replica, link: Link) -> None:
    if replica.carrier == "local":
        pytest.skip("computes on the caller's thread: no call can be late")
    slow = link.send(make_call(echo.SLOW, layer=1500, seed=1))
    started = time.monotonic()
    with pytest.raises(LinkTimeout, match=r"layer 1500 expert 1 within 0\.05 s"):
        slow.result(0.05)
    assert time.monotonic() - started < 1.2
    assert not link.broken
    for seed in range(2, 6):  # same shape: only the values tell them apart
        assert_answers(link, make_call(seed=seed))


def test_a_call_taken_back_is_nobody_elses(replica: Replica, link: Link) -> None:
    """Late, unread or answered already: taking a call back never costs the link, nor another call its reply."""
    slow, behind = link.send(make_call(echo.SLOW, layer=100, seed=1)), link.send(make_call(seed=2))
    behind.cancel()
    slow.cancel()
    slow.cancel()
    for seed in range(3, 8):
        assert_answers(link, make_call(seed=seed))
    answered = link.send(make_call(seed=9))
    assert_answers(link, make_call(seed=10))
    answered.cancel()
    assert_answers(link, make_call(seed=11))
    assert not link.broken


def test_links_to_one_replica_are_independent(replica: Replica, link: Link) -> None:
    def use(seed: int) -> None:
        other = replica.connect()
        for i in range(10):
            assert_answers(other, make_call(seed=100 * seed + i))
        other.close()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(use, range(4)))
    assert_answers(link)


def test_a_call_may_be_sent_on_two_links(replica: Replica, link: Link) -> None:
    second = replica.connect()
    assert_answers(second)  # so that the two links' next ids differ
    call = make_call()
    for pending in [link.send(call), second.send(call)]:
        assert torch.equal(pending.result(WAIT_S).rows, echo.weighted(call))
    second.close()


def test_close_fails_what_is_in_flight(replica: Replica) -> None:
    link = replica.connect()
    assert_answers(link)
    waiting, never_waited = link.send(make_call(echo.SLOW, layer=1000)), link.send(make_call())
    # A local call computes on this thread, which nothing interrupts: there the link ends before the wait.
    closer = threading.Timer(0.0 if replica.carrier == "local" else 0.1, link.close)
    closer.start()
    if replica.carrier == "local":
        closer.join()
    started = time.monotonic()
    with pytest.raises(LinkBroken, match="echo-1"):
        waiting.result(WAIT_S)
    assert time.monotonic() - started < 0.8
    closer.join()
    assert link.broken
    link.close()
    with pytest.raises(LinkBroken):
        never_waited.result(WAIT_S)
    with pytest.raises(LinkBroken):
        link.send(make_call())


def test_close_leaves_no_thread(replica: Replica) -> None:
    before = set(threading.enumerate())
    links = [replica.connect() for _ in range(3)]
    for link in links:
        assert_answers(link)
        link.close()
    deadline = time.monotonic() + 5
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left


@pytest.mark.parametrize("way", [ON_RAY if way == "ray" else way for way in WAYS])
def test_death_in_mid_call_is_noticed(way: str, request: pytest.FixtureRequest) -> None:
    victim = start_replica(way, request)
    carrier, link = victim.carrier, victim.connect()
    assert_answers(link)
    pending = [link.send(make_call(echo.SLOW, layer=2000)) for _ in range(3)]
    if carrier == "local":
        victim.kill()
    else:
        threading.Timer(0.2, victim.kill).start()
    started = time.monotonic()
    for reply in pending:
        with pytest.raises(LinkBroken, match="echo-1") as raised:
            reply.result(WAIT_S)
    assert time.monotonic() - started < 1.5  # before the slow call could have ended
    assert len(str(raised.value).splitlines()) == 1
    assert link.broken
    with pytest.raises(LinkBroken):
        link.send(make_call())
    link.close()
    started = time.monotonic()
    with pytest.raises(LinkBroken, match="echo-1"):
        connect(carrier, victim.info, replace(victim.options, connect_timeout_s=2.0))
    assert time.monotonic() - started < 2.5


@pytest.mark.parametrize("carrier", [ON_RAY if carrier == "ray" else carrier for carrier in CARRIERS])
def test_nobody_at_the_address(carrier: str, request: pytest.FixtureRequest) -> None:
    if carrier == "ray":
        request.getfixturevalue("ray_cluster")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        dead = f"127.0.0.1:{probe.getsockname()[1]}"
    addresses = {"local": "nobody", "socket": f"{dead},moe-ray-nowhere", "grpc": dead, "ray": "experts/nobody"}
    started = time.monotonic()
    with pytest.raises(LinkBroken, match="echo-1") as raised:
        connect(carrier, echo.info({carrier: addresses[carrier]}), LinkOptions(connect_timeout_s=2.0))
    assert time.monotonic() - started < 2.5
    assert carrier == "local" or addresses[carrier] in str(raised.value)


def test_the_table_of_carriers() -> None:
    everywhere = echo.info({"socket": "h:1,x", "grpc": "h:1", "ray": "n/a", "local": "another process's"})
    assert best_carrier(everywhere) == "socket"
    assert best_carrier(everywhere, ("ray", "local")) == "ray"
    assert best_carrier(echo.info({"ray": "n/a"})) == "ray"
    with pytest.raises(ConfigError, match="echo-1 offers ray, and this process may use grpc"):
        best_carrier(echo.info({"ray": "n/a"}), ("grpc",))
    with pytest.raises(ConfigError, match="'pigeon' is not one of local, socket, grpc, ray"):
        connect("pigeon", everywhere)
    with pytest.raises(ConfigError, match="'pigeon' is not one of"):
        best_carrier(everywhere, ("pigeon",))
    for carrier in CARRIERS:
        with pytest.raises(ConfigError, match=f"echo-1 has no {carrier} address"):
            connect(carrier, echo.info({"other": "x"}))


def test_a_local_server_is_preferred_in_its_own_process() -> None:
    from moe_ray.transport.local import LocalExpertServer

    server = LocalExpertServer(echo.behave)
    info = echo.info({"grpc": "h:1", "local": server.address})
    assert best_carrier(info) == "local"
    server.close()
    assert best_carrier(info) == "grpc"


def test_importing_transport_imports_no_carrier() -> None:
    code = (
        "import sys, moe_ray.transport\n"
        "assert not {'ray', 'grpc', 'torch'} & set(sys.modules)\n"
        "import moe_ray.transport.grpc, moe_ray.transport.local\n"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
