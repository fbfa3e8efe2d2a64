"""`moe-ray bench cluster`: trunk and experts on hosts of their own, over networks of several speeds, and hosts lost."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from moe_ray.bench.http_load import id_prompts, percentile, served_model
from moe_ray.bench.lab.hosts import Hosts, check_machine, echo, hosts, ping_pong
from moe_ray.bench.lab.storm import Storm, StormAnswer, changed_tokens
from moe_ray.bench.lab.switch import LinkShape
from moe_ray.bench.m1 import RECIPE_VERSION, Recipe, make_model, resolve_bench_model
from moe_ray.bench.report import Plot, Report, Row, machine_facts
from moe_ray.config import load_config
from moe_ray.convert.demo import cached_model
from moe_ray.core import SamplingParams
from moe_ray.errors import NotReady
from moe_ray.experts.planning.network_step import Network, network_step
from moe_ray.llm import LLM
from moe_ray.model.compute.resolve import choose_dtype
from moe_ray.model.model_config import ModelConfig
from moe_ray.native import build
from moe_ray.text.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]
Tokens = dict[int, list[str]]

PLOT = Plot("predicted_ms", "step_p50_ms", "carrier", log_x=True, log_y=True)
WIDE = Recipe(
    hidden_size=2048,
    intermediate_size=256,
    num_attention_heads=16,
    num_key_value_heads=4,
    num_local_experts=4,
    vocab_size=4096,
)
"""Rows as wide as those of real models, in as many layers as M1, and little to compute: the network is what counts."""
UNSHAPED = LinkShape()
GRID: Final = [LinkShape(latency, gbit) for latency in (0.1, 0.5, 5.0) for gbit in (25.0, 10.0, 1.0)]
SOME: Final[Mapping[str, Sequence[LinkShape]]] = {  # in ten minutes, of the whole grid
    "socket": [*GRID[:3], LinkShape(0.5, 10.0), LinkShape(0.5, 1.0), LinkShape(5.0, 10.0)],
    "grpc": [LinkShape(0.1, 10.0), LinkShape(0.5, 1.0), LinkShape(5.0, 10.0)],
    "ray": [LinkShape(0.1, 10.0), LinkShape(0.5, 1.0)],
}
TRUNK, EXPERT = {"role": "trunk"}, {"role": "expert"}
SETTINGS: Final = {  # the head alone has CPUs: gateway and trunk are placed there, experts elsewhere
    "MOE_RAY_TRUNK__LABELS": json.dumps(TRUNK),
    "MOE_RAY_EXPERTS__LABELS": json.dumps(EXPERT),
    "MOE_RAY_EXPERTS__NUM_CPUS": "0",
    "MOE_RAY_ENGINE__MICRO_BATCHES": "1",  # the prediction assumes nothing to overlap
}
FAULTS: Final = ("cut off", "killed")
FAULT_STREAMS, FAULT_TOKENS = 8, 64
BEFORE_S, OUTAGE_S, AFTER_S = 4.0, 12.0, 4.0
RETURN_S: Final = 120.0
"""How long a host may take to get work again."""
RETURNED: Final = 0.1
"""It has, when so much of what the trunk sends goes there."""


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """What is served over which networks. The defaults end within ten minutes on two cores."""

    model: str | None = None
    """Default: `WIDE`."""
    carriers: tuple[str, ...] = ("socket", "grpc", "ray")
    streams: tuple[int, ...] = (1, 8)
    expert_hosts: int = 2
    prompt_tokens: int = 16
    output_tokens: int = 24
    full: bool = False
    """The whole grid for every carrier."""
    faults: bool = True
    seed: int = 0


def run_cluster(options: ClusterOptions, on_progress: Progress) -> Report:
    """Measure, predict, break. Raises `ConfigError` naming what this machine lacks, `NotReady`, `CheckpointError`."""
    check_machine()
    config = load_config()
    directory = wide_model(config.cache_dir, on_progress) if options.model is None else None
    directory = directory or resolve_bench_model(options.model, config, on_progress)
    model = ModelConfig.load(directory)
    most = max(*options.streams, FAULT_STREAMS)
    prompts = list(id_prompts(most, options.prompt_tokens, model.vocab_size, str(options.seed)))
    calm = single_host(directory, prompts, max(options.output_tokens, FAULT_TOKENS))
    dtype = choose_dtype(config.model.dtype, model.dtype, "cpu", build.cpu_flags(), build.kernels_here())
    bench = _Bench(options, model, dtype, directory, prompts, calm, on_progress)
    with hosts(1 + options.expert_hosts, config.cache_dir) as cluster:
        more = {"round trips": round_trips(cluster)}
        for number in range(1 + options.expert_hosts):
            on_progress("start Ray", number, 1 + options.expert_hosts)
            cluster.start_ray(number, EXPERT if number else TRUNK)
        on_progress("start Ray", 1 + options.expert_hosts, 1 + options.expert_hosts)
        rows = list(itertools.chain.from_iterable(bench.carrier_rows(cluster, each) for each in options.carriers))
        if options.faults:
            more["an expert host is lost and comes back"] = bench.fault_rows(cluster)
    facts = {"model": directory.name, "expert_hosts": options.expert_hosts, "prompt_tokens": options.prompt_tokens}
    return Report("cluster", rows, {**facts, "load": round(os.getloadavg()[2], 1), **machine_facts()}, more)


def wide_model(cache_dir: Path, progress: Progress) -> Path:
    """The directory of `WIDE` (0.3 GB), made first where it is absent. Raises `CheckpointError`."""
    key = hashlib.sha256(json.dumps([RECIPE_VERSION, asdict(WIDE)]).encode()).hexdigest()
    target = cache_dir.expanduser() / "bench-wide"
    return cached_model(target, key, lambda _, made: make_model(made, WIDE, progress), progress)


def single_host(directory: Path, prompts: Sequence[list[int]], max_tokens: int) -> Tokens:
    """Each prompt's greedy answer in this process, token by token as the API spells them."""
    llm = LLM(directory)
    outputs = llm.generate(prompts, SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True))
    return {i: [spelled(llm.tokenizer, token) for token in out.token_ids] for i, out in enumerate(outputs)}


def spelled(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as the completions API writes it in `logprobs.tokens`."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def predicted(unshaped_ms: float, model: ModelConfig, dtype: str, shape: LinkShape, streams: int) -> float:
    """Milliseconds of a step over a network, from those of an unshaped one, by `network_step.network_step`."""
    return network_step(model, dtype, Network(shape.latency_ms, shape.gbit), streams).step_ms(unshaped_ms)


def gaps_ms(answers: Sequence[StormAnswer]) -> list[float]:
    """Times between a stream's tokens: the steps, as its client sees them."""
    return [1e3 * (b - a) for answer in answers for a, b in itertools.pairwise(answer.arrivals)]


def longest_ms(answers: Sequence[StormAnswer], start: float, end: float) -> list[float]:
    """For each stream, its longest wait for a token, of those waits that overlap [start, end]."""
    longest: dict[int, float] = {}
    for answer in answers:
        for before, after in itertools.pairwise([answer.started, *answer.arrivals]):
            if before < end and after > start:
                longest[answer.prompt] = max(longest.get(answer.prompt, 0.0), 1e3 * (after - before))
    return list(longest.values())


def round_trips(cluster: Hosts, count: int = 200) -> list[Row]:
    """What a TCP ping-pong between the first two hosts takes, beside what was asked of the switch."""
    rows: list[Row] = []
    address = cluster[1].address, echo(cluster[1])
    with cluster[0].inside():
        for latency in (0.0, *dict.fromkeys(shape.latency_ms for shape in GRID)):
            cluster.switch.shape(LinkShape(latency))
            times = ping_pong(address, count if latency < 1 else count // 4)
            figures = {f"p{p}_us": round(percentile(times, p) or 0.0) for p in (50, 99)}
            rows.append({"one_way_ms": latency, "asked_us": round(2e3 * latency), **figures})
    cluster.switch.shape(UNSHAPED)
    return rows


@dataclass(slots=True)
class _Bench:
    options: ClusterOptions
    model: ModelConfig
    dtype: str
    directory: Path
    prompts: Sequence[Sequence[int]]
    calm: Tokens
    on_progress: Progress

    def carrier_rows(self, cluster: Hosts, carrier: str) -> list[Row]:
        """A row for each network and number of streams."""
        o = self.options
        where = {
            e: {"labels": {"host": cluster[1 + e % o.expert_hosts].name}} for e in range(self.model.num_local_experts)
        }
        settings = {**SETTINGS, "MOE_RAY_TRANSPORT": carrier, "MOE_RAY_EXPERTS__OVERRIDES": json.dumps(where)}
        shapes = GRID if o.full else SOME.get(carrier, GRID)
        rows: list[Row] = []
        with cluster.serving(self.directory, settings) as server, cluster[0].inside():
            for done, (shape, streams) in enumerate(itertools.product(shapes, o.streams)):
                self.on_progress(f"networks over {carrier}", done, len(shapes) * len(o.streams))
                # In turns, for the machine may be faster or slower the next minute.
                cluster.switch.shape(UNSHAPED)
                unshaped = asyncio.run(self._wave(server.url, streams))
                cluster.switch.shape(shape)
                rows.append(self._row(carrier, shape, unshaped, asyncio.run(self._wave(server.url, streams))))
            cluster.switch.shape(UNSHAPED)
        self.on_progress(f"networks over {carrier}", len(shapes) * len(o.streams), len(shapes) * len(o.streams))
        return rows

    async def _wave(self, url: str, streams: int) -> list[StormAnswer]:
        """One answer a stream, after one that is not told: by then TCP's and the carrier's windows have grown."""
        storm = Storm(url, await served_model(url, None), self.prompts[:streams], self.options.output_tokens, 300.0)
        await storm.run(1)
        await storm.run(1)
        if error := next((answer.error for answer in storm.answers if answer.error), None):
            raise NotReady(f"a request failed: {error}")
        return storm.answers[streams:]

    def _row(
        self, carrier: str, shape: LinkShape, unshaped: Sequence[StormAnswer], answers: Sequence[StormAnswer]
    ) -> Row:
        streams, (base, step) = len(answers), (percentile(gaps_ms(each), 50) or 0.0 for each in (unshaped, answers))
        expected = predicted(base, self.model, self.dtype, shape, streams)
        return {
            "carrier": carrier,
            "gbit": shape.gbit,
            "one_way_ms": shape.latency_ms,
            "streams": streams,
            "unshaped_ms": round(base, 2),
            "predicted_ms": round(expected, 2),
            "step_p50_ms": round(step, 2),
            "ratio": round(step / expected, 2),
            "predicted_tokens_per_s": round(1e3 * streams / expected, 1),
            "tokens_per_s": round(1e3 * streams / statistics.mean(gaps_ms(answers)), 1),
            "changed_tokens": changed_tokens([*unshaped, *answers], self.calm),
        }

    def fault_rows(self, cluster: Hosts) -> list[Row]:
        """A row for each fault of the last host, every expert having two replicas on different hosts."""
        settings = {
            **SETTINGS,
            "MOE_RAY_EXPERTS__NUM_REPLICAS": "2",
            "MOE_RAY_EXPERTS__MAX_REPLICAS_PER_NODE": "1",
        }
        rows = []
        with cluster.serving(self.directory, settings) as server, cluster[0].inside():
            for done, fault in enumerate(FAULTS):
                self.on_progress("faults", done, len(FAULTS))
                rows.append(asyncio.run(self._fault(cluster, server.url, fault)))
        self.on_progress("faults", len(FAULTS), len(FAULTS))
        return rows

    async def _fault(self, cluster: Hosts, url: str, fault: str) -> Row:
        victim = self.options.expert_hosts
        prompts = self.prompts[:FAULT_STREAMS]
        storm = Storm(url, await served_model(url, None), prompts, FAULT_TOKENS)
        await storm.run(1)
        storm.answers.clear()
        began, load = time.perf_counter(), asyncio.create_task(storm.run())
        await asyncio.sleep(BEFORE_S)
        struck = time.perf_counter()
        await asyncio.to_thread(cluster.switch.cut if fault == FAULTS[0] else cluster.kill, victim)
        await asyncio.sleep(OUTAGE_S)
        mended = time.perf_counter()
        if fault == FAULTS[0]:
            cluster.switch.heal(victim)
        else:
            await asyncio.to_thread(cluster.start_ray, victim, EXPERT)
        returned = await self._returned(cluster, victim)
        await asyncio.sleep(AFTER_S)
        storm.ending, ended = True, time.perf_counter()
        await load
        stalls = longest_ms(storm.answers, struck, mended)
        failed = [answer.error for answer in storm.answers if answer.error]
        arrivals = [at for answer in storm.answers for at in answer.arrivals]

        def rate(start: float, end: float) -> float:
            return round(sum(start <= at < end for at in arrivals) / (end - start), 1)

        return {
            "host": fault,
            "requests": len(storm.answers),
            "failed_requests": len(failed),
            "changed_tokens": changed_tokens(storm.answers, self.calm),
            "stall_p50_ms": round(percentile(stalls, 50) or 0.0, 1),
            "stall_p99_ms": round(percentile(stalls, 99) or 0.0, 1),
            "tokens_per_s_before": rate(began, struck),
            "meanwhile": rate(struck, mended),
            "after": rate(ended - AFTER_S, ended),
            "returned_s": None if returned is None else round(returned - mended, 1),
            "error": failed[0] if failed else None,
        }

    async def _returned(self, cluster: Hosts, victim: int) -> float | None:
        """When the trunk sends a share of its calls to the host again; None: it has not in time."""
        end = time.perf_counter() + RETURN_S
        while time.perf_counter() < end:
            before = cluster.switch.traffic()
            await asyncio.sleep(1.0)
            sent = {pair: now.bytes - before[pair].bytes for pair, now in cluster.switch.traffic().items()}
            if sent[0, victim] > RETURNED * sum(sent[0, host] for host in range(1, len(cluster.hosts))):
                return time.perf_counter()
        return None
