"""The kernel table of `bench gpu`: one expert's layer by rows and format, as a share of what the card reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import torch

from moe_ray.bench.card import card_of_this_process, device_read_gb_s, median_s
from moe_ray.bench.gpu_libraries import LIBRARIES, LibraryExpert, LibraryLacks, ProductLibrary
from moe_ray.bench.report import Row
from moe_ray.core import ExpertKey
from moe_ray.errors import ConfigError
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute, open_compute
from moe_ray.model.compute.resolve import Wanted
from moe_ray.model.expert_reader import ExpertReader

CALLS: Final = {"cuda": 50, "cpu": 1}
"""Queued before the device is waited for, so that it is not the interpreter that is timed."""
DIFFERENT: Final = 0.05
"""Of the largest output: what a library's may be off by, for it rounds rows and scales to bfloat16."""


class Timed(Protocol):
    """An expert, ours or a library's."""

    nbytes: int

    def forward(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class KernelTable:
    """What is timed on which device."""

    device: str
    kernels: str
    rows: tuple[int, ...]
    cache_dir: Path

    def measured(self, directories: dict[str, Path]) -> tuple[list[Row], dict[str, object]]:
        """A row for each format of `directories` and number of rows, and what the device is.

        Where weights are floats, torch's own products (cuBLAS on a card) are timed beside ours, where they have 4 bits
        those of `LIBRARIES`; `facts` says which of these are left out, and why. Raises `ConfigError`.
        """
        found, read_gb_s, facts, absent = list[Row](), None, dict[str, object](), list[str]()
        for weights, directory in directories.items():
            choices = (self.kernels, "torch") if weights in ("bfloat16", "float16") else (self.kernels,)
            for kernels in choices:
                checkpoint = Checkpoint.open(directory)
                compute = self._compute(checkpoint, kernels)
                if read_gb_s is None:
                    read_gb_s = device_read_gb_s(compute.torch_device)
                    facts = card_of_this_process(compute.torch_device)
                found += self._ours(checkpoint, compute, weights, read_gb_s, absent)
                checkpoint.close()
        if absent:
            facts["left_out"] = "; ".join(absent)
        return found, {**facts, "read_gb_per_s": None if read_gb_s is None else round(read_gb_s, 1)}

    def _compute(self, checkpoint: Checkpoint, kernels: str) -> Compute:
        compute = open_compute(checkpoint.config, Wanted(device=self.device, kernels=kernels), self.cache_dir)
        if compute.device != self.device:
            raise ConfigError(f"`bench gpu` asked for {self.device}, and this process computes on {compute.device}")
        return compute

    def _ours(
        self, checkpoint: Checkpoint, compute: Compute, weights: str, read_gb_s: float, absent: list[str]
    ) -> list[Row]:
        """Our rows, and those of libraries; which of these there are not is added to `absent`."""
        if not self.rows:
            return []
        reader = ExpertReader(
            checkpoint, ((0, expert) for expert in range(checkpoint.config.num_local_experts)), compute
        )
        ours = [reader.read(key) for key in reader.keys]
        found = list(self._timed(ours, checkpoint, compute, weights, compute.backend.experts, read_gb_s))
        for library in LIBRARIES if weights == "int4" else ():
            try:
                found += self._beside(library, ours[0], reader.keys, checkpoint, compute, weights, read_gb_s)
            except LibraryLacks as lacks:
                absent.append(str(lacks))
        return found

    def _beside(
        self,
        library: ProductLibrary,
        ours: Timed,
        keys: Sequence[ExpertKey],
        checkpoint: Checkpoint,
        compute: Compute,
        weights: str,
        read_gb_s: float,
    ) -> list[Row]:
        """A library's rows. Raises `LibraryLacks`, as well where its outputs are not what ours are."""
        theirs = [LibraryExpert(library, checkpoint, key, compute.torch_device) for key in keys]
        for count in self.rows:
            rows, shares = _drawn(count, checkpoint, compute)
            wanted = ours.forward(rows, shares).float()
            error = float((theirs[0].forward(rows, shares).float() - wanted).abs().max() / wanted.abs().max())
            if not error < DIFFERENT:
                raise LibraryLacks(f"{library.name}: its outputs for {count} rows are {error:.3f} off ours")
        return list(self._timed(theirs, checkpoint, compute, weights, library.name, read_gb_s))

    def _timed(
        self,
        ffns: Sequence[Timed],
        checkpoint: Checkpoint,
        compute: Compute,
        weights: str,
        by: str,
        read_gb_s: float,
    ) -> Iterator[Row]:
        """All experts of one layer take turns, so that no cache holds the weights of the next."""
        device = compute.torch_device
        for count in self.rows:
            rows, shares = _drawn(count, checkpoint, compute)
            seconds = median_s(_in_turn(ffns, rows, shares), device, CALLS[device.type])
            gb_s = ffns[0].nbytes / seconds / 1e9
            yield {
                "weights": weights,
                "by": by,
                "rows": count,
                "us": round(1e6 * seconds, 1),
                "weight_mib": round(ffns[0].nbytes / 2**20, 1),
                "gb_per_s": round(gb_s, 1),
                "share_of_read": round(gb_s / read_gb_s, 3),
            }


def _drawn(count: int, checkpoint: Checkpoint, compute: Compute) -> tuple[torch.Tensor, torch.Tensor]:
    """Random rows [T, D], and their weights [T]."""
    device = compute.torch_device
    rows = torch.randn(count, checkpoint.config.hidden_size, device=device).to(compute.torch_dtype)
    return rows, torch.full((count,), 0.5, device=device)


class _in_turn:
    """Calls one expert after the other."""

    def __init__(self, ffns: Sequence[Timed], rows: torch.Tensor, shares: torch.Tensor) -> None:
        self._ffns, self._rows, self._shares, self._next = ffns, rows, shares, 0

    def __call__(self) -> torch.Tensor:
        self._next = (self._next + 1) % len(self._ffns)
        return self._ffns[self._next].forward(self._rows, self._shares)
