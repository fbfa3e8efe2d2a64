"""The trunk's end of `bench transport`: sends to all links, then waits for all, lane after lane, round after round."""

from __future__ import annotations

import contextlib
import random
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_ray.bench.child import Parent, answer_commands
from moe_ray.bench.echo_process import SIZE, EchoActor, receive, replica
from moe_ray.core import ReplicaLoad
from moe_ray.errors import LinkBroken, LinkTimeout
from moe_ray.transport import connect
from moe_ray.transport.base import CallBatch, Link, LinkOptions, scatter

TIMEOUT_S = 30.0
HIDDEN_SIZE = 4096
"""Of a row of more than 8 KiB: Mixtral's, in bfloat16."""

Round = Callable[[], None]
Addresses = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Lane:
    """One way to the replicas: a carrier, and the path where it has a choice."""

    carrier: str
    path: str | None

    def address(self, addresses: dict[str, str]) -> str:
        """Where one replica is found on this lane."""
        if self.carrier == "raw":
            return addresses[f"raw {self.path}"]
        address = addresses[self.carrier]
        return address.partition(",")[0] if self.path == "tcp" else address  # "host:port,name of the Unix socket"


def rows_of(size: int) -> torch.Tensor:
    """`size` bytes of rows as a trunk sends them: bfloat16, at most 8 KiB each."""
    elements = size // 2
    return torch.randn(max(1, elements // HIDDEN_SIZE), min(elements, HIDDEN_SIZE)).bfloat16()


def link_round(
    lane: Lane, addresses: Addresses, size: int, options: LinkOptions, closing: contextlib.ExitStack
) -> Round:
    """A round over real links to all `addresses`, sent as `ExpertDispatcher` sends a layer."""
    links: list[Link] = []
    for i, known in enumerate(addresses):
        info = replica(f"Echo{i}", 0, {lane.carrier: lane.address(known)})
        links.append(connect(lane.carrier, info, options))
        closing.callback(links[-1].close)
    rows = rows_of(size)
    count = len(links)
    batch = CallBatch(
        layer=0,
        experts=[0] * count,
        counts=[len(rows)] * count,
        rows=rows.repeat(count, 1),
        weights=torch.ones(len(rows) * count),
    )

    def run() -> None:
        for outcome in scatter(links, batch).wait(TIMEOUT_S):
            if not isinstance(outcome, ReplicaLoad):
                raise outcome or LinkTimeout(f"no reply within {TIMEOUT_S:g} s")

    return run


def raw_round(
    lane: Lane, addresses: Addresses, size: int, options: LinkOptions, closing: contextlib.ExitStack
) -> Round:
    """The floor: one sendall a peer, then recv_into until its message is complete."""
    socks: list[socket.socket] = []
    for known in addresses:
        sock = closing.enter_context(raw_connect(lane, known))
        sock.sendall(SIZE.pack(size))
        socks.append(sock)
    message, replies = bytes(size), [memoryview(bytearray(size)) for _ in socks]

    def run() -> None:
        for sock in socks:
            sock.sendall(message)
        for sock, reply in zip(socks, replies, strict=True):
            if not receive(sock, reply):
                raise LinkBroken("a raw echo process ended its connection")

    return run


def raw_connect(lane: Lane, addresses: dict[str, str]) -> socket.socket:
    """A blocking connection to one replica's bare socket."""
    address = lane.address(addresses)
    if lane.path == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(f"\0{address}")
        return sock
    host, _, port = address.rpartition(":")
    sock = socket.create_connection((host, int(port)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def measure(
    lanes: list[Lane], addresses: Addresses, size: int, options: LinkOptions, rounds: int, warmup: int
) -> list[list[float]]:
    """Microseconds of each round, per lane.

    The lanes take turns, so that a busy moment hits all of them, each time in another order: what one leaves to do in
    the background (gRPC's and Ray's threads) must not always fall upon the same next one.
    """
    times: list[list[float]] = [[] for _ in lanes]
    with contextlib.ExitStack() as closing:
        runs = [
            (raw_round if lane.carrier == "raw" else link_round)(lane, addresses, size, options, closing)
            for lane in lanes
        ]
        pairs, order = list(zip(runs, times, strict=True)), random.Random(0)
        for index in range(warmup + rounds):
            order.shuffle(pairs)
            for run, taken in pairs:
                started = time.perf_counter()
                run()
                if index >= warmup:
                    taken.append(1e6 * (time.perf_counter() - started))
    return times


def summary(taken: list[float]) -> dict[str, float]:
    """Median and 99th percentile."""
    ordered = sorted(taken)
    return {"p50_us": statistics.median(ordered), "p99_us": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]}


def main() -> None:
    """Answer `open` (start Ray actors if asked) and `measure`."""
    torch.set_num_threads(1)
    parent, addresses = Parent(), list[dict[str, str]]()
    with contextlib.ExitStack() as closing:
        actors: list[Any] = []  # an actor lives as long as somebody holds its handle

        def open_replicas(known: Addresses, ray: bool) -> dict[str, Any]:
            addresses[:] = known
            if ray:
                from moe_ray.bench.own_ray import own_ray

                closing.enter_context(own_ray())
                actors.extend(start_actors(len(known)))
                for i, actor in enumerate(actors):
                    addresses[i] = {**known[i], "ray": endpoint(actor)}
                    parent.progress("Ray actors", i + 1, len(actors))
            return {}

        def run(
            lanes: list[list[str]], fan_out: int, size: int, token: str, native_dir: str, **how: int
        ) -> dict[str, Any]:
            ways = [Lane(carrier, path or None) for carrier, path in lanes]
            options = LinkOptions(token=token, native_dir=Path(native_dir))
            times = measure(ways, addresses[:fan_out], size, options, **how)
            return {"lanes": [summary(taken) for taken in times]}

        answer_commands(parent, {"open": open_replicas, "measure": run})


def start_actors(count: int) -> list[Any]:
    """Named Ray actors that echo."""
    import ray

    actor = ray.remote(num_cpus=0)(EchoActor)
    return [actor.options(name=f"Echo{i}").remote() for i in range(count)]


def endpoint(actor: Any) -> str:
    """The address of a started actor on the ray carrier."""
    import ray

    _, address = ray.get(actor.endpoint.remote(), timeout=120)
    return str(address)


if __name__ == "__main__":
    main()
