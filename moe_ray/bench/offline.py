"""`bench engine`: tokens per second of one model, spread over processes against the same engine in one process."""

from __future__ import annotations

import os
import secrets
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from moe_ray.bench.child import Child, children, gather, pss_bytes
from moe_ray.bench.m1 import resolve_bench_model
from moe_ray.bench.report import GIB, Plot, Report, Row, machine_facts
from moe_ray.config import Config, load_config
from moe_ray.console import Report as Progress
from moe_ray.errors import ConfigError
from moe_ray.model.model_config import ModelConfig
from moe_ray.telemetry import cores

LOCAL: Final[str] = "local"
CARRIERS: Final[tuple[str, ...]] = (LOCAL, "socket", "grpc", "ray")
PLOT = Plot(x="concurrency", y="output_tokens_per_s", series="carrier", log_x=True)
WARMUP_TOKENS = 8
Wave = dict[str, Any]


@dataclass(frozen=True, slots=True)
class EngineBenchOptions:
    """What is measured, and on which model."""

    model: str | None = None
    """A directory, a Hugging Face repo id or `demo`; None: M1, a random Mixtral made from a seed."""
    config: Config = field(default_factory=load_config)
    carriers: tuple[str, ...] = CARRIERS
    """`local`, the engine in one process, runs in any case: the others are measured against it."""
    concurrency: tuple[int, ...] = (1, 8, 32)
    prompt_tokens: int = 128
    output_tokens: int = 64
    repeats: int = 3
    micro_batches: int | None = None
    """Of the spread engines, default the configured one; in one process there is nothing to wait for, so 1."""
    trunk_threads: int | None = None
    expert_threads: int | None = None
    """Compute threads of the spread trunk and of each expert; default: the configured ones."""
    budget_s: float = 540.0
    """A further repeat is left out if it would end later than this."""

    def check(self) -> None:
        """Raise `ConfigError` naming the option and what is allowed."""
        unknown = [carrier for carrier in self.carriers if carrier not in CARRIERS]
        if unknown or not self.carriers:
            raise ConfigError(f"--carriers: {', '.join(unknown) or 'none'}; allowed: {', '.join(CARRIERS)}")
        if not self.concurrency:
            raise ConfigError("--concurrency: must be at least one number")
        numbers = {
            "--concurrency": min(self.concurrency),
            "--prompt-tokens": self.prompt_tokens,
            "--repeats": self.repeats,
            "--micro-batches": self.micro_batches or 1,
            "--trunk-threads": self.trunk_threads or 1,
            "--expert-threads": self.expert_threads or 1,
        }
        if wrong := [name for name, number in numbers.items() if number < 1]:
            raise ConfigError(f"{', '.join(wrong)}: must be at least 1")
        if self.output_tokens < 2:
            raise ConfigError("--output-tokens: must be at least 2, for there is no decoding before the second")

    def engine_config(self, local: bool) -> dict[str, Any]:
        """The configuration of one side, as JSON: one process may use every core.

        There is room for every sequence of a wave, so that none waits for another.
        """
        section = self.config.engine.model_dump(mode="json")
        section["max_num_seqs"] = max(section["max_num_seqs"], *self.concurrency)
        section["max_waiting"] = max(section["max_waiting"], *self.concurrency)
        if local or self.micro_batches is not None:
            section["micro_batches"] = 1 if local else self.micro_batches
        whole = self.config.model_dump(mode="json")
        whole["model"]["max_model_len"] = self.prompt_tokens + self.output_tokens
        for part, asked in (("trunk", self.trunk_threads), ("experts", self.expert_threads)):
            whole[part]["threads"] = cores() if local else asked or whole[part]["threads"]
        return {**whole, "engine": section}


def run_engine(options: EngineBenchOptions, progress: Progress) -> Report:
    """Measure every carrier against one process, taking turns in one run; blocks, and leaves no process behind.

    Raises `ConfigError`, `CheckpointError`, and `ChildFailed` when a process does not do its part.
    """
    options.check()
    started, load = time.monotonic(), os.getloadavg()[0]  # on a busy machine two threads in step suffer most
    directory = resolve_bench_model(options.model, options.config, progress)
    model = ModelConfig.load(directory)
    spread = [carrier for carrier in CARRIERS if carrier in options.carriers and carrier != LOCAL]
    with children() as start:
        experts, engines, dtype = _load(options, str(directory), model.num_local_experts, spread, start, progress)
        waves, repeats = _measure(options, engines, started, progress)
        sides: dict[str, list[int]] = {
            carrier: [engine.pid, *([child.pid for child in experts] if carrier in ("socket", "grpc") else [])]
            for carrier, engine in engines.items()
        }
        memory: dict[str, object] = {f"pss_gib_{carrier}": _gib(pss_bytes(pids)) for carrier, pids in sides.items()}
        for engine in engines.values():
            engine.close()  # before their experts: a link that its trunk ends is no event
    apart = options.engine_config(local=False)
    facts: dict[str, object] = {
        **machine_facts(),
        "load_average_before": round(load, 1),
        "model": options.model or "M1",
        "dtype": dtype,
        "prompt_tokens": options.prompt_tokens,
        "output_tokens": options.output_tokens,
        "repeats": repeats,
        "local_threads": cores(),
        "trunk_threads": apart["trunk"]["threads"] or cores(),
        "expert_threads": apart["experts"]["threads"] or 1,
        "micro_batches": apart["engine"]["micro_batches"],
        **memory,
    }
    return Report("engine", list(_rows(options, engines, waves)), facts)


def _load(
    options: EngineBenchOptions,
    directory: str,
    num_experts: int,
    spread: list[str],
    start: Callable[[str, str], Child],
    progress: Progress,
) -> tuple[list[Child], dict[str, Child], str]:
    """Start and load everything: the expert processes, an engine per carrier, and how the engines compute."""
    token = secrets.token_hex(16)
    served = [carrier for carrier in spread if carrier != "ray"]
    apart = options.engine_config(local=False)
    experts = [start("moe_ray.bench.expert_process", f"Expert{e}") for e in range(num_experts if served else 0)]
    for number, expert in enumerate(experts):
        expert.tell(
            "load",
            config=apart,
            directory=directory,
            expert=number,
            carriers=served,
            token=token,
        )
    infos = gather(experts, progress)
    engines: dict[str, Child] = {}
    for carrier in (LOCAL, *spread):
        engines[carrier] = start("moe_ray.bench.engine_process", f"the engine over {carrier}")
        answer = engines[carrier].ask(
            "load",
            progress,
            name=carrier,
            config=options.engine_config(local=True) if carrier == LOCAL else apart,
            directory=directory,
            carrier=carrier,
            experts=infos if carrier in served else [],
            token=token,
        )
    return experts, engines, str(answer["dtype"])


def _measure(
    options: EngineBenchOptions, engines: dict[str, Child], started: float, progress: Progress
) -> tuple[dict[tuple[str, int], list[Wave]], int]:
    """The waves of each carrier and concurrency, one per repeat; the carriers take turns, wave by wave."""
    waves: dict[tuple[str, int], list[Wave]] = {}
    lengths: Wave = {"prompt_tokens": options.prompt_tokens, "output_tokens": options.output_tokens}
    seeds, done, total = _seeds(), 0, options.repeats * len(options.concurrency) * len(engines)
    warmup = {**lengths, "output_tokens": min(WARMUP_TOKENS, options.output_tokens)}
    first = [(count, engine) for count in sorted({1, min(8, max(options.concurrency))}) for engine in engines.values()]
    for warmed, (count, engine) in enumerate(first, 1):
        engine.ask("run", concurrency=count, seed=next(seeds), **warmup)
        progress("warm-up", warmed, len(first))
    longest = 0.0
    for repeat in range(options.repeats):
        began = time.monotonic()
        if repeat and began - started + longest > options.budget_s:
            return waves, repeat
        for count in options.concurrency:
            seed = next(seeds)
            for carrier, engine in engines.items():
                waves.setdefault((carrier, count), []).append(
                    engine.ask("run", concurrency=count, seed=seed, **lengths)
                )
                done += 1
                progress("waves", done, total)
        longest = max(longest, time.monotonic() - began)
    return waves, options.repeats


def _rows(
    options: EngineBenchOptions, carriers: dict[str, Child], waves: dict[tuple[str, int], list[Wave]]
) -> Iterator[Row]:
    """A row per carrier and concurrency; efficiency pairs each wave with the local one of the same prompts."""
    for carrier in carriers:
        for count in options.concurrency:
            ours, local = waves[carrier, count], waves[LOCAL, count]
            speeds, local_speeds = (
                [count * options.output_tokens / float(wave["wall_s"]) for wave in side] for side in (ours, local)
            )
            ratios = [speed / alone for speed, alone in zip(speeds, local_speeds, strict=True)]
            yield {
                "carrier": carrier,
                "concurrency": count,
                "output_tokens_per_s": statistics.median(speeds),
                "efficiency": statistics.median(ratios),
                "efficiency_min": min(ratios),
                "efficiency_max": max(ratios),
                "local_tokens_per_s": statistics.median(local_speeds),
                "ttft_p50_ms": statistics.median(wave["ttft_p50_ms"] for wave in ours),
                "decode_tokens_per_s": _decode_speed(ours),
                "same_tokens": _same(ours, local),
            }


def _decode_speed(waves: list[Wave]) -> float | None:
    """Tokens per second from the last sequence's first token to the end; None where nothing came after it."""
    speeds = [wave["decode_tokens"] / wave["decode_s"] for wave in waves if wave["decode_s"]]
    return statistics.median(speeds) if speeds else None


def _same(ours: list[Wave], local: list[Wave]) -> float:
    """The share of output tokens that both sides agree on; all of them in float32."""
    pairs = [
        mine == theirs
        for wave, other in zip(ours, local, strict=True)
        for output, expected in zip(wave["outputs"], other["outputs"], strict=True)
        for mine, theirs in zip(output, expected, strict=True)
    ]
    return sum(pairs) / len(pairs)


def _seeds() -> Iterator[int]:
    """A new seed for every wave, other ones in every run."""
    base = secrets.randbits(40)
    while True:
        base += 1
        yield base


def _gib(size: int | None) -> float | None:
    return None if size is None else round(size / GIB, 2)
