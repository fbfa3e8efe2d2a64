"""`moe-ray bench gateway`: what HTTP costs: tokens/s of a server beside those of its trunk, asked without a gateway."""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import psutil
import ray
from ray import serve

from moe_ray.bench.http_load import Sample, Target, Wave, id_prompts, percentile, run_wave, served_model
from moe_ray.bench.m1 import resolve_bench_model
from moe_ray.bench.processes import OwnServer, own_server, tree
from moe_ray.bench.report import Plot, Report, Row, machine_facts
from moe_ray.bench.serve import Progress
from moe_ray.config import load_config
from moe_ray.core import Request, SamplingParams
from moe_ray.deploy.discovery import discover_trunks
from moe_ray.deploy.link_options import link_options
from moe_ray.deploy.loading_board import NAMESPACE
from moe_ray.deploy.local_ray import join
from moe_ray.deploy.servers import APP_NAME
from moe_ray.errors import ConfigError, NotReady
from moe_ray.gateway.sessions import Sessions
from moe_ray.model.model_config import ModelConfig

PLOT = Plot("concurrency", "http_tokens_per_s", "ingress")
INGRESSES = ("direct", "python", "haproxy")
TRUNK_WITHIN_S = 60.0


@dataclass(frozen=True, slots=True)
class GatewayBenchOptions:
    """What is measured."""

    model: str | None = None
    """Default: M1."""
    ingress: str = "direct"
    """One of `INGRESSES`."""
    concurrency: tuple[int, ...] = (32,)
    repeats: int = 3
    prompt_tokens: int = 16
    output_tokens: int = 64


@dataclass(slots=True)
class _Turns:
    """What the repeats of one concurrency gave."""

    trunk: list[Wave] = field(default_factory=list)
    http: list[Wave] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    """Of the gateway and Serve's proxies, a token over HTTP."""


def run_gateway(options: GatewayBenchOptions, on_progress: Progress) -> Report:
    """Ask a server's trunk and its HTTP port for the same, in turn.

    Raises `ConfigError` for what cannot be asked, and `NotReady` where the server does not come up or a request fails.
    """
    if options.ingress not in INGRESSES:
        raise ConfigError(f"--ingress: {options.ingress}; allowed: {', '.join(INGRESSES)}")
    directory = resolve_bench_model(options.model, load_config(), on_progress)
    vocab_size = ModelConfig.load(directory).vocab_size
    on_progress("start the server", 0, 1)
    with own_server(directory, arguments=("--ingress", options.ingress)) as server, _joined(server):
        on_progress("start the server", 1, 1)
        rows = asyncio.run(_measure(options, server, vocab_size, on_progress))
    facts = {
        "model": directory.name,
        "prompt_tokens": options.prompt_tokens,
        "output_tokens": options.output_tokens,
        "repeats": options.repeats,
        **machine_facts(),
    }
    return Report("gateway", rows, facts)


@contextmanager
def _joined(server: OwnServer) -> Iterator[None]:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    join(server.ray_address, namespace=NAMESPACE, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


async def _measure(
    options: GatewayBenchOptions, server: OwnServer, vocab_size: int, on_progress: Progress
) -> list[Row]:
    config = load_config()
    trunk = serve.get_deployment_handle("Trunk", APP_NAME)
    sessions = Sessions(discover_trunks(trunk), link_options(config), config.experts.deadline_s)
    sessions.start()
    await sessions.ensure_trunk(TRUNK_WITHIN_S)
    target = Target(server.url, await served_model(server.url, None), options.output_tokens)
    door = _door(server.pid)
    turns = {count: _Turns() for count in options.concurrency}
    for repeat in range(-1, options.repeats):  # the first warms up
        for count, found in turns.items():
            make = partial(id_prompts, count, options.prompt_tokens, vocab_size)
            by_trunk = await _trunk_wave(sessions, list(make(f"trunk {count} {repeat}")), options.output_tokens)
            before = _cpu_s(door)
            by_http = await run_wave(target, list(make(f"http {count} {repeat}")), count, lambda: None)
            cpu_s = _cpu_s(door) - before
            if errors := [sample.error for sample in by_http.samples if sample.error]:
                raise NotReady(f"a request to {server.url} failed: {errors[0]}")
            if repeat >= 0:
                found.trunk.append(by_trunk)
                found.http.append(by_http)
                found.cpu_ms.append(1e3 * cpu_s / _tokens(by_http))
            on_progress(f"concurrency {count}", repeat + 2, options.repeats + 1)
    return [_row(options.ingress, count, found) for count, found in turns.items()]


def _row(ingress: str, count: int, found: _Turns) -> Row:
    pairs = list(zip(found.trunk, found.http, strict=True))
    shares = [1 - _rate(http) / _rate(trunk) for trunk, http in pairs]
    row: Row = {"ingress": ingress, "concurrency": count}
    row["trunk_tokens_per_s"] = round(statistics.median(map(_rate, found.trunk)), 2)
    row["http_tokens_per_s"] = round(statistics.median(map(_rate, found.http)), 2)
    row["share"] = round(statistics.median(shares), 4)
    row["share_min"], row["share_max"] = round(min(shares), 4), round(max(shares), 4)
    row["cpu_ms_per_token"] = round(statistics.median(found.cpu_ms), 3)
    # The client is on these cores, too, and writes and reads JSON: no cost of the server's.
    row["client_cpu_ms_per_token"] = round(
        statistics.median(1e3 * wave.cpu_s / _tokens(wave) for wave in found.http), 3
    )
    row["trunk_ttft_p50_ms"], row["http_ttft_p50_ms"] = (
        round(percentile([1e3 * (s.arrivals[0] - s.started) for wave in waves for s in wave.samples], 50) or 0.0, 1)
        for waves in (found.trunk, found.http)
    )
    return row


def _tokens(wave: Wave) -> int:
    return sum(sample.tokens for sample in wave.samples)


def _rate(wave: Wave) -> float:
    return _tokens(wave) / wave.wall_s


async def _trunk_wave(sessions: Sessions, prompts: Sequence[list[int]], output_tokens: int) -> Wave:
    """All prompts at once, over a gateway's stream to its trunk, without its text and its HTTP."""
    started, cpu = time.perf_counter(), time.process_time()
    sampling = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)

    async def complete(number: int, prompt: list[int]) -> Sample:
        sample = Sample(time.perf_counter())
        session = sessions.open([(0, Request(f"bench-{time.time_ns()}-{number}", tuple(prompt), sampling))])
        try:
            while sample.tokens < output_tokens:
                told = await session.next()
                assert told is not None, "without a timeout there is an event"
                if told[1].error is not None:
                    raise NotReady(f"the trunk failed: {told[1].error}")
                sample.tokens += len(told[1].token_ids)
                sample.arrivals.append(time.perf_counter())
        finally:
            session.close()
        sample.ended = time.perf_counter()
        return sample

    samples = await asyncio.gather(*(complete(i, prompt) for i, prompt in enumerate(prompts)))
    return Wave(list(samples), time.perf_counter() - started, time.process_time() - cpu)


def _door(pid: int) -> list[psutil.Process]:
    """The gateway of a server, and what stands before it."""
    named = [(process, " ".join(process.cmdline())) for process in tree(pid)]
    return [each for each, name in named if any(part in name for part in (":Gateway", "ProxyActor", "haproxy "))]


def _cpu_s(processes: Sequence[psutil.Process]) -> float:
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))
