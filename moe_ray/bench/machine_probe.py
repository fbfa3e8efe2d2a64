"""What `moe-ray plan --fleet here` goes by: this CPU's kernels and this software's overhead, measured once and kept.

Kernels are timed on one shape; the software on two small random models, without what their products take. No model or
placement that is predicted is measured here.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
import psutil

from moe_ray.bench.attention import AttentionOptions, attention_ms
from moe_ray.bench.kernels import ROTATION_BYTES, open_kernels
from moe_ray.bench.report import machine_facts
from moe_ray.bench.software_probe import measure_software
from moe_ray.console import Report as Progress
from moe_ray.errors import ConfigError
from moe_ray.experts.planning.rates import Curve, Measured, Overhead
from moe_ray.model.formats import GroupedCodes
from moe_ray.model.formats.held import GROUPINGS, grouping
from moe_ray.native.codes import pack_codes, round_codes
from moe_ray.native.kernels import Kernels, Packed
from moe_ray.telemetry import cores

VERSION: Final = 2
"""Raise it when what is measured changes; kept results of other versions are measured anew."""
HIDDEN, INNER = 2048, 1792
"""Of the expert that is timed: 11 M weights, as many as one expert of a layer of M1, in another shape."""
ROWS: Final = (1, 2, 4, 8, 16, 32, 128)
FORMS: Final = ("bfloat16", *GROUPINGS)
HEAD_DIMS: Final = (64, 128)
CONTEXTS: Final = (128, 1024)
REPEATS: Final = 3
LEAST_S: Final = 0.04
"""That one measurement takes."""


@dataclass(frozen=True, slots=True)
class ProbedMachine:
    """What was measured, and of which machine."""

    rates: Measured
    memory_bytes: int
    facts: dict[str, object]


def probed_machine(cache_dir: Path, progress: Progress, again: bool = False) -> ProbedMachine:
    """This machine's rates, as kept in `cache_dir`, or measured now (about two minutes) and kept there.

    `again`: measure, whatever is kept. Raises `ConfigError` where there are no native kernels for this machine.
    """
    facts = machine_facts()
    path = cache_dir.expanduser() / "machine-probe.json"
    key = [VERSION, facts["cpu"], facts["cores"], facts["moe_ray"]]
    if not again:
        kept = _kept(path)
        if kept is not None and kept.get("key") == key:
            return probe_from_json(kept)
    measured = {"key": key, "facts": facts, **_measure(cache_dir, progress)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    return probe_from_json(measured)


def probe_from_json(kept: dict[str, Any]) -> ProbedMachine:
    """What `probed_machine` keeps, as the cost model takes it."""

    local, spread, step = (Overhead(**kept["software"][name]) for name in ("local", "spread", "step"))
    rates = replace(_products(kept, kept["facts"]["cores"]), local=local, spread=spread, step=step)
    return ProbedMachine(rates, psutil.virtual_memory().total, kept["facts"])


def _products(kernels: dict[str, Any], threads: int) -> Measured:
    """What the kernels take, without any overhead."""

    def curve(ns: Sequence[float]) -> Curve:
        return Curve(tuple(map(float, kernels["rows"])), tuple(ns))

    return Measured(
        cores=threads,
        experts={
            form: (curve(modes["alone"]), curve(modes["crowded"]), curve(modes["pooled"]))
            for form, modes in kernels["experts"].items()
        },
        trunk={form: curve(ns) for form, ns in kernels["trunk"].items()},
        attention_ns={int(dim): ns for dim, ns in kernels["attention_ns"].items()},
        local=Overhead(),
        spread=Overhead(),
        step=Overhead(),
    )


def _kept(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _measure(cache_dir: Path, progress: Progress) -> dict[str, Any]:
    threads = cores()
    pooled, *single = [open_kernels((), threads)[0], *(open_kernels((), 1)[0] for _ in range(threads))]
    experts: dict[str, dict[str, list[float]]] = {}
    trunk: dict[str, list[float]] = {}
    for done, form in enumerate(FORMS):
        progress("kernels", done, len(FORMS))
        experts[form] = _expert_curves(form, pooled, single)
        trunk[form] = _trunk_curve(form, pooled)
    progress("kernels", len(FORMS), len(FORMS))
    attention = {dim: _attention_ns(dim, threads) for dim in HEAD_DIMS}
    if not any(attention.values()):
        raise ConfigError("the native kernels have no attention for this machine")
    kernels = {"rows": list(ROWS), "experts": experts, "trunk": trunk, "attention_ns": attention}
    return {**kernels, "software": measure_software(cache_dir, _products(kernels, threads), progress)}


class _TimedExpert:
    """Copies of one expert in a form, multiplied in turn, so that no cache holds the next."""

    def __init__(self, form: str, kernels: Kernels) -> None:
        self.kernels = kernels
        generator = np.random.default_rng(0)
        w13 = [generator.standard_normal((INNER, HIDDEN), dtype=np.float32) / 45 for _ in range(2)]
        w2 = generator.standard_normal((HIDDEN, INNER), dtype=np.float32) / 45
        first = packed(kernels, form, w13, False), packed(kernels, form, [w2], True)
        self.copies = [first]
        while sum(a.nbytes + b.nbytes for a, b in self.copies) < ROTATION_BYTES:
            pair = kernels.blank(first[0].shape), kernels.blank(first[1].shape)
            for mine, theirs in zip(pair, first, strict=True):
                mine.memory[:] = theirs.memory[:]
            self.copies.append(pair)

    def seconds(self, rows: int, kernels: Kernels) -> float:
        """Of one call with so many rows."""
        x = np.ones((rows, HIDDEN), ml_dtypes.bfloat16)
        weights, out = np.ones(rows, np.float32), np.empty((rows, HIDDEN), ml_dtypes.bfloat16)
        done, started = 0, time.perf_counter()
        while not done or time.perf_counter() - started < LEAST_S:
            for w13, w2 in self.copies[: max(1, 256 // rows)]:
                kernels.library.expert_ffn(
                    *(kernels.pool, 2, x.ctypes.data, weights.ctypes.data, rows),
                    *(w13.address, w2.address, out.ctypes.data, None, 0, None),
                )
                done += 1
        return (time.perf_counter() - started) / done


def packed(kernels: Kernels, form: str, matrices: Sequence[np.ndarray], wide: bool) -> Packed:
    """Matrices [N, K] of float32 in one block, held in `form` as an expert or a trunk holds them."""
    how = grouping(form, matrices[0].shape[1])
    if how is None:
        return kernels.pack_floats(form, *(matrix.astype(np.dtype(form)) for matrix in matrices))
    codes = [GroupedCodes(how, *round_codes(kernels, matrix, how)) for matrix in matrices]
    return pack_codes(kernels, *codes, wide_inputs=wide)


def _expert_curves(form: str, pooled: Kernels, single: Sequence[Kernels]) -> dict[str, list[float]]:
    """Nanoseconds a weight at `ROWS`: alone on a core, on all cores at once, by all cores together; in turns."""
    weights = 3 * HIDDEN * INNER
    experts = [_TimedExpert(form, kernels) for kernels in single]
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(REPEATS):
        for rows in ROWS:
            found.setdefault(("alone", rows), []).append(experts[0].seconds(rows, single[0]))
            found.setdefault(("crowded", rows), []).append(_at_once(experts, single, rows))
            found.setdefault(("pooled", rows), []).append(experts[0].seconds(rows, pooled))
    return {
        mode: [1e9 * statistics.median(found[mode, rows]) / weights for rows in ROWS]
        for mode in ("alone", "crowded", "pooled")
    }


def _at_once(experts: Sequence[_TimedExpert], kernels: Sequence[Kernels], rows: int) -> float:
    """Seconds of a call while as many run as there are cores, each on weights of its own."""
    seconds = [0.0] * len(experts)
    barrier = threading.Barrier(len(experts))

    def run(index: int) -> None:
        barrier.wait()
        seconds[index] = experts[index].seconds(rows, kernels[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(experts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statistics.mean(seconds)


def _trunk_curve(form: str, kernels: Kernels) -> list[float]:
    """Nanoseconds a weight at `ROWS` of one matrix as a trunk holds it: its 8-bit codes have inputs of 16 bits."""
    outputs = 3 * INNER
    values = np.random.default_rng(1).standard_normal((outputs, HIDDEN), dtype=np.float32) / 45
    copies = [packed(kernels, form, [values], True)]
    while sum(each.nbytes for each in copies) < ROTATION_BYTES:
        copies.append(kernels.blank(copies[0].shape))
        copies[-1].memory[:] = copies[0].memory[:]

    def seconds(rows: int) -> float:
        x, out = np.ones((rows, HIDDEN), ml_dtypes.bfloat16), np.empty((rows, outputs), np.float32)

        def each() -> None:
            for one in copies[: max(1, 256 // rows)]:
                kernels.library.linear_f32(kernels.pool, 2, x.ctypes.data, rows, one.address, out.ctypes.data)

        return _mean_s(each) / len(copies[: max(1, 256 // rows)])

    times = [[seconds(rows) for rows in ROWS] for _ in range(REPEATS)]
    return [1e9 * statistics.median(each) / (outputs * HIDDEN) for each in zip(*times, strict=True)]


def _attention_ns(head_dim: int, threads: int) -> float:
    """Nanoseconds for each pair of tokens and number of a query's heads: the slope between two contexts."""
    options = AttentionOptions(sequences=8, head_dim=head_dim, threads=threads)
    kernels = open_kernels((), threads)[0]
    near, far = (attention_ms(kernels, "bfloat16", context, options) for context in CONTEXTS)
    pairs = options.sequences * (CONTEXTS[1] - CONTEXTS[0])
    return max(0.0, 1e6 * (far - near) / (pairs * options.heads * head_dim))


def _mean_s(run: Callable[[], None]) -> float:
    done, started = 0, time.perf_counter()
    while not done or time.perf_counter() - started < LEAST_S:
        run()
        done += 1
    return (time.perf_counter() - started) / done
