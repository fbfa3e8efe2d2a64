"""`bench transport` measures real servers in real processes, and leaves none of them behind, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from moe_ray.bench.child import ChildFailed
from moe_ray.bench.transport import PATHS, TransportBenchOptions, run_transport
from moe_ray.errors import ConfigError

FEW = TransportBenchOptions(
    carriers=("raw", "socket", "grpc"), fan_out=(1, 2), message_bytes=(8 * 1024, 64 * 1024), rounds=5
)


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def of_bench(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that run a module of the bench."""
    found = []
    for process in processes:
        try:
            if any("moe_ray.bench." in word for word in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


@pytest.mark.slow
def test_rows_are_complete() -> None:
    report = run_transport(FEW, silent)
    lanes = [*(("raw", path) for path in PATHS), *(("socket", path) for path in PATHS), ("grpc", None)]
    assert [(row["carrier"], row["path"], row["fan_out"], row["bytes"]) for row in report.rows] == [
        (*lane, fan_out, size) for lane in lanes for fan_out in FEW.fan_out for size in FEW.message_bytes
    ]
    for row in report.rows:
        assert isinstance(row["p50_us"], float)
        assert isinstance(row["p99_us"], float)
        assert 0 < row["p50_us"] <= row["p99_us"]
    assert {"socket_over_raw_2x8KiB", "grpc_over_socket_2x8KiB"} <= report.facts.keys()
    assert not of_bench(psutil.Process().children(recursive=True))


@pytest.mark.slow
def test_nobody_is_left_after_an_error() -> None:
    def dies(what: str, done: int, total: int) -> None:
        """Kill one replica when the rounds begin."""
        if what == "rounds" and done == 0:
            replicas = of_bench(psutil.Process().children())
            next(process for process in replicas if "echo_process" in process.cmdline()[-1]).kill()

    with pytest.raises(ChildFailed):
        run_transport(FEW, dies)
    assert not of_bench(psutil.Process().children(recursive=True))


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_nobody_is_left_when_the_bench_is_stopped(ending: signal.Signals) -> None:
    code = (
        "from moe_ray.bench.transport import *\n"
        "options = TransportBenchOptions(carriers=('socket',), fan_out=(2,), rounds=1_000_000)\n"
        "run_transport(options, lambda what, done, total: print(what, flush=True))"
    )
    bench = subprocess.Popen(
        [sys.executable, "-c", f"import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{code}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert bench.stdout is not None
    while bench.stdout.readline().strip() != "rounds":
        assert bench.poll() is None
    time.sleep(0.5)
    started = of_bench(psutil.Process(bench.pid).children(recursive=True))
    assert len(started) == 3
    os.kill(bench.pid, ending)
    bench.communicate(timeout=30)
    assert not psutil.wait_procs(started, timeout=20)[1]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (TransportBenchOptions(carriers=("pigeon",)), "--carriers: pigeon; allowed: raw, socket, grpc, ray"),
        (TransportBenchOptions(fan_out=(0,)), "--fan-out"),
        (TransportBenchOptions(message_bytes=(8193,)), "--bytes"),
        (TransportBenchOptions(rounds=0), "--rounds"),
    ],
)
def test_wrong_options_are_named(options: TransportBenchOptions, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        run_transport(options, silent)
