"""`moe-ray bench trunks`: one trunk against several that share its experts, and what known prefixes save."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import secrets
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from moe_ray.bench.child import Child, children
from moe_ray.bench.http_load import LEAST_ID, connect, id_prompts, percentile, served_model
from moe_ray.bench.lab.emulate import ServiceTime, even
from moe_ray.bench.lab.fleet import Fleet, FleetShape, Trunks
from moe_ray.bench.lab.storm import Storm, changed_tokens
from moe_ray.bench.m1 import SMALL, bench_model, resolve_bench_model
from moe_ray.bench.processes import MOE_RAY, OwnServer, own_server
from moe_ray.bench.report import Plot, Report, Row, machine_facts
from moe_ray.config import load_config
from moe_ray.errors import NotReady
from moe_ray.experts.client.options import DispatchOptions
from moe_ray.experts.planning.placement import holds_experts
from moe_ray.experts.server.worker import MAX_BATCHED_ROWS
from moe_ray.model.model_config import ModelConfig

Progress = Callable[[str, int, int], None]

PLOT = Plot("trunks", "rows_per_batch", "routing")
WARM_UPS: Final = 20
"""How often the load is sent until every trunk has had some."""
COUNTED: Final = ("calls", "batches", "rows", "busy_s")
"""Fields of `Counts`, as experts name them."""
EMULATED: Final = FleetShape(8, 8, 8, 32, ServiceTime(6000.0, 50.0), trunk_us=4000.0)
"""8 experts, 8 layers, 8 tokens a step."""
EMULATED_WARM_S, EMULATED_S = 3.0, 8.0
ASK_S: Final = 60.0
"""How long the server may take to say what its actors did."""


@dataclass(frozen=True, slots=True)
class TrunksOptions:
    """What is served, and under what load. The defaults take about three minutes on two cores."""

    model: str | None = None
    """Default: a small random model, whose replicas start quickly."""
    trunks: int = 2
    streams: int = 16
    prompt_tokens: int = 32
    output_tokens: int = 96
    rounds: int = 3
    """Answers of each stream."""
    conversations: int = 12
    """At once; each asks again when it is answered."""
    turns: int = 5
    first_tokens: int = 512
    """Of a conversation's first prompt."""
    turn_tokens: int = 128
    """By which every further prompt is longer than the one before. Answers are not in it: they are told as text."""
    answer_tokens: int = 16
    emulated: tuple[int, ...] = (1, 2, 4, 8)
    """Trunks before emulated experts."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Counts:
    """What all experts together, or all trunks, have done since they started."""

    calls: int = 0
    batches: int = 0
    """In which an expert computed them: several trunks' calls that wait together are one."""
    rows: int = 0
    busy_s: float = 0.0

    def __sub__(self, before: Counts) -> Counts:
        return Counts(
            self.calls - before.calls,
            self.batches - before.batches,
            self.rows - before.rows,
            self.busy_s - before.busy_s,
        )


@dataclass(frozen=True, slots=True)
class Turn:
    """One question of a conversation."""

    number: int
    prompt_tokens: int
    cached_tokens: int
    known_tokens: int
    """Of the prompt: those of the turn before."""
    seconds: float


def run_trunks(options: TrunksOptions, on_progress: Progress) -> Report:
    """Measure three servers of its own in turn. Raises `NotReady`, `ConfigError`, `CheckpointError`."""
    config = load_config()
    directory = (
        bench_model(config.cache_dir, on_progress, SMALL)
        if options.model is None
        else resolve_bench_model(options.model, config, on_progress)
    )
    vocab_size = ModelConfig.load(directory).vocab_size
    cases = [(1, True), (options.trunks, True), (options.trunks, False)]
    rows: list[Row] = []
    talks: list[Row] = []
    first: dict[int, list[str]] = {}
    for trunks, affinity in cases:
        settings = {"MOE_RAY_TRUNK__NUM_REPLICAS": str(trunks), "MOE_RAY_TRUNK__AFFINITY": str(affinity).lower()}
        on_progress("start the server", len(rows), len(cases))
        with own_server(directory, settings) as server:
            run = _Run(options, server, vocab_size, trunks, "known prefix" if affinity else "load alone")
            row, turns = asyncio.run(run.measure(first, on_progress))
        rows.append(row)
        talks.append({"trunks": trunks, "routing": run.routing, **talk_row(turns)})
    facts: dict[str, object] = {
        "model": directory.name,
        **{name: getattr(options, name) for name in ("streams", "prompt_tokens", "output_tokens", "rounds")},
        **{name: getattr(options, name) for name in ("conversations", "turns", "first_tokens", "turn_tokens")},
        "load_5_min": round(os.getloadavg()[1], 1),
        **machine_facts(),
    }
    more = {"conversations": talks}
    if options.emulated:
        more["emulated experts"] = emulated_rows(options.emulated, config.cache_dir, on_progress)
    return Report("trunks", rows, facts, more)


def emulated_rows(counts: Sequence[int], native_dir: Path, on_progress: Progress) -> list[Row]:
    """A row for each number of trunks, without and with batches of several trunks' calls.

    Pool, carrier and the experts' worker are real; computing is time spent asleep, so that two cores can stand for many
    cards. What it costs an expert to read its weights is most of a call, as it is where few tokens are decoded.
    """
    token, rows = secrets.token_hex(16), list[Row]()
    cases = [(count, most) for count in counts for most in (1, MAX_BATCHED_ROWS)]
    with children() as start:
        hosts = [start("moe_ray.bench.lab.worker_process", f"emulated experts {i}") for i in range(2)]
        for done, (count, most) in enumerate(cases):
            on_progress("emulated experts", done, len(cases))
            rows.append({"trunks": count, "batched": most > 1, **_emulated(hosts, token, count, most, native_dir)})
    on_progress("emulated experts", len(cases), len(cases))
    return rows


def _emulated(hosts: list[Child], token: str, count: int, most: int, native_dir: Path) -> Row:
    fleet = Fleet(hosts, EMULATED, token, settings={"hidden": EMULATED.hidden, "max_batched_rows": most})
    fleet.scale(even(EMULATED.num_experts, EMULATED.num_experts), at_once=True)
    trunks = Trunks(fleet, count, 1, [1.0] * EMULATED.num_experts, native_dir, DispatchOptions())

    def counted() -> Counts:
        asked = [host.ask("counts") for host in hosts]
        return Counts(*(sum(each[key] for each in asked) for key in COUNTED))

    trunks.start()
    try:
        time.sleep(EMULATED_WARM_S)
        before, began = counted(), time.monotonic()
        time.sleep(EMULATED_S)
        done, ended = counted() - before, time.monotonic()
        steps = trunks.between(began, ended)
    finally:
        trunks.stop()
        fleet.stop()
    seconds = ended - began
    return {
        "tokens_per_s": round(len(steps) * EMULATED.tokens / seconds, 1),
        "step_p50_ms": _ms(percentile([step.took_s for step in steps], 50)),
        **batch_row(done, seconds),
    }


def talk_row(turns: Sequence[Turn]) -> Row:
    """What all turns but the first ones found in a prefix cache, and how long their answers took."""
    later = [turn for turn in turns if turn.number]
    prompt = sum(turn.prompt_tokens for turn in later)
    return {
        "turns": len(later),
        "cached_share": round(sum(turn.cached_tokens for turn in later) / max(prompt, 1), 3),
        "known_share": round(sum(turn.known_tokens for turn in later) / max(prompt, 1), 3),
        "answer_p50_ms": _ms(percentile([turn.seconds for turn in later], 50)),
        "answer_p99_ms": _ms(percentile([turn.seconds for turn in later], 99)),
    }


def batch_row(done: Counts, seconds: float) -> Row:
    """What the experts' calls were computed as."""
    return {
        "calls": done.calls,
        "batches": done.batches,
        "rows_per_call": round(done.rows / max(done.calls, 1), 3),
        "calls_per_batch": round(done.calls / max(done.batches, 1), 3),
        "rows_per_batch": round(done.rows / max(done.batches, 1), 3),
        "experts_busy": round(done.busy_s / seconds, 3) if seconds else None,
    }


def expert_counts(actors: Mapping[str, Sequence[Mapping[str, Any]]]) -> Counts:
    """Sum what all actors of experts say of themselves."""
    found = [actor for name, each in actors.items() if holds_experts(name) for actor in each]
    return Counts(*(sum(actor[key] for actor in found) for key in COUNTED))


@dataclass(slots=True)
class _Run:
    options: TrunksOptions
    server: OwnServer
    vocab_size: int
    trunks: int
    routing: str

    async def measure(self, first: dict[int, list[str]], on_progress: Progress) -> tuple[Row, list[Turn]]:
        """The row of one server, and the turns of all its conversations. `first` is filled by the first server."""
        o, what = self.options, f"{self.trunks} trunk(s), {self.routing}"
        prompts = list(id_prompts(o.streams, o.prompt_tokens, self.vocab_size, str(o.seed)))
        async with connect(self.server.url, None, 120.0, o.conversations) as client:
            storm = Storm(self.server.url, await served_model(self.server.url, None), prompts, o.output_tokens)
            on_progress(what, 0, 3)
            await self._warm_up(storm)
            first.update({} if first else {answer.prompt: answer.tokens for answer in storm.answers})
            storm.answers.clear()
            on_progress(what, 1, 3)
            before, started = expert_counts(await self._actors()), time.perf_counter()
            rate = await storm.run(o.rounds)
            seconds = time.perf_counter() - started
            done = expert_counts(await self._actors()) - before
            on_progress(what, 2, 3)
            talks = await asyncio.gather(*(self._talk(client, storm.model, each) for each in range(o.conversations)))
            on_progress(what, 3, 3)
        row: Row = {
            "trunks": self.trunks,
            "routing": self.routing,
            "tokens_per_s": round(rate, 1),
            **batch_row(done, seconds),
            "failed_requests": sum(answer.error is not None for answer in storm.answers),
            "changed_tokens": changed_tokens(storm.answers, first),
        }
        return row, list(itertools.chain.from_iterable(talks))

    async def _warm_up(self, storm: Storm) -> None:
        """Send the load until every trunk has had some. Raises `NotReady`."""
        for _ in range(WARM_UPS):
            await storm.run(1)
            if error := next((answer.error for answer in storm.answers if answer.error), None):
                raise NotReady(f"a request failed: {error}")
            trunks = (await self._actors())["Trunk"]
            if len(trunks) == self.trunks and all(trunk["generated_tokens"] for trunk in trunks):
                return
        raise NotReady(f"{WARM_UPS} rounds of requests did not reach {self.trunks} trunks")

    async def _actors(self) -> dict[str, list[dict[str, Any]]]:
        """Deployment → what each of its actors says; from another process: this one outlives several servers' Rays."""
        command = [*MOE_RAY, "status", "--address", self.server.ray_address, "--json"]
        asked = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, check=False, timeout=ASK_S
        )
        if asked.returncode:
            raise NotReady(f"`moe-ray status` failed: {asked.stderr.strip()[-200:]}")
        return {each["name"]: each["actors"] for each in json.loads(asked.stdout)["deployments"]}

    async def _talk(self, client: httpx.AsyncClient, model: str, number: int) -> list[Turn]:
        o, draw = self.options, random.Random(f"{self.options.seed} {number}")
        prompt: list[int] = []
        turns = []
        for turn in range(o.turns):
            known = len(prompt)
            prompt += [
                draw.randrange(LEAST_ID, self.vocab_size) for _ in range(o.turn_tokens if turn else o.first_tokens)
            ]
            body = {"model": model, "prompt": prompt, "max_tokens": o.answer_tokens, "temperature": 0}
            started = time.perf_counter()
            response = await client.post("/v1/completions", json={**body, "ignore_eos": True})
            if response.status_code != 200:
                raise NotReady(f"a conversation failed: HTTP {response.status_code}: {response.text[:200]}")
            cached = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            turns.append(Turn(turn, len(prompt), cached, known, time.perf_counter() - started))
        return turns


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 1)
