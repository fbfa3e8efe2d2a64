"""`moe-ray bench kernels`: products of the native kernels, weights read from memory, by format and instruction set."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Final

import ml_dtypes
import numpy as np
import torch

from moe_ray.bench.any_order import TorchProduct, torch_products
from moe_ray.bench.probe import Probe
from moe_ray.bench.report import Plot, Report, Row, machine_facts
from moe_ray.config import load_config
from moe_ray.errors import ConfigError, KernelsUnavailable
from moe_ray.model.formats import FLOATS, GroupedCodes
from moe_ray.model.formats.held import GROUPINGS, grouping
from moe_ray.native.build import KERNELS, kernels_here
from moe_ray.native.codes import pack_codes, round_codes
from moe_ray.native.kernels import Kernels, Packed
from moe_ray.telemetry import cores

Progress = Callable[[str, int, int], None]

WIDE: Final = "int8-wide"
"""int8 with inputs of 16 bits on every CPU."""
PLOT: Final = Plot("rows", "gflop_per_s", "what", log_x=True, log_y=True)
ROTATION_BYTES: Final = 256 * 2**20
"""Of copies of each matrix that are multiplied in turn, so that no cache holds the next."""
LEAST_S: Final = 0.05
"""That one measurement takes."""
BARE_LOOPS: Final = 20
"""Of which the fastest counts."""


def milliseconds_of(run: Callable[[], None]) -> float:
    """Of one run, on average over those of `LEAST_S`."""
    done, started = 0, time.perf_counter()
    while not done or time.perf_counter() - started < LEAST_S:
        run()
        done += 1
    return 1000 * (time.perf_counter() - started) / done


@dataclass(frozen=True, slots=True)
class KernelOptions:
    """What is measured."""

    kernels: tuple[str, ...] = ()
    """Names of `KERNELS`. Default: this machine's best."""
    formats: tuple[str, ...] = ("bfloat16", "int8", WIDE, "int4", "nf4")
    rows: tuple[int, ...] = (1, 4, 16, 128)
    outputs: int = 7168
    inputs: int = 1024
    threads: int | None = None
    """Default: the cores of this process."""
    repeats: int = 5
    any_order: bool = False
    """Time torch's products as well, whose sums have no order of their own: what keeping one costs."""


@dataclass(frozen=True, slots=True)
class _Case:
    kernels: Kernels
    format: str
    copies: list[Packed]

    @property
    def name(self) -> str:
        return f"{self.kernels.name} {self.format}"

    @property
    def nbytes(self) -> int:
        return self.copies[0].nbytes

    def bare_gflop_per_s(self) -> float:
        """What these weights' best instruction reaches in a loop that fetches nothing."""
        run, pool, address = self.kernels.library.bare_loop, self.kernels.pool, self.copies[0].address
        best, times = 0.0, 100_000
        for _ in range(BARE_LOOPS):
            started = time.perf_counter()
            products = run(pool, address, times)
            best = max(best, 2 * products / (time.perf_counter() - started) / 1e9)
        return best

    def products_of(self, x: np.ndarray) -> Callable[[], None]:
        """What multiplies x [rows, K] float32, as bfloat16, by each copy."""
        product, pool, rows = self.kernels.library.linear_f32, self.kernels.pool, x.astype(ml_dtypes.bfloat16)
        out = np.empty((len(x), self.copies[0].shape.n), np.float32)

        def run() -> None:
            for packed in self.copies:
                product(pool, 2, rows.ctypes.data, len(x), packed.address, out.ctypes.data)

        return run


def run_kernels(options: KernelOptions, on_progress: Progress) -> Report:
    """Time each format on each instruction set, in turn. Raises `ConfigError` for what this machine cannot run."""
    threads = options.threads or cores()
    values = np.random.default_rng(1).standard_normal((options.outputs, options.inputs), dtype=np.float32) / 32
    cases = _cases(options, threads, values)
    free = torch_products(values, threads, ROTATION_BYTES) if options.any_order else []
    timed: list[_Case | TorchProduct] = [*cases, *free]
    probe = Probe(threads, (), torch.bfloat16)
    generator = np.random.default_rng(0)
    inputs = {rows: generator.standard_normal((rows, options.inputs), dtype=np.float32) for rows in options.rows}
    bare = {case.name: case.bare_gflop_per_s() for case in cases}
    times: dict[tuple[int, int], list[float]] = {}
    machine = probe.measure()
    for repeat in range(options.repeats):
        on_progress("products", repeat, options.repeats)
        for number, case in enumerate(timed):
            for rows, x in inputs.items():
                took = milliseconds_of(case.products_of(x)) / len(case.copies)
                times.setdefault((number, rows), []).append(took)
    on_progress("products", options.repeats, options.repeats)
    facts = {
        "outputs": options.outputs,
        "inputs": options.inputs,
        "threads": threads,
        "repeats": options.repeats,
        "read_gb_per_s": round(machine.read_gb_per_s, 1),
        **machine_facts(),
    }
    work = options.outputs * options.inputs
    return Report(
        "kernels",
        [
            _row(timed[number], rows, statistics.median(found), work, machine.read_gb_per_s, bare)
            for (number, rows), found in times.items()
        ],
        facts,
    )


def _row(
    case: _Case | TorchProduct,
    rows: int,
    milliseconds: float,
    weights: int,
    read_gb_per_s: float,
    bare: Mapping[str, float],
) -> Row:
    gflop_per_s = 2 * rows * weights / milliseconds / 1e6
    read = case.nbytes / milliseconds / 1e6
    return {
        "what": case.name,
        "rows": rows,
        "ms": round(milliseconds, 4),
        "gb_per_s": round(read, 1),
        "share_of_read": round(read / read_gb_per_s, 2),
        "gflop_per_s": round(gflop_per_s, 1),
        "share_of_bare_loop": round(gflop_per_s / bare[case.name], 2) if case.name in bare else None,
    }


def open_kernels(names: tuple[str, ...], threads: int) -> list[Kernels]:
    """The kernels of these names; without a name, this machine's best. Raises `ConfigError` for what it cannot run."""
    best = kernels_here()
    names = names or ((best,) if best else ())
    if not names:
        raise ConfigError("there are no native kernels for this machine")
    opened = []
    for name in names:
        if name not in KERNELS:
            raise ConfigError(f"--kernels: {name!r} is none of {', '.join(KERNELS)}")
        try:
            opened.append(Kernels(load_config().cache_dir, threads, name))
        except KernelsUnavailable as error:
            raise ConfigError(f"--kernels {name}: {error}") from None
    return opened


def _cases(options: KernelOptions, threads: int, values: np.ndarray) -> list[_Case]:
    known = (*FLOATS, *GROUPINGS, WIDE)
    for name in options.formats:
        if name not in known:
            raise ConfigError(f"--formats: {name!r} is none of {', '.join(known)}")
    if options.inputs % 128:
        raise ConfigError(f"--inputs: must be a multiple of 128, got {options.inputs}")
    opened = open_kernels(options.kernels, threads)
    cases = []
    for kernels, form in product(opened, options.formats):
        packed = _packed(kernels, form, values)
        copies = [packed]
        while sum(copy.nbytes for copy in copies) < ROTATION_BYTES:
            copies.append(kernels.blank(packed.shape))
            copies[-1].memory[:] = packed.memory[:]
        cases.append(_Case(kernels, form, copies))
    return cases


def _packed(kernels: Kernels, form: str, values: np.ndarray) -> Packed:
    how = grouping("int8" if form == WIDE else form, values.shape[1])
    if how is None:
        return kernels.pack_floats(form, values.astype(np.dtype(form)))
    codes = GroupedCodes(how, *round_codes(kernels, values, how))
    return pack_codes(kernels, codes, wide_inputs=form == WIDE)
