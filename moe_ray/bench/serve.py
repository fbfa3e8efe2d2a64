"""`moe-ray bench serve`: streaming load at several concurrencies, against our own server or any other."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from moe_ray.bench.http_load import Prompt, Target, Wave, id_prompts, percentile, run_wave, served_model, text_prompts
from moe_ray.bench.m1 import resolve_bench_model
from moe_ray.bench.processes import OwnServer, own_server, pss_mib
from moe_ray.bench.report import Plot, Report, Row, machine_facts
from moe_ray.config import load_config
from moe_ray.errors import ConfigError, NotReady

Progress = Callable[[str, int, int], None]

PLOT = Plot("concurrency", "output_tokens_per_s", None)
LEAST_REQUESTS = 4
SHOWN_ERRORS = 3
DEFAULT_VOCAB_SIZE = 32_000


@dataclass(frozen=True, slots=True)
class ServeBenchOptions:
    """What is sent, and to whom. The defaults end within ten minutes on a machine that gives 40 tokens/s."""

    url: str | None = None
    """None: start `moe-ray serve` for it."""
    model: str | None = None
    """With a URL the name that the server knows, default: the first it tells; without: what to serve, default M1."""
    concurrency: tuple[int, ...] = (1, 8, 32)
    requests: int | None = None
    """A run; default: the concurrency, at least 4."""
    repeats: int = 3
    prompt_tokens: int = 128
    output_tokens: int = 64
    send: Literal["ids", "text"] = "ids"
    tokenizer: str | None = None
    """Model whose tokenizer makes text prompts and bounds the ids; default without a URL: the served model's."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    api_key: str | None = None
    seed: int = 0
    timeout_s: float = 600.0
    pid: int | None = None
    """Of a server started by hand: its process tree's memory is told."""


def run_serve(options: ServeBenchOptions, on_progress: Progress) -> Report:
    """Measure each concurrency `repeats` times, in turn, after one request that warms up.

    Requests that fail are counted and shown. Raises `NotReady` where no server answers or already the first request
    fails, and `ConfigError`, `CheckpointError` on options that cannot be.
    """
    if options.url is None and options.pid is not None:
        raise ConfigError("--pid is for a server started by hand: give its --url too")
    directory = _tokenizer_directory(options, on_progress)
    if options.url is None:
        assert directory is not None
        started: AbstractContextManager[OwnServer] = own_server(directory)
        on_progress("start the server", 0, 1)
    else:
        url = options.url.rstrip("/").removesuffix("/v1")
        if "://" not in url:
            url = f"http://{url}"
        started = nullcontext(OwnServer(url, options.pid or 0, 0.0))
    with started as server:
        if options.url is None:
            on_progress("start the server", 1, 1)
        return asyncio.run(_measure(options, server, directory, on_progress))


async def _measure(
    options: ServeBenchOptions, server: OwnServer, directory: Path | None, on_progress: Progress
) -> Report:
    name = options.model if options.url and options.model else await served_model(server.url, options.api_key)
    target = Target(server.url, name, options.output_tokens, options.api_key, options.extra, options.timeout_s)
    make = _prompt_maker(options, directory)
    warm = await run_wave(target, make(1, "warm-up"), 1, lambda: None)
    if error := warm.samples[0].error:
        raise NotReady(f"the first request to {server.url} failed: {error}")
    waves: dict[int, list[Wave]] = {count: [] for count in options.concurrency}
    memory: list[int] = []
    for repeat in range(options.repeats):
        for count, done in waves.items():
            each = options.requests or max(LEAST_REQUESTS, count)
            ended = itertools.count(repeat * each + 1)
            step = partial(_step, on_progress, f"concurrency {count}", ended, options.repeats * each)
            done.append(await run_wave(target, make(each, f"{count} {repeat}"), count, step))
            if server.pid and (used := pss_mib(server.pid)) is not None:
                memory.append(used)
    samples = [sample for done in waves.values() for wave in done for sample in wave.samples]
    errors = sorted({sample.error for sample in samples if sample.error})
    facts = {
        "server": "moe-ray serve" if options.url is None else None,
        "model": Path(name).name,
        "prompt_tokens": options.prompt_tokens,
        "prompt_tokens_counted": sorted({s.prompt_tokens for s in samples if s.prompt_tokens is not None}),
        "output_tokens": options.output_tokens,
        "send": options.send,
        "repeats": options.repeats,
        "seed": options.seed,
        "ready_s": round(server.ready_s, 1) if options.url is None else None,
        "pss_mib": max(memory, default=None),
        **({"error_samples": errors[:SHOWN_ERRORS]} if errors else {}),
        **machine_facts(),
    }
    return Report("serve", [serve_row(count, done) for count, done in waves.items()], facts)


def serve_row(concurrency: int, waves: list[Wave]) -> Row:
    """Medians over the repeats of one concurrency; only requests that gave all their tokens count as output."""
    each = [_numbers(wave) for wave in waves]
    rates = [numbers["output_tokens_per_s"] for numbers in each]
    row: Row = {"concurrency": concurrency, "requests": sum(len(wave.samples) for wave in waves)}
    for key in each[0]:
        known = [value for numbers in each if (value := numbers[key]) is not None]
        row[key] = round(statistics.median(known), 4) if known else None
        if key == "output_tokens_per_s":
            row["output_tokens_per_s_min"] = round(min(rate for rate in rates if rate is not None), 4)
            row["output_tokens_per_s_max"] = round(max(rate for rate in rates if rate is not None), 4)
    row["errors"] = sum(sample.error is not None for wave in waves for sample in wave.samples)
    return row


def _numbers(wave: Wave) -> dict[str, float | None]:
    good = [sample for sample in wave.samples if sample.error is None]
    first = [1e3 * (sample.arrivals[0] - sample.started) for sample in good]
    gaps = [1e3 * (after - before) for sample in good for before, after in itertools.pairwise(sample.arrivals)]
    # Chunks may carry several tokens; this one is free of how a server packs them.
    per_token = [1e3 * (s.arrivals[-1] - s.arrivals[0]) / (s.tokens - 1) for s in good if s.tokens > 1]
    return {
        "output_tokens_per_s": sum(sample.tokens for sample in good) / wave.wall_s,
        "ttft_p50_ms": percentile(first, 50),
        "ttft_p99_ms": percentile(first, 99),
        "itl_p50_ms": percentile(gaps, 50),
        "itl_p99_ms": percentile(gaps, 99),
        "tpot_p50_ms": percentile(per_token, 50),
        "e2e_p50_ms": percentile([1e3 * (sample.ended - sample.started) for sample in good], 50),
        "wall_s": wave.wall_s,
        "client_cpu_fraction": wave.cpu_s / wave.wall_s,
    }


def _tokenizer_directory(options: ServeBenchOptions, on_progress: Progress) -> Path | None:
    """The model that is served here, or whose tokenizer makes the prompts for somebody else's server."""
    if options.url is None:
        return resolve_bench_model(options.model, load_config(), on_progress)
    if options.tokenizer is not None:
        return resolve_bench_model(options.tokenizer, load_config(), on_progress)
    if options.send == "text":
        raise ConfigError("--send text needs --tokenizer: the model whose tokenizer counts the prompt's tokens")
    return None


def _prompt_maker(options: ServeBenchOptions, directory: Path | None) -> Callable[[int, str], list[Prompt]]:
    if directory is None:
        return lambda count, salt: [
            *id_prompts(count, options.prompt_tokens, DEFAULT_VOCAB_SIZE, f"{options.seed} {salt}")
        ]
    from moe_ray.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(directory)
    if options.send == "text":
        return lambda count, salt: [*text_prompts(count, options.prompt_tokens, tokenizer, f"{options.seed} {salt}")]
    return lambda count, salt: [
        *id_prompts(count, options.prompt_tokens, tokenizer.vocab_size, f"{options.seed} {salt}")
    ]


def _step(on_progress: Progress, what: str, ended: Iterator[int], total: int) -> None:
    on_progress(what, next(ended), total)
