"""`moe-ray bench scale`: an expert gets a second replica and loses it again, under streaming load."""

from __future__ import annotations

import asyncio
import itertools
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import httpx
import ray

from moe_ray.bench.http_load import connect, id_prompts, percentile, served_model
from moe_ray.bench.lab.storm import Storm, StormAnswer, changed_tokens
from moe_ray.bench.m1 import SMALL, bench_model, resolve_bench_model
from moe_ray.bench.processes import OwnServer, own_server
from moe_ray.bench.report import Plot, Report, Row, machine_facts
from moe_ray.config import load_config
from moe_ray.deploy.replica_targets import set_replicas
from moe_ray.deploy.servers import APP_NAME, find_application
from moe_ray.errors import NotReady
from moe_ray.model.model_config import ModelConfig

Progress = Callable[[str, int, int], None]

PLOT = Plot("phase", "step_p99_ms", None)
CALM, UP, DOWN = "unchanged", "scaled up", "scaled down"
POLL_S: Final = 0.5
LATE_S: Final = 60.0
"""How long a replica may take to come or go."""


@dataclass(frozen=True, slots=True)
class ScaleOptions:
    """What is scaled, how often, and under what load. The defaults take about three minutes on two cores."""

    model: str | None = None
    """Default: a small random model, whose replicas start quickly."""
    expert: int = 3
    cycles: int = 5
    """Each: unchanged, a second replica comes, it goes again."""
    streams: int = 4
    prompt_tokens: int = 32
    output_tokens: int = 96
    window_s: float = 8.0
    """How long each phase is measured, the change included."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of time on the client's clock."""

    name: str
    start: float
    end: float
    done_s: float | None
    """When the change was complete, from its start."""


def steps_ms(answers: Sequence[StormAnswer], start: float, end: float) -> list[float]:
    """Gaps between a stream's tokens, of those gaps that ended from `start` to `end`."""
    return [
        1e3 * (after - before)
        for answer in answers
        for before, after in itertools.pairwise(answer.arrivals)
        if start <= after < end
    ]


def phase_rows(answers: Sequence[StormAnswer], phases: Sequence[Phase]) -> list[Row]:
    """A row per kind of phase; ratios are medians over cycles, each to the unchanged phase of its cycle."""
    rows: list[Row] = []
    figures = {
        phase: [percentile(steps_ms(answers, phase.start, phase.end), p) or 0.0 for p in (50, 99)] for phase in phases
    }
    calm = [figures[phase] for phase in phases if phase.name == CALM]
    for name in (CALM, UP, DOWN):
        mine = [phase for phase in phases if phase.name == name]
        gaps = [gap for phase in mine for gap in steps_ms(answers, phase.start, phase.end)]
        done = [phase.done_s for phase in mine if phase.done_s is not None]
        ratios = [
            [a / b for a, b in zip(figures[phase], was, strict=True)] for phase, was in zip(mine, calm, strict=True)
        ]
        rows.append(
            {
                "phase": name,
                "times": len(mine),
                "steps": len(gaps),
                "step_p50_ms": round(percentile(gaps, 50) or 0.0, 2),
                "step_p99_ms": round(percentile(gaps, 99) or 0.0, 2),
                "longest_ms": round(max(gaps, default=0.0), 1),
                "p50_ratio": round(statistics.median(ratio[0] for ratio in ratios), 3),
                "p99_ratio": round(statistics.median(ratio[1] for ratio in ratios), 3),
                "done_s": round(statistics.median(done), 2) if done else None,
            }
        )
    return rows


def run_scale(options: ScaleOptions, on_progress: Progress) -> Report:
    """Scale one expert of a server of its own. Raises `NotReady`, `ConfigError`, `CheckpointError`."""
    config = load_config()
    directory = (
        bench_model(config.cache_dir, on_progress, SMALL)
        if options.model is None
        else resolve_bench_model(options.model, config, on_progress)
    )
    vocab_size = ModelConfig.load(directory).vocab_size
    prompts = list(id_prompts(options.streams, options.prompt_tokens, vocab_size, str(options.seed)))
    on_progress("start the server", 0, 1)
    with own_server(directory) as server:
        on_progress("start the server", 1, 1)
        logging.getLogger("ray").setLevel(logging.ERROR)
        find_application(server.ray_address)
        try:
            answers, calm, phases = asyncio.run(_measure(options, server, prompts, on_progress))
        finally:
            ray.shutdown()
    failed = [answer.error for answer in answers if answer.error]
    facts = {
        "model": directory.name,
        "expert": options.expert,
        "streams": options.streams,
        "prompt_tokens": options.prompt_tokens,
        "output_tokens": options.output_tokens,
        "window_s": options.window_s,
        "requests": len(answers),
        "failed_requests": len(failed),
        "changed_tokens": changed_tokens(answers, calm),
        **({"error_samples": sorted(set(failed))[:3]} if failed else {}),
        **machine_facts(),
    }
    return Report("scale", phase_rows(answers, phases), facts)


async def _measure(
    options: ScaleOptions, server: OwnServer, prompts: Sequence[Sequence[int]], on_progress: Progress
) -> tuple[list[StormAnswer], dict[int, list[str]], list[Phase]]:
    phases: list[Phase] = []
    async with connect(server.url, None, 120.0) as client:
        storm = Storm(server.url, await served_model(server.url, None), prompts, options.output_tokens)
        calm, _ = await storm.calm(1)
        load = asyncio.create_task(storm.run())
        await asyncio.sleep(1)
        plan = [(CALM, None), (UP, 2), (DOWN, 1)] * options.cycles
        for done, (name, replicas) in enumerate(plan):
            on_progress("phases", done, len(plan))
            phases.append(await _phase(options, client, name, replicas))
        on_progress("phases", len(plan), len(plan))
        storm.ending = True
        await load
    return storm.answers, calm, phases


async def _phase(options: ScaleOptions, client: httpx.AsyncClient, name: str, replicas: int | None) -> Phase:
    start, done_s = time.perf_counter(), None
    if replicas is not None:
        await asyncio.to_thread(set_replicas, APP_NAME, [options.expert], replicas)
    while True:
        await asyncio.sleep(POLL_S)
        spent, there = time.perf_counter() - start, len(await _replicas(client, options.expert))  # asking costs too
        if done_s is None and there == replicas:
            done_s = spent
        if spent >= options.window_s and (replicas is None or done_s is not None):
            return Phase(name, start, time.perf_counter(), done_s)
        if spent > LATE_S:
            raise NotReady(f"Expert{options.expert} has {there} replicas after {LATE_S:g} s, not {replicas}")


async def _replicas(client: httpx.AsyncClient, expert: int) -> list[dict[str, Any]]:
    listed = (await client.get("/experts", timeout=10)).json()["experts"]
    found: list[dict[str, Any]] = next(entry["replicas"] for entry in listed if entry["expert"] == expert)
    return found
