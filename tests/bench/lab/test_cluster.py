"""Hosts as network namespaces: the switch does what is asked, and a service over it answers right and outlives a host.

What needs no root is tested everywhere; the rest skips where a machine has no namespaces.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from reference import Reference

from moe_ray.bench.http_load import percentile
from moe_ray.bench.lab.cluster import GRID, SETTINGS, SOME, UNSHAPED, gaps_ms, longest_ms, predicted, spelled
from moe_ray.bench.lab.hosts import Hosts, check_machine, echo, hosts, ping_pong
from moe_ray.bench.lab.storm import StormAnswer
from moe_ray.bench.lab.switch import LinkShape, SwitchProcess, Traffic, members
from moe_ray.bench.m1 import M1 as RECIPE
from moe_ray.bench.m1 import config_json, write_tokenizer
from moe_ray.config import load_config
from moe_ray.errors import ConfigError
from moe_ray.experts.planning.network_step import Network, network_step
from moe_ray.model.model_config import ModelConfig
from moe_ray.text.tokenizer import Tokenizer

SLACK_MS = 3.0
"""What the processes of a busy machine may add to a median round trip."""


def why_not() -> str | None:
    try:
        check_machine()
    except ConfigError as error:
        return str(error)
    return None


WHY_NOT = why_not()
needs_hosts = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")


def test_a_shape_in_the_switchs_units() -> None:
    assert (LinkShape(0.5, 10.0).latency_ns, LinkShape(0.5, 10.0).ns_per_byte) == (500_000, 0.8)
    assert (UNSHAPED.latency_ns, UNSHAPED.ns_per_byte) == (0, 0.0)
    for wrong in ((-0.1, None), (0.0, 0.0), (0.0, -1.0)):
        with pytest.raises(ConfigError, match=r"latency from 0 ms and a bandwidth above 0 Gbit/s"):
            LinkShape(*wrong)


def test_traffic_adds_and_subtracts_by_kind() -> None:
    before, after = Traffic(5, 500, 1, 0), Traffic(7, 900, 1, 4)
    assert after - before == Traffic(2, 400, 0, 4)
    assert before + (after - before) == after


def test_the_default_networks_are_of_the_grid() -> None:
    assert len(GRID) == len(set(GRID)) == 9
    assert all(shape in GRID for shapes in SOME.values() for shape in shapes)


def test_a_prediction_is_the_unshaped_step_and_the_network() -> None:
    model = ModelConfig.from_dict(config_json(RECIPE))
    expected = network_step(model, "bfloat16", Network(0.5, 10.0), 8).network_ms
    assert predicted(7.0, model, "bfloat16", LinkShape(0.5, 10.0), 8) == pytest.approx(7.0 + expected)
    assert predicted(7.0, model, "bfloat16", UNSHAPED, 8) == 7.0


def test_the_wait_for_a_first_token_is_no_step() -> None:
    assert gaps_ms([StormAnswer(0, 0.0, list("abc"), [9.0, 9.5, 10.5]), StormAnswer(1, 0.0)]) == pytest.approx(
        [500, 1000]
    )


def test_a_streams_longest_wait_during_an_outage() -> None:
    one, other = StormAnswer(0, 1.0, list("ab"), [2.0, 6.0]), StormAnswer(1, 3.0, list("abc"), [3.5, 4.0, 9.0])
    assert longest_ms([one, other], 2.5, 5.0) == pytest.approx([4000, 5000]), "a wait may end after it"
    assert longest_ms([one, other], 3.2, 3.4) == pytest.approx([4000, 500]), "the wait for a first token counts"
    assert longest_ms([one], 7.0, 8.0) == []


def test_what_a_machine_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match=r"lacks root \(CAP_NET_ADMIN and CAP_SYS_ADMIN\), the command `ip`"):
        check_machine()


@pytest.fixture
def two() -> Iterator[Hosts]:
    with hosts(2, load_config().cache_dir) as made:
        yield made


@needs_hosts
def test_round_trips_take_what_is_asked(two: Hosts) -> None:
    address = two[1].address, echo(two[1])
    with two[0].inside():
        for latency_ms in (0.0, 1.0, 5.0):
            two.switch.shape(LinkShape(latency_ms))
            median_ms = (percentile(ping_pong(address, 100), 50) or 0.0) / 1e3
            assert 2 * latency_ms <= median_ms < 2 * latency_ms + SLACK_MS
        two.switch.shape(LinkShape(20.0), between=(0, 1))
        assert min(ping_pong(address, 3)) >= 40_000
    with pytest.raises(OSError, match=r"refused|unreachable|timed out"):  # the machine itself is on no such network
        socket.create_connection(address, timeout=0.5)


@needs_hosts
@pytest.mark.parametrize(("gbit", "megabytes"), [(0.1, 3), (0.5, 20)])
def test_a_port_lets_through_what_is_asked(two: Hosts, gbit: float, megabytes: int) -> None:
    two.switch.shape(LinkShape(0.1, gbit))
    with two[1].inside():
        listener = socket.create_server((two[1].address, 0))
    with two[0].inside():
        sender = socket.create_connection(listener.getsockname())
    receiver, _ = listener.accept()
    with listener, sender, receiver:
        sender.setblocking(False)
        left, got, data, began = megabytes * 10**6, 0, bytes(2**20), time.perf_counter()
        receiver.setblocking(False)
        while got < megabytes * 10**6:
            with contextlib.suppress(BlockingIOError):
                left -= sender.send(data[: min(left, len(data))]) if left else 0
            try:
                got += len(receiver.recv(2**20))
            except BlockingIOError:
                time.sleep(0.0002)
        reached = 8 * got / (time.perf_counter() - began) / 1e9
    assert 0.2 * gbit < reached < 1.1 * gbit
    sent = two.switch.traffic()[0, 1]
    assert sent.bytes > got
    assert sent.packets < got / 10_000, "few packets carry much"


@needs_hosts
def test_a_host_that_is_cut_off_hears_and_says_nothing(two: Hosts) -> None:
    address = two[1].address, echo(two[1])
    with two[0].inside(), socket.create_connection(address) as sock:
        sock.settimeout(0.5)
        two.switch.cut(1)
        sock.sendall(b"lost")
        with pytest.raises(TimeoutError):
            sock.recv(4)
        assert two.switch.traffic()[0, 1].cut > 0
        two.switch.heal(1)
        sock.settimeout(20)
        assert sock.recv(4) == b"lost", "TCP tries again"
    with pytest.raises(ConfigError, match="the switch has hosts 0 to 1, not 2"):
        two.switch.cut(2)


@needs_hosts
def test_nothing_is_left_behind(two: Hosts) -> None:
    with two[1].inside():
        sleeper = subprocess.Popen(["sleep", "100"])
    assert members(two[1].netns) == [sleeper.pid]
    assert members(two[0].netns) == []
    assert two.kill(1) == 1
    assert sleeper.wait(5) == -signal.SIGKILL


@needs_hosts
def test_who_is_killed_leaves_nobody_behind(tmp_path: Path) -> None:
    """kill -9 of the process that holds the hosts: nothing of it can run any more, the switch cleans up."""
    code = f"""
import subprocess, time
from pathlib import Path
from moe_ray.bench.lab.switch import SwitchProcess
from moe_ray.bench.lab.hosts import NetworkHost
switch = SwitchProcess(Path({str(load_config().cache_dir)!r}), 1, "10.77.0.0")
with NetworkHost(0, switch.addresses[0], switch.netns[0]).inside():
    print(subprocess.Popen(["sleep", "100"], start_new_session=True).pid, flush=True)
time.sleep(100)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    sleeper = int(holder.stdout.readline())
    holder.kill()
    holder.wait()
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            os.kill(sleeper, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a process on a host outlived its bench")


@needs_hosts
def test_too_many_hosts_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 to 64 hosts, not 65"):
        SwitchProcess(load_config().cache_dir, 65, "10.77.0.0")


@pytest.fixture
def model(random_model: Path, tmp_path: Path) -> Path:
    """The random Mixtral with a tokenizer of its own."""
    directory = tmp_path / "model"
    shutil.copytree(random_model, directory, ignore=shutil.ignore_patterns("tokenizer*", "generation_config.json"))
    write_tokenizer(directory, 512, 512)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    return directory


PROMPT, MAX_TOKENS = list(range(7, 40)), 24


@pytest.mark.slow
@needs_hosts
def test_hosts_serve_the_right_tokens_and_outlive_one_of_them(model: Path, random_reference: Reference) -> None:
    """Trunk on one host, experts on two, over two carriers; then an expert host is cut off."""
    tokenizer = Tokenizer(model)
    expected = [spelled(tokenizer, token) for token in random_reference.greedy(PROMPT, MAX_TOKENS)]
    settings = {
        **SETTINGS,
        "MOE_RAY_EXPERTS__EXPERTS_PER_ACTOR": "4",
        "MOE_RAY_EXPERTS__NUM_REPLICAS": "2",
        "MOE_RAY_EXPERTS__MAX_REPLICAS_PER_NODE": "1",
        "MOE_RAY_EXPERTS__CALL_TIMEOUT_S": "2",
    }

    def ask(url: str) -> list[str]:
        body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": MAX_TOKENS, "temperature": 0, "logprobs": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60, trust_env=False)
        assert answer.status_code == 200, answer.text
        tokens: list[str] = answer.json()["choices"][0]["logprobs"]["tokens"]
        return tokens

    with hosts(3, load_config().cache_dir) as cluster:
        for number in range(3):
            cluster.start_ray(number, {"role": "expert" if number else "trunk"})
        cluster.switch.shape(LinkShape(0.1, 10.0))
        for carrier in ("grpc", "socket"):
            with (
                cluster.serving(model, {**settings, "MOE_RAY_TRANSPORT": carrier}) as server,
                cluster[0].inside(),
            ):
                before = cluster.switch.traffic()
                assert ask(server.url) == expected
                after = cluster.switch.traffic()
                sent = [after[0, host].bytes - before[0, host].bytes for host in (1, 2)]
                rows = 4 * 2 * 64 * len(PROMPT) * 4  # layers, copies, hidden size, tokens, bytes
                assert sum(sent) > rows, "the rows went over the switch"
                if carrier == "socket":
                    cluster.switch.cut(2)
                    assert ask(server.url) == expected
                    assert cluster.switch.traffic()[0, 2].cut > 0
                    cluster.switch.heal(2)
                    assert ask(server.url) == expected
