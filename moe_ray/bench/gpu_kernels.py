"""The kernel table of `bench gpu`: one expert's layer by rows and format, as a share of what the card reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from moe_ray.bench.card import card_of_this_process, device_read_gb_s, median_s
from moe_ray.bench.report import Row
from moe_ray.errors import ConfigError
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute, open_compute
from moe_ray.model.compute.resolve import Wanted
from moe_ray.model.expert_reader import ExpertReader

if TYPE_CHECKING:
    from moe_ray.model.compute.base import FFN

CALLS: Final = {"cuda": 50, "cpu": 1}
"""Queued before the device is waited for, so that it is not the interpreter that is timed."""


@dataclass(frozen=True, slots=True)
class KernelTable:
    """What is timed on which device."""

    device: str
    kernels: str
    rows: tuple[int, ...]
    cache_dir: Path

    def measured(self, directories: dict[str, Path]) -> tuple[list[Row], dict[str, object]]:
        """A row for each format of `directories` and number of rows, and what the device is.

        Where weights are floats, torch's own products (cuBLAS on a card) are timed beside ours. Raises `ConfigError`.
        """
        found, read_gb_s, facts = list[Row](), None, dict[str, object]()
        for weights, directory in directories.items():
            choices = (self.kernels, "torch") if weights in ("bfloat16", "float16") else (self.kernels,)
            for kernels in choices:
                checkpoint = Checkpoint.open(directory)
                compute = self._compute(checkpoint, kernels)
                if read_gb_s is None:
                    read_gb_s = device_read_gb_s(compute.torch_device)
                    facts = card_of_this_process(compute.torch_device)
                found += self._timed(checkpoint, compute, weights, read_gb_s)
                checkpoint.close()
        return found, {**facts, "read_gb_per_s": None if read_gb_s is None else round(read_gb_s, 1)}

    def _compute(self, checkpoint: Checkpoint, kernels: str) -> Compute:
        compute = open_compute(checkpoint.config, Wanted(device=self.device, kernels=kernels), self.cache_dir)
        if compute.device != self.device:
            raise ConfigError(f"`bench gpu` asked for {self.device}, and this process computes on {compute.device}")
        return compute

    def _timed(self, checkpoint: Checkpoint, compute: Compute, weights: str, read_gb_s: float) -> Iterator[Row]:
        """All experts of one layer take turns, so that no cache holds the weights of the next."""
        config = checkpoint.config
        reader = ExpertReader(checkpoint, ((0, expert) for expert in range(config.num_local_experts)), compute)
        ffns = [reader.read(key) for key in reader.keys]
        device, dtype = compute.torch_device, compute.torch_dtype
        for count in self.rows:
            rows = torch.randn(count, config.hidden_size, device=device).to(dtype)
            shares = torch.full((count,), 0.5, device=device)
            seconds = median_s(_in_turn(ffns, rows, shares), device, CALLS[device.type])
            gb_s = ffns[0].nbytes / seconds / 1e9
            yield {
                "weights": weights,
                "by": compute.backend.experts,
                "rows": count,
                "us": round(1e6 * seconds, 1),
                "weight_mib": round(ffns[0].nbytes / 2**20, 1),
                "gb_per_s": round(gb_s, 1),
                "share_of_read": round(gb_s / read_gb_s, 3),
            }


class _in_turn:
    """Calls one expert after the other."""

    def __init__(self, ffns: list[FFN], rows: torch.Tensor, shares: torch.Tensor) -> None:
        self._ffns, self._rows, self._shares, self._next = ffns, rows, shares, 0

    def __call__(self) -> torch.Tensor:
        self._next = (self._next + 1) % len(self._ffns)
        return self._ffns[self._next].forward(self._rows, self._shares)
