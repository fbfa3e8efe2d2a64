"""`moe-ray bench chaos`: kill -9 of experts and trunks under streaming load, every answer compared with a calm one."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import httpx
import psutil

from moe_ray.bench.http_load import connect, id_prompts, percentile, served_model
from moe_ray.bench.lab.storm import Storm, StormAnswer, changed_tokens
from moe_ray.bench.m1 import SMALL, bench_model, resolve_bench_model
from moe_ray.bench.processes import own_server, tree
from moe_ray.bench.report import Plot, Report, Row, machine_facts
from moe_ray.config import load_config
from moe_ray.model.model_config import ModelConfig

Progress = Callable[[str, int, int], None]

PLOT = Plot("kills", "stall_p99_ms", "scenario")
REPLICA: Final = "ray::ServeReplica:moe-ray:"
"""How Ray names the processes of our deployments."""
RECOVERY_S: Final = 60.0
"""How long a killed replica's successor may take before the bench goes on without."""
LOOK_S: Final = 1.0
"""How often it is asked who is whole; every replica answers, which costs what is measured."""
SETTLE_S: Final = 0.5
"""Between seeing that a successor answers and the next kill: trunks link to it meanwhile."""


@dataclass(frozen=True, slots=True)
class ChaosOptions:
    """What is killed, and under what load. The defaults end within ten minutes on two cores."""

    model: str | None = None
    """Default: a small random model, whose replicas start quickly."""
    kills: int = 50
    """Of expert replicas, each expert having two."""
    single_kills: int = 10
    """Of experts that have one replica."""
    trunk_kills: int = 10
    """Of two trunks."""
    streams: int = 16
    prompt_tokens: int = 32
    output_tokens: int = 96
    seed: int = 0
    interval_s: float = 2.0
    """From one kill to the next, at least; the victim's successor must be there too."""
    phase_s: float = 240.0
    """A scenario that takes longer ends with the kills it had."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """Who is killed."""

    name: str
    deployment: str
    kills: int
    each: int
    """Replicas that the victim's deployment must have before one of them is killed."""


def stalls_ms(answers: Sequence[StormAnswer], kills: Sequence[float]) -> list[float]:
    """For each kill, of every stream that was running then, the gap between tokens in which it fell."""
    gaps = []
    for answer in answers:
        times = [answer.started, *answer.arrivals]
        for kill in kills:
            for before, after in itertools.pairwise(times):
                if before <= kill < after:
                    gaps.append(1e3 * (after - before))
    return gaps


def replicas(pid: int, deployment: str) -> list[psutil.Process]:
    """The server's processes of one deployment (`Expert` stands for all of them)."""
    found = []
    for process in tree(pid):
        with suppress(psutil.NoSuchProcess):
            name = " ".join(process.cmdline())
            if name.startswith(REPLICA + deployment) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def run_chaos(options: ChaosOptions, on_progress: Progress) -> Report:
    """Run the three scenarios on servers of their own. Raises `NotReady`, `ConfigError`, `CheckpointError`."""
    config = load_config()
    directory = (
        bench_model(config.cache_dir, on_progress, SMALL)
        if options.model is None
        else resolve_bench_model(options.model, config, on_progress)
    )
    vocab_size = ModelConfig.load(directory).vocab_size
    draw = random.Random(options.seed)
    prompts = list(id_prompts(options.streams, options.prompt_tokens, vocab_size, str(options.seed)))
    rows: list[Row] = []
    errors: list[str] = []
    two_each = {"MOE_RAY_EXPERTS__NUM_REPLICAS": "2"}
    two_trunks = {"MOE_RAY_TRUNK__NUM_REPLICAS": "2"}
    plan = [
        (two_each, [Scenario("experts of two replicas", "Expert", options.kills, 2)]),
        (
            two_trunks,
            [
                Scenario("experts of one replica", "Expert", options.single_kills, 1),
                Scenario("two trunks", "Trunk", options.trunk_kills, 2),
            ],
        ),
    ]
    for settings, scenarios in plan:
        wanted = [scenario for scenario in scenarios if scenario.kills]
        if not wanted:
            continue
        on_progress("start the server", 0, 1)
        with own_server(directory, settings) as server:
            on_progress("start the server", 1, 1)
            for scenario in wanted:
                run = _Run(options, server.url, server.pid, scenario, on_progress)
                row, failures = asyncio.run(run.scenario_row(prompts, draw))
                rows.append(row)
                errors += failures
    facts = {
        "model": directory.name,
        "streams": options.streams,
        "prompt_tokens": options.prompt_tokens,
        "output_tokens": options.output_tokens,
        "seed": options.seed,
        **({"error_samples": sorted(set(errors))[:3]} if errors else {}),
        **machine_facts(),
    }
    return Report("chaos", rows, facts)


@dataclass(slots=True)
class _Run:
    options: ChaosOptions
    url: str
    pid: int
    scenario: Scenario
    on_progress: Progress

    async def scenario_row(self, prompts: Sequence[Sequence[int]], draw: random.Random) -> tuple[Row, list[str]]:
        o = self.options
        async with connect(self.url, None, 120.0) as client:
            storm = Storm(self.url, await served_model(self.url, None), prompts, o.output_tokens)
            calm, rates = await storm.calm()
            load = asyncio.create_task(storm.run())
            killed = await self._kill(client, draw)
            await asyncio.sleep(2 * SETTLE_S)
            storm.ending = True
            rate = await load
        failed = [answer.error for answer in storm.answers if answer.error]
        stalls = stalls_ms(storm.answers, killed)
        row: Row = {
            "scenario": self.scenario.name,
            "kills": len(killed),
            "requests": len(storm.answers),
            "failed_requests": len(failed),
            "changed_tokens": changed_tokens(storm.answers, calm),
            "stall_p50_ms": _rounded(percentile(stalls, 50)),
            "stall_p99_ms": _rounded(percentile(stalls, 99)),
            "throughput_ratio": round(rate / statistics.median(rates), 3),
        }
        return row, failed

    async def _kill(self, client: httpx.AsyncClient, draw: random.Random) -> list[float]:
        """Kill one replica after the other; when, on the client's clock."""
        killed: list[float] = []
        end = time.monotonic() + self.options.phase_s
        self.on_progress(self.scenario.name, 0, self.scenario.kills)
        while len(killed) < self.scenario.kills and time.monotonic() < end:
            victim = await self._victim(client, draw)
            if victim is None:
                break
            await asyncio.sleep(SETTLE_S)
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                killed.append(time.perf_counter())
                self.on_progress(self.scenario.name, len(killed), self.scenario.kills)
            await asyncio.sleep(self.options.interval_s)
        return killed

    async def _victim(self, client: httpx.AsyncClient, draw: random.Random) -> int | None:
        """A process of a deployment that is whole; None where there is none within `RECOVERY_S`."""
        end = time.monotonic() + RECOVERY_S
        while time.monotonic() < end:
            whole = await self._whole(client)
            if whole:
                return draw.choice(draw.choice(whole))
            await asyncio.sleep(LOOK_S)
        return None

    async def _whole(self, client: httpx.AsyncClient) -> list[list[int]]:
        """The processes of each deployment that has as many answering replicas as it should."""
        if self.scenario.deployment == "Trunk":
            trunks = await asyncio.to_thread(replicas, self.pid, "Trunk")
            linked = [process.pid for process in trunks if await asyncio.to_thread(self._linked, process)]
            return [sorted(linked)] if len(linked) >= self.scenario.each else []
        try:
            listed: list[dict[str, Any]] = (await client.get("/experts", timeout=10)).json()["experts"]
        except (httpx.HTTPError, ValueError, KeyError):
            return []
        groups = [sorted(replica["pid"] for replica in expert["replicas"]) for expert in listed]
        return [pids for pids in groups if len(pids) >= self.scenario.each]

    def _linked(self, trunk: psutil.Process) -> bool:
        """Whether a gateway holds a connection to this trunk."""
        with suppress(psutil.Error):
            ports = {c.laddr.port for c in trunk.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
            return any(
                c.raddr and c.raddr.port in ports and c.status == psutil.CONN_ESTABLISHED
                for gateway in replicas(self.pid, "Gateway")
                for c in gateway.net_connections("tcp")
            )
        return False


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
