"""`moe-ray bench first-token`: time to the first token of one long prompt, in one process, by its length."""

from __future__ import annotations

import secrets
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from moe_ray.bench.engine_process import random_prompts, run_wave
from moe_ray.bench.m1 import M1_LONG, bench_model, resolve_bench_model
from moe_ray.bench.report import Plot, Report, Row, machine_facts
from moe_ray.config import Config, load_config
from moe_ray.console import Report as Progress
from moe_ray.engine.build import build_engine
from moe_ray.engine.engine import Engine
from moe_ray.errors import ConfigError
from moe_ray.experts.client.dispatcher import ExpertDispatcher
from moe_ray.experts.local import local_experts
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute, limit_torch_threads
from moe_ray.telemetry import cores

PLOT: Final = Plot("prompt_tokens", "ttft_ms", None, log_x=True, log_y=True)
OUTPUT_TOKENS: Final = 9
"""The first, and eight that tell how fast a context of this length is decoded."""


@dataclass(frozen=True, slots=True)
class FirstTokenOptions:
    """What is measured, and on which model."""

    model: str | None = None
    """A directory, a Hugging Face repo id or `demo`; None: M1 with positions for 32,768 tokens."""
    config: Config = field(default_factory=load_config)
    prompt_tokens: tuple[int, ...] = (4096, 16384, 32768 - OUTPUT_TOKENS)
    quantize: str | None = None
    """What experts and trunk are held as; None: as the checkpoint has them."""
    kv_cache_dtype: str = "auto"
    repeats: int = 3

    def engine_config(self) -> Config:
        """One process on all cores, with a cache for the longest prompt. Raises `ConfigError`."""
        if not self.prompt_tokens or min(self.prompt_tokens) < 1:
            raise ConfigError("--prompt-tokens: must be numbers of at least 1")
        whole = self.config.model_dump(mode="json")
        longest = max(self.prompt_tokens) + OUTPUT_TOKENS
        whole["model"]["max_model_len"] = longest
        whole["engine"] |= {"kv_cache_dtype": self.kv_cache_dtype, "kv_cache_tokens": longest + 256}
        whole["engine"] |= {"micro_batches": 1, "enable_prefix_caching": False}
        for part in ("trunk", "experts"):
            whole[part] |= {"threads": cores(), "quantize": self.quantize}
        return load_config(whole)


def run_first_token(options: FirstTokenOptions, progress: Progress) -> Report:
    """Time every length in turn, `repeats` times, after one short prompt. Raises `ConfigError`, `CheckpointError`."""
    config = options.engine_config()
    if options.model is None:
        directory = bench_model(config.cache_dir, progress, M1_LONG)
    else:
        directory = resolve_bench_model(options.model, config, progress)
    engine, dtype, vocab_size = _loaded(config, directory, progress)
    seed, found = secrets.randbits(40), dict[int, list[dict[str, float]]]()
    run_wave(engine, random_prompts(1, min(512, *options.prompt_tokens), vocab_size, seed), OUTPUT_TOKENS)
    total, done = options.repeats * len(options.prompt_tokens), 0
    for _ in range(options.repeats):
        for length in options.prompt_tokens:
            progress("prompts", done, total)
            done += 1
            wave = run_wave(engine, random_prompts(1, length, vocab_size, seed + done), OUTPUT_TOKENS)
            found.setdefault(length, []).append(wave)
    progress("prompts", total, total)
    facts: dict[str, object] = {
        **machine_facts(),
        "model": options.model or "M1",
        "dtype": dtype,
        "quantize": options.quantize or "",
        "kv_cache_dtype": options.kv_cache_dtype,
        "chunk_tokens": config.engine.max_num_batched_tokens,
        "threads": cores(),
        "repeats": options.repeats,
    }
    return Report("first-token", [_row(length, waves) for length, waves in found.items()], facts)


def _loaded(config: Config, directory: Path, progress: Progress) -> tuple[Engine, str, int]:
    """An engine with its experts in this process, what it computes in, and the size of the vocabulary."""
    limit_torch_threads(cores())
    checkpoint, dtypes = Checkpoint.open(directory), list[str]()

    def bar(what: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(what, done, total)

    def pool(compute: Compute) -> ExpertDispatcher:
        dtypes.append(compute.dtype)
        of = config.experts
        return local_experts(
            checkpoint, compute, lambda e: bar(f"Expert{e}"), of.quantize_of, offload_bytes=of.offload_bytes_of
        )

    engine = build_engine(config, checkpoint, pool, bar("Trunk"))
    vocab_size = checkpoint.config.vocab_size
    checkpoint.close()
    return engine, dtypes[0], vocab_size


def _row(length: int, waves: list[dict[str, float]]) -> Row:
    ttft = statistics.median(wave["ttft_p50_ms"] for wave in waves)
    return {
        "prompt_tokens": length,
        "ttft_ms": round(ttft, 1),
        "prompt_tokens_per_s": round(1000 * length / ttft, 1),
        "decode_ms_per_token": round(
            statistics.median(1000 * wave["decode_s"] / (OUTPUT_TOKENS - 1) for wave in waves), 2
        ),
    }
