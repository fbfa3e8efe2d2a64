"""`moe-ray bench serve` against the served demo model: a real server, real streams."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from served import Served

from moe_ray.bench.processes import own_server, pss_mib
from moe_ray.bench.serve import ServeBenchOptions, run_serve
from moe_ray.errors import ConfigError, NotReady


def quiet(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def test_counts(served_demo: Served) -> None:
    said: list[tuple[str, int, int]] = []
    options = ServeBenchOptions(
        url=f"{served_demo.url}/v1",
        concurrency=(1, 2),
        requests=3,
        repeats=2,
        prompt_tokens=16,
        output_tokens=8,
        pid=os.getpid(),
    )
    report = run_serve(options, lambda *progress: said.append(progress))
    assert [row["concurrency"] for row in report.rows] == [1, 2]
    for row in report.rows:
        assert row["requests"] == 6
        assert row["errors"] == 0
        assert 0 < row["output_tokens_per_s_min"] <= row["output_tokens_per_s"] <= row["output_tokens_per_s_max"]  # type: ignore[operator]
        assert row["ttft_p50_ms"] <= row["e2e_p50_ms"] <= 1e3 * row["wall_s"]  # type: ignore[operator]
        assert 0 < row["client_cpu_fraction"] < 1  # type: ignore[operator]
    assert report.facts["model"] == "demo"
    assert report.facts["prompt_tokens_counted"] == [16]
    assert "error_samples" not in report.facts
    assert said[-1] == ("concurrency 2", 6, 6)
    memory = report.facts["pss_mib"]
    assert isinstance(memory, int)
    assert memory > 100


def test_text_prompts_have_as_many_tokens(served_demo: Served) -> None:
    options = ServeBenchOptions(
        url=served_demo.url,
        concurrency=(2,),
        requests=2,
        repeats=1,
        prompt_tokens=24,
        output_tokens=4,
        send="text",
        tokenizer=served_demo.config.model.path,
    )
    report = run_serve(options, quiet)
    assert report.rows[0]["errors"] == 0
    assert report.facts["prompt_tokens_counted"] == [24]


def test_the_command(served_demo: Served, tmp_path: Path) -> None:
    command = [Path(sys.executable).parent / "moe-ray", "bench", "serve", "--url", served_demo.url]
    small = ["--concurrency", "1", "--requests", "2", "--repeats", "1", "--prompt-tokens", "8", "--output-tokens", "4"]
    plot = tmp_path / "load.png"
    done = subprocess.run(
        [*command, *small, "--json", "--plot", str(plot)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["requests"] == 2
    assert plot.read_bytes().startswith(b"\x89PNG")
    # Streams that end early are errors: a peer that gives fewer tokens would seem fast.
    refused = subprocess.run(
        [*command, *small, "--extra", '{"max_tokens": 3}'], capture_output=True, text=True, timeout=120
    )
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].endswith("failed: 3 of 4 tokens, finish_reason 'length'")
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(NotReady, match=r"ended with status 1: error: .*config\.json"), own_server(tmp_path):
        pass
    assert signal.getsignal(signal.SIGTERM) is before


ONE_ACTOR = {"MOE_RAY_TRANSPORT": "local"}
"""Beside the gateway: it starts sooner than with actors for the experts."""


@pytest.mark.slow
def test_a_server_that_ends_meanwhile_is_told_with_its_last_lines(kernel_model: Path) -> None:
    def load() -> None:
        with own_server(kernel_model, ONE_ACTOR) as server:
            os.kill(server.pid, signal.SIGKILL)
            raise NotReady("the first request failed")

    with pytest.raises(NotReady, match=r"the server ended with status -9: .*moe-ray") as told:
        load()
    assert str(told.value.__cause__) == "the first request failed"


@pytest.mark.slow
def test_a_signal_is_told(kernel_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), own_server(kernel_model, ONE_ACTOR) as server:
        os.kill(os.getpid(), signal.SIGTERM)
    assert "told to end by SIGTERM" in capfd.readouterr().err
    assert not psutil.pid_exists(server.pid)


@pytest.mark.slow
def test_the_cost_of_http(kernel_model: Path) -> None:
    command = [Path(sys.executable).parent / "moe-ray", "bench", "gateway", "--model", kernel_model, "--json"]
    command += ["--ingress", "direct", "--concurrency", "2", "--repeats", "1", "--output-tokens", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, **ONE_ACTOR})
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert (row["ingress"], row["concurrency"]) == ("direct", 2)
    assert row["share"] == pytest.approx(1 - row["http_tokens_per_s"] / row["trunk_tokens_per_s"], abs=0.01)
    assert row["cpu_ms_per_token"] > 0
    refused = subprocess.run([*command[:3], "--ingress", "nginx"], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1
    assert "--ingress: nginx; allowed: direct, python, haproxy" in refused.stderr


def test_memory_of_a_process_that_is_not_there() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert not psutil.pid_exists(gone.pid)
    with pytest.raises(ConfigError, match=f"no process has the id {gone.pid}"):
        pss_mib(gone.pid)
