"""The sides of `bench gpu`: one format of a model in one process, then pulled apart over each carrier."""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_ray.bench.child import Child, children, gather
from moe_ray.bench.gpu_options import GpuBenchOptions
from moe_ray.bench.gpu_shapes import GROUP, WEIGHTS
from moe_ray.bench.offline import LOCAL, WARMUP_TOKENS
from moe_ray.bench.report import GIB, Row
from moe_ray.bench.roofline import Work, work_of
from moe_ray.console import Report as Progress
from moe_ray.convert.dummy import CODED
from moe_ray.model.families import Weight
from moe_ray.model.formats import Grouping, dtype_bytes
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.weights import matrices_of_expert, weights_of_trunk


@dataclass(frozen=True, slots=True)
class _Local:
    """What one process has reached: others are compared with it."""

    tokens_per_s: float
    outputs: list[list[list[int]]]
    """Token ids by wave and sequence."""


class Sides:
    """One format of a model."""

    def __init__(self, options: GpuBenchOptions, directory: Path, weights: str, read_gb_s: float) -> None:
        self._options, self._directory, self._weights, self._read_gb_s = options, directory, weights, read_gb_s
        self._config = options.engine_config(directory, weights)
        self._work = step_work(directory, weights)
        self._local: dict[int, _Local] = {}
        """By concurrency."""
        self._seed = secrets.randbits(40)
        self.long_rows: list[Row] = []
        """Of the long prompt, where one is asked for, once all is measured."""

    def measured(self, progress: Progress) -> Iterator[Row]:
        """A row for each carrier and concurrency. Raises `ChildFailed`."""
        for carrier in sorted(self._options.carriers, key=lambda name: name != LOCAL):
            with children() as start:
                began = time.perf_counter()
                experts, engine = self._loaded(carrier, start, progress)
                load_s = time.perf_counter() - began
                few = min(WARMUP_TOKENS, self._options.output_tokens)
                self._wave(engine, 1, self._options.prompt_tokens, few)
                for concurrency in self._options.concurrency:
                    yield self._row(carrier, concurrency, load_s, engine, experts)
                if carrier == LOCAL and self._options.long_prompt is not None:
                    self.long_rows.append(self._long(engine, self._options.long_prompt))
                engine.close()  # before its experts: a link that its trunk ends is no event

    def _loaded(
        self, carrier: str, start: Callable[[str, str], Child], progress: Progress
    ) -> tuple[list[Child], Child]:
        token, infos, experts = secrets.token_hex(16), list[dict[str, Any]](), list[Child]()
        load: dict[str, Any] = {"config": self._config, "directory": str(self._directory), "token": token}
        if carrier != LOCAL:
            count = ModelConfig.load(self._directory).num_local_experts
            experts = [start("moe_ray.bench.expert_process", f"Expert{e}") for e in range(count)]
            for number, expert in enumerate(experts):
                expert.tell("load", expert=number, carriers=[carrier], **load)
            infos = gather(experts, progress)
        engine = start("moe_ray.bench.engine_process", f"the engine over {carrier}")
        engine.ask("load", progress, name=carrier, carrier=carrier, experts=infos, **load)
        return experts, engine

    def _row(self, carrier: str, concurrency: int, load_s: float, engine: Child, experts: list[Child]) -> Row:
        options = self._options
        waves = [
            self._wave(engine, concurrency, options.prompt_tokens, options.output_tokens, repeat)
            for repeat in range(1, options.repeats + 1)
        ]
        outputs = [wave["outputs"] for wave in waves]
        speed = statistics.median(concurrency * options.output_tokens / wave["wall_s"] for wave in waves)
        decode = statistics.median(wave["decode_tokens"] / wave["decode_s"] for wave in waves if wave["decode_s"])
        steps_s = decode / concurrency
        if carrier == LOCAL:
            self._local[concurrency] = _Local(speed, outputs)
        alone = self._local.get(concurrency)
        context = options.prompt_tokens + options.output_tokens / 2
        read = self._work.step_bytes(concurrency, context) * steps_s / 1e9
        memory = [process.ask("memory")["bytes"] for process in (engine, *experts)]
        return {
            "weights": self._weights,
            "side": "one process" if carrier == LOCAL else f"{1 + len(experts)} processes, {carrier}",
            "concurrency": concurrency,
            "output_tokens_per_s": round(speed, 2),
            "decode_tokens_per_s": round(decode, 2),
            "tpot_ms": round(1000 / steps_s, 3),
            "ttft_p50_ms": round(statistics.median(wave["ttft_p50_ms"] for wave in waves), 2),
            "of_one_process": None if alone is None else round(speed / alone.tokens_per_s, 3),
            "same_tokens": None if alone is None else int(outputs == alone.outputs),
            "exchange_p50_us": round(statistics.median(wave["exchange_p50_us"] for wave in waves), 1),
            "share_of_read": round(read / self._read_gb_s, 4),
            "trunk_gib": round(memory[0] / GIB, 3),
            "expert_gib_most": round(max(memory[1:]) / GIB, 3) if experts else None,
            "load_s": round(load_s, 1),
        }

    def _wave(
        self, engine: Child, concurrency: int, prompt_tokens: int, output_tokens: int, repeat: int = 0
    ) -> dict[str, Any]:
        """One wave, of the same prompts on every side; `repeat` counts from 1 where layers are timed."""
        return engine.ask(
            "run",
            concurrency=concurrency,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            seed=self._seed + repeat,
            layer_times=repeat > 0,
        )

    def _long(self, engine: Child, tokens: int) -> Row:
        wave = self._wave(engine, 1, tokens, 9)
        return {
            "weights": self._weights,
            "prompt_tokens": tokens,
            "ttft_ms": round(wave["ttft_p50_ms"], 1),
            "decode_ms_per_token": round(1000 * wave["decode_s"] / 8, 3),
        }


def step_work(directory: Path, weights: str) -> Work:
    """What a step reads of the model held in this format: of experts and attention codes with their scales."""
    config = ModelConfig.load(directory)
    work = work_of(config, config.dtype)
    bits = WEIGHTS[weights]
    if bits is None:
        return work
    how = Grouping(bits, GROUP)

    def saved(each: Iterable[Weight]) -> int:
        """Bytes that codes take less than floats."""
        shapes = [weight.shape for weight in each if weight.role in CODED]
        return sum(dtype_bytes(config.dtype) * n * k - how.nbytes((n, k)) for n, k in shapes)

    return replace(
        work,
        shared_bytes=work.shared_bytes - saved(weights_of_trunk(config)),
        expert_bytes=work.expert_bytes - saved(matrices_of_expert(config, config.mixture_layers[0], 0)),
    )
