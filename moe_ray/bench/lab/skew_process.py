"""Emulated experts: real servers of the socket carrier behind which nothing is computed but time passes."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections import deque
from typing import Any

from moe_ray.bench.child import Parent, answer_commands
from moe_ray.bench.lab.emulate import ServiceQueue, ServiceTime, percentile
from moe_ray.core import ExpertCall, ExpertReply, ReplicaInfo, ReplicaLoad
from moe_ray.experts.replica_data import packed
from moe_ray.transport.base import LinkOptions
from moe_ray.transport.socket import SocketExpertServer

SPIN_S = 0.0001
"""The last stretch is spun: a sleep ends about this much too late."""


class EmulatedReplica:
    """One replica: calls take the time that `service` tells, one after the other; some stall.

    A stall is like a lost packet's or a paused process's: what the replica says that it computed does not show it.
    """

    def __init__(self, service: ServiceTime, stall_s: float, stall_share: float, seed: int, late: deque[float]) -> None:
        """`late`: gets the seconds by which each call ended too late."""
        self._service, self._stall_s, self._stall_share = service, stall_s, stall_share
        self._draw, self._late = random.Random(seed), late
        self._state, self._queue, self._queued_rows, self._waited_s = threading.Lock(), ServiceQueue(), 0, 0.0

    def handle(self, call: ExpertCall) -> ExpertReply:
        """Answer after the call's time, from any thread."""
        rows = call.rows.shape[0]
        with self._state:
            now = time.perf_counter()
            stall = self._stall_s if self._draw.random() < self._stall_share else 0.0
            seconds = self._service.seconds(rows)
            done = self._queue.take(now, seconds + stall)
            self._queued_rows += rows
        sleep_until(done)
        self._late.append(time.perf_counter() - done)
        waited = max(0.0, done - seconds - stall - now)
        with self._state:
            self._waited_s += waited
            self._queued_rows -= rows
            queued = self._queued_rows
        load = ReplicaLoad(queued, int(1e6 * seconds), int(1e6 * waited))
        return ExpertReply(call.call_id, call.rows * call.weights[:, None], load)

    def sample(self) -> dict[str, float]:
        """What `emulate.ReplicaSample` holds."""
        with self._state:
            return {"computed_s": self._queue.computed_s(time.perf_counter()), "waited_s": self._waited_s}


def sleep_until(moment: float) -> None:
    """Sleep until `moment` of `time.perf_counter`, the end of it awake."""
    while (left := moment - time.perf_counter()) > 0:
        if left > SPIN_S:
            time.sleep(left - SPIN_S)


def main() -> None:
    """Answer `start`, `stop`, `sample` and `error`."""
    import torch

    torch.set_num_threads(1)
    sys.setswitchinterval(0.0005)  # whoever spins must not keep the others from waking
    running = dict[str, tuple[EmulatedReplica, SocketExpertServer]]()
    late: deque[float] = deque(maxlen=100_000)

    def start(
        name: str,
        expert: int,
        layers: int,
        token: str,
        service: list[float],
        stall_s: float,
        stall_share: float,
        host: str = "127.0.0.1",
    ) -> dict[str, Any]:
        replica = EmulatedReplica(ServiceTime(*service), stall_s, stall_share, len(running), late)
        server = SocketExpertServer(replica.handle, host, options=LinkOptions(token=token))
        running[name] = replica, server
        keys = frozenset((layer, expert) for layer in range(layers))
        return packed(ReplicaInfo(name, "local", os.getpid(), keys, 0, "float32", {"socket": server.address}))

    def stop(names: list[str]) -> dict[str, Any]:
        for name in names:
            running.pop(name)[1].close()
        return {}

    def sample() -> dict[str, Any]:
        return {name: replica.sample() for name, (replica, _) in running.items()}

    def error() -> dict[str, Any]:
        taken = [late.popleft() for _ in range(len(late))]  # since it was asked last
        return {"mean_us": 1e6 * sum(taken) / max(1, len(taken)), "p99_us": 1e6 * percentile(taken, 0.99)}

    answer_commands(Parent(), {"start": start, "stop": stop, "sample": sample, "error": error})


if __name__ == "__main__":
    main()
