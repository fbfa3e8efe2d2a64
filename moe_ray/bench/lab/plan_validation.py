"""`moe-ray bench plan`: what `moe-ray plan --fleet` predicts of placements beside what they take on this machine.

The machine is probed before, once, in the same run; nothing is fitted to the placements that are compared.
"""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from moe_ray.bench.lab.hosts import check_machine
from moe_ray.bench.lab.plan_emulated import EMULATED, SHAPED, compared, emulated_rows, shaped_rows
from moe_ray.bench.m1 import resolve_bench_model
from moe_ray.bench.machine_probe import ProbedMachine, probed_machine
from moe_ray.bench.offline import EngineBenchOptions, run_engine
from moe_ray.bench.report import Plot, Report, Row, machine_facts
from moe_ray.bench.software_probe import placed_here
from moe_ray.config import Config, load_config
from moe_ray.console import Report as Progress
from moe_ray.errors import ConfigError
from moe_ray.experts.planning.footprint import WeightsHeld
from moe_ray.experts.planning.machines import Machines, Spread
from moe_ray.experts.planning.model_cost import ModelCost
from moe_ray.experts.planning.step_time import decode_step
from moe_ray.model.formats.held import QUANTIZATIONS, HeldAs
from moe_ray.model.model_config import ModelConfig

PLOT: Final = Plot("measured_ms", "predicted_ms", None, log_x=True, log_y=True)
PARTS: Final = ("engine", "emulated", "networks")
CHUNK: Final = 512
"""`engine.max_num_batched_tokens`."""
CLOSE: Final = 0.1
CALIBRATED: Final = (
    "the CPU's kernels (one expert of another shape, one matrix, attention), the software's overhead on two small "
    "models, and what a scatter takes without experts and network"
)


@dataclass(frozen=True, slots=True)
class PlanBenchOptions:
    """What is compared. The defaults are 30 placements by concurrency, in about 20 minutes on two quiet cores."""

    model: str | None = None
    """Default: M1."""
    parts: tuple[str, ...] = PARTS
    formats: tuple[str, ...] = ("float", "int8", "int4")
    concurrency: tuple[int, ...] = (1, 8, 32)
    prompt_tokens: int = 128
    output_tokens: int = 96
    repeats: int = 3
    seconds: float = 5.0
    """For which each emulated placement is measured."""
    probe_again: bool = True
    config: Config = field(default_factory=load_config)

    def check(self) -> None:
        """Raise `ConfigError` naming the option and what is allowed."""
        for flag, given, allowed in (
            ("--parts", self.parts, PARTS),
            ("--formats", self.formats, ("float", *QUANTIZATIONS)),
        ):
            wrong = [name for name in given if name not in allowed]
            if wrong or not given:
                raise ConfigError(f"{flag}: {', '.join(wrong) or 'none'}; allowed: {', '.join(allowed)}")
        if "networks" in self.parts:
            check_machine()
        if self.output_tokens < 2 * CHUNK // self.prompt_tokens:
            raise ConfigError(f"--output-tokens: must be at least {2 * CHUNK // self.prompt_tokens}")


def run_plan_bench(options: PlanBenchOptions, progress: Progress) -> Report:
    """Probe the machine, measure every placement, and compare; blocks, and leaves no process behind.

    Raises `ConfigError`, `CheckpointError`, and `ChildFailed` when a process does not do its part.
    """
    options.check()
    load, rows = os.getloadavg()[0], list[Row]()
    native = options.config.cache_dir
    if "engine" in options.parts:
        directory = resolve_bench_model(options.model, options.config, progress)
        probed = probed_machine(native, progress, options.probe_again)
        for form in options.formats:
            rows += engine_rows(options, form, directory, probed, progress)
    if "emulated" in options.parts:
        rows += emulated_rows(EMULATED, native, options.seconds, progress)
    if "networks" in options.parts:
        rows += shaped_rows(SHAPED, native, options.seconds, progress)
    return Report("plan", rows, {**summary(rows), "load_average_before": round(load, 1), **machine_facts()})


def summary(rows: list[Row]) -> dict[str, object]:
    """How close the predictions are, and which miss."""
    errors = {f"{row['placement']} at {row['sequences']}": abs(float(row["error"] or 0)) for row in rows}
    return {
        "placements": len(errors),
        "within_10_percent": sum(error <= CLOSE for error in errors.values()),
        "median_error": round(statistics.median(errors.values()), 3) if errors else None,
        "worst": max(errors, key=errors.__getitem__) if errors else None,
        "calibrated": CALIBRATED,
    }


def engine_rows(
    options: PlanBenchOptions, form: str, directory: Path, probed: ProbedMachine, progress: Progress
) -> list[Row]:
    """The model in one process and with each expert in its own, at every concurrency, in turns."""
    quantize = None if form == "float" else form
    sections = {part: getattr(options.config, part).model_copy(update={"quantize": quantize}) for part in _HELD}
    report = run_engine(
        EngineBenchOptions(
            model=str(directory),
            config=options.config.model_copy(update=sections),
            carriers=("local", "socket"),
            concurrency=options.concurrency,
            prompt_tokens=options.prompt_tokens,
            output_tokens=options.output_tokens,
            repeats=options.repeats,
            budget_s=3600.0,
        ),
        progress,
    )
    model, dtype = ModelConfig.load(directory), str(report.facts["dtype"])
    held = HeldAs(dtype, quantize)
    weights = WeightsHeld(held, dict.fromkeys(range(model.num_local_experts), held))
    cost = ModelCost.of(model, dtype, weights, options.config.engine.kv_cache_dtype)
    rows: list[Row] = []
    for row in report.rows:
        count, rate = int(str(row["concurrency"])), row["decode_tokens_per_s"]
        if not isinstance(rate, float):
            raise ConfigError("--output-tokens: too few for decoding to be seen after the last prompt")
        in_process = row["carrier"] == "local"
        predicted = predicted_rate(cost, probed, in_process, count, options)
        name = f"{dtype if quantize is None else quantize}, {'one process' if in_process else 'spread over sockets'}"
        rows.append(compared(name, count, 1e3 * count / predicted, 1e3 * count / rate))
    return rows


_HELD: Final = ("experts", "trunk")


def predicted_rate(
    cost: ModelCost, probed: ProbedMachine, in_process: bool, count: int, options: PlanBenchOptions
) -> float:
    """Tokens/s from the last sequence's first token to the end, as `bench engine` counts them.

    Prompts are computed in chunks, a few sequences a step: those that began earlier end earlier by as many steps, and
    the last steps have fewer sequences.
    """
    machines, spread = placed_here(probed.rates, probed.memory_bytes, cost.num_experts, in_process)
    context = options.prompt_tokens + options.output_tokens / 2
    groups = -(-count * options.prompt_tokens // CHUNK)
    tokens = seconds = 0.0
    for step in range(options.output_tokens - 1):
        ended = max(0, groups - (options.output_tokens - 1 - step))
        running = round(count * (1 - ended / groups))
        if running:
            tokens += running
            seconds += _step_s(cost, machines, spread, running, context)
    return tokens / seconds


def _step_s(cost: ModelCost, machines: Machines, spread: Spread, count: int, context: float) -> float:
    return decode_step(cost, machines, spread, count, context).seconds
