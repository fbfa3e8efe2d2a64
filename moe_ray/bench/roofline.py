"""`moe-ray bench roofline`: what memory and arithmetic of this machine allow for a model, and how much we reach.

The bounds are those of Williams et al. 2009 (Roofline, CACM 52(4)): a step takes at least as long as reading its bytes
and at least as long as computing its operations.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from moe_ray.bench.http_load import id_prompts
from moe_ray.bench.m1 import resolve_bench_model
from moe_ray.bench.probe import MachineSpeed, Probe, Shape, middle
from moe_ray.bench.report import Plot, Report, Row, machine_facts
from moe_ray.config import load_config
from moe_ray.core import SamplingParams
from moe_ray.errors import ConfigError
from moe_ray.model.formats import dtype_bytes
from moe_ray.model.kv_bytes import held_in, kv_bytes_per_token
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.weights import weights_of_expert, weights_of_trunk
from moe_ray.telemetry import cores

if TYPE_CHECKING:
    from moe_ray.llm import LLM

Progress = Callable[[str, int, int], None]

PLOT = Plot("concurrency", "tokens_per_s", "what")
MIB = 2**20
WATCH_S = 0.002
PREFILL_ROWS = 512
"""Tokens of a full prefill step (`engine.max_num_batched_tokens`); an expert gets its share of them."""


@dataclass(frozen=True, slots=True)
class RooflineOptions:
    """What is measured. The defaults end within ten minutes."""

    model: str | None = None
    """Default: M1."""
    concurrency: tuple[int, ...] = (1, 8, 32)
    repeats: int = 3
    prompt_tokens: int = 128
    output_tokens: int = 64
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """What a model costs, without regard to the machine."""

    shared_bytes: int
    """Read in every step: all of the trunk but the rows of the embedding."""
    expert_bytes: int
    """One expert in one layer."""
    kv_bytes_per_token: int
    num_layers: int
    num_experts: int
    top_k: int
    flop_per_token: int
    """Products with the weights of all layers, two operations per weight; attention's own is left out."""
    head_flop: int
    """Of the output head: each sampled token once."""

    def step_bytes(self, tokens: int, context: float) -> float:
        """Bytes that a step reads for one token of each of `tokens` sequences with `context` tokens in the cache."""
        experts = self.num_layers * distinct_experts(self.num_experts, self.top_k, tokens) * self.expert_bytes
        return self.shared_bytes + experts + tokens * context * self.kv_bytes_per_token


@dataclass(frozen=True, slots=True)
class Bound:
    """What no engine can exceed on the machine that makes one token per sequence and step with these weights."""

    read_bytes_per_step: float
    decode_tokens_per_s: float
    tokens_per_s: float
    """Output tokens of whole requests that start together: prefill, then decoding."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What one run of the engine reached."""

    tokens_per_s: float
    decode_tokens_per_s: float | None
    """From when all prompts were computed; None where the run ended before that was seen."""


def distinct_experts(num_experts: int, top_k: int, tokens: int) -> float:
    """Expected number of experts that `tokens` tokens reach in a layer, under uniform and independent routing."""
    return float(num_experts * (1 - (1 - top_k / num_experts) ** tokens))


def work_of(model: ModelConfig, dtype: str, kv_cache_dtype: str = "auto") -> Work:
    """The bytes and operations of `model` held in `dtype`, its KV cache as `engine.kv_cache_dtype` says."""
    size = dtype_bytes(dtype)
    trunk_weights = list(weights_of_trunk(model))
    embedding = model.vocab_size * model.hidden_size
    layers = len(model.mixture_layers)
    expert = sum(weight.numel for weight in weights_of_expert(model, model.mixture_layers[0], 0))
    trunk = sum(weight.numel for weight in trunk_weights)
    shared = trunk if model.tie_word_embeddings else trunk - embedding  # a tied embedding is read as the head
    matrices = sum(weight.numel for weight in trunk_weights if len(weight.shape) == 2 and weight.layer is not None)
    return Work(
        shared_bytes=shared * size,
        expert_bytes=expert * size,
        kv_bytes_per_token=kv_bytes_per_token(model, held_in(kv_cache_dtype, dtype)),
        num_layers=layers,
        num_experts=model.num_local_experts,
        top_k=model.num_experts_per_tok,
        flop_per_token=2 * (matrices + layers * model.num_experts_per_tok * expert),
        head_flop=2 * embedding,
    )


def bound(work: Work, machine: MachineSpeed, concurrency: int, prompt_tokens: int, output_tokens: int) -> Bound:
    """The bounds for `concurrency` requests that start together; the first token comes out of the prefill."""
    read, compute = 1e9 * machine.read_gb_per_s, 1e9 * machine.gflop_per_s
    step_bytes = work.step_bytes(concurrency, prompt_tokens + output_tokens / 2)
    step_s = max(step_bytes / read, concurrency * (work.flop_per_token + work.head_flop) / compute)
    prefill_flop = concurrency * (prompt_tokens * work.flop_per_token + work.head_flop)
    prefill_s = max(work.step_bytes(concurrency * prompt_tokens, 0) / read, prefill_flop / compute)
    total_s = prefill_s + (output_tokens - 1) * step_s
    return Bound(step_bytes, concurrency / step_s, concurrency * output_tokens / total_s)


def run_roofline(options: RooflineOptions, on_progress: Progress) -> Report:
    """Measure machine and engine in turn, so that both see the same minutes: the machine's bandwidth wanders.

    The engine is `moe_ray.LLM` in this process, with a compute thread per core. Raises `CheckpointError`,
    `ConfigError`.
    """
    import torch

    from moe_ray.llm import LLM
    from moe_ray.model.compute.compute import open_compute
    from moe_ray.model.compute.resolve import Wanted

    if options.output_tokens < 2:
        raise ConfigError("--output-tokens: the roofline needs at least 2, the first is prefill's")
    config = load_config()
    directory = resolve_bench_model(options.model, config, on_progress)
    model = ModelConfig.load(directory)
    compute = open_compute(model, Wanted.of(config.model), config.cache_dir)
    if compute.device != "cpu":
        raise ConfigError("the roofline is the CPU's: set MOE_RAY_MODEL__DEVICE=cpu")
    threads = cores()
    torch.set_num_threads(threads)
    llm = LLM(directory, progress=on_progress)
    probe = Probe(threads, matmul_shapes(model), compute.torch_dtype)
    work = work_of(model, compute.dtype, config.engine.kv_cache_dtype)
    fresh = count()  # no two requests share a prefix, so that nothing comes out of the prefix cache

    def run(concurrency: int, output_tokens: int) -> Rates:
        seed = f"{options.seed} {next(fresh)}"
        prompts = list(id_prompts(concurrency, options.prompt_tokens, model.vocab_size, seed))
        return _generate(llm, prompts, output_tokens)

    run(max(options.concurrency), 4)  # warms up
    rows: list[Row] = []
    for concurrency in options.concurrency:
        machines, rates = [probe.measure()], []
        for repeat in range(options.repeats):
            on_progress(f"concurrency {concurrency}", repeat, options.repeats)
            rates.append(run(concurrency, options.output_tokens))
            machines.append(probe.measure())
        on_progress(f"concurrency {concurrency}", options.repeats, options.repeats)
        rows.append(roofline_row(options, concurrency, work, middle(machines), rates))
    facts = {
        "model": directory.name,
        "dtype": compute.dtype,
        "threads": threads,
        "prompt_tokens": options.prompt_tokens,
        "output_tokens": options.output_tokens,
        "repeats": options.repeats,
        "seed": options.seed,
        **machine_facts(),
    }
    return Report("roofline", rows, facts)


def roofline_row(
    options: RooflineOptions, concurrency: int, work: Work, machine: MachineSpeed, rates: list[Rates]
) -> Row:
    """One line of the table: medians of the repeats beside the bounds."""
    limit = bound(work, machine, concurrency, options.prompt_tokens, options.output_tokens)
    reached = statistics.median(each.tokens_per_s for each in rates)
    decoded = [each.decode_tokens_per_s for each in rates if each.decode_tokens_per_s is not None]
    return {
        "concurrency": concurrency,
        "read_gb_per_s": round(machine.read_gb_per_s, 2),
        "gflop_per_s": round(machine.gflop_per_s, 1),
        "read_mib_per_step": round(limit.read_bytes_per_step / MIB, 1),
        "bound_decode_tokens_per_s": round(limit.decode_tokens_per_s, 2),
        "bound_tokens_per_s": round(limit.tokens_per_s, 2),
        "reached_tokens_per_s": round(reached, 2),
        "reached_decode_tokens_per_s": round(statistics.median(decoded), 2) if decoded else None,
        "fraction": round(reached / limit.tokens_per_s, 4),
    }


def curves(report: Report) -> Report:
    """The report as `PLOT` draws it: a line for the bound and one for what is reached."""
    rows: list[Row] = [
        {"what": what, "concurrency": row["concurrency"], "tokens_per_s": row[f"{what}_tokens_per_s"]}
        for what in ("bound", "reached")
        for row in report.rows
    ]
    return Report(report.bench, rows, report.facts)


def matmul_shapes(model: ModelConfig) -> list[Shape]:
    """The model's own products in a prefill step: attention's input, and an expert's share of the tokens."""
    rows = max(1, PREFILL_ROWS * model.num_experts_per_tok // model.num_local_experts)
    return [
        (PREFILL_ROWS, model.hidden_size, model.num_attention_heads * model.head_dim),
        (rows, model.hidden_size, 2 * model.intermediate_size),
        (rows, model.intermediate_size, model.hidden_size),
    ]


def _generate(llm: LLM, prompts: list[list[int]], output_tokens: int) -> Rates:
    """Complete all prompts, sent together, with exactly so many tokens each."""
    sampling = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True)
    before = llm.stats
    prefilled = before.prompt_tokens + sum(map(len, prompts))
    ended = threading.Event()
    seen: list[tuple[float, int]] = []  # when all prompts were computed, and the tokens generated by then

    def watch() -> None:
        while not ended.wait(WATCH_S):
            now = llm.stats
            if now.prompt_tokens >= prefilled:
                seen.append((time.perf_counter(), now.generated_tokens - before.generated_tokens))
                return

    watcher = threading.Thread(target=watch, name="watch prefill")
    started = time.perf_counter()
    watcher.start()
    try:
        llm.generate(prompts, sampling)
        finished = time.perf_counter()
    finally:
        ended.set()
        watcher.join()
    total = len(prompts) * output_tokens
    decoding = [(total - done) / (finished - at) for at, done in seen if at < finished]
    return Rates(total / (finished - started), decoding[0] if decoding else None)
