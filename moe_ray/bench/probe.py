"""What this machine's memory and arithmetic give at best, measured with torch in this process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moe_ray.engine.torch_threads import torch_threads

PROBE_BYTES = 2**30
"""Much more than any cache, so that a sweep finds nothing of the one before."""
SWEEPS = 5
LARGE_MATMUL = (2048, 4096, 4096)

Shape = tuple[int, int, int]
"""Rows, inputs, outputs of a matrix product."""


@dataclass(frozen=True, slots=True)
class MachineSpeed:
    """What was measured of a machine."""

    read_gb_per_s: float
    gflop_per_s: float


def middle(machines: Sequence[MachineSpeed]) -> MachineSpeed:
    """The median of several measurements."""
    return MachineSpeed(
        statistics.median(each.read_gb_per_s for each in machines),
        statistics.median(each.gflop_per_s for each in machines),
    )


class Probe:
    """Holds a large buffer and the matrices of `shapes`, so that a measurement takes about a second."""

    def __init__(self, threads: int, shapes: Sequence[Shape], dtype: torch.dtype) -> None:
        self._threads = sorted({1, threads})
        # numpy asks for huge pages, torch does not: page walks would count as memory.
        self._buffer = torch.from_numpy(np.ones(PROBE_BYTES // 4, dtype=np.float32))
        self._pairs = [
            (torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype))
            for rows, inputs, outputs in (LARGE_MATMUL, *shapes)
        ]

    def measure(self) -> MachineSpeed:
        """The better of one thread and all of them, the best of the products; each the median of a few runs."""
        read, products = [], []
        for threads in self._threads:
            with torch_threads(threads), torch.inference_mode():
                read.append(PROBE_BYTES / _median_s(self._buffer.sum))
                products += [_flop_per_s(left, right) for left, right in self._pairs if threads == self._threads[-1]]
        return MachineSpeed(max(read) / 1e9, max(products) / 1e9)


def _flop_per_s(left: torch.Tensor, right: torch.Tensor) -> float:
    """Of left [M, K] times right [N, K] transposed, as a linear layer computes it."""
    operations = 2 * left.shape[0] * left.shape[1] * right.shape[0]
    return operations / _median_s(lambda: torch.nn.functional.linear(left, right))


def _median_s(run: Callable[[], object]) -> float:
    run()
    seconds = []
    for _ in range(SWEEPS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
