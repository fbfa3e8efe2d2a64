"""A process's device, on which one call computes at a time, whichever carrier brought it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from moe_ray.core import AdapterRows
from moe_ray.model.compute.base import FFN
from moe_ray.model.compute.compute import Compute

if TYPE_CHECKING:
    import torch

    from moe_ray.model.compute.torch.device_calls import DeviceCalls


class DeviceTurns:
    """`DeviceCalls` for many threads. torch is loaded by the first call: native kernels never need it."""

    def __init__(self, compute: Compute, hidden_size: int) -> None:
        self._compute, self._hidden_size = compute, hidden_size
        self.turn = threading.Lock()
        """Held while one computes."""
        self._calls: DeviceCalls | None = None

    def forward(
        self, ffn: FFN, rows: torch.Tensor, weights: torch.Tensor, adapters: tuple[AdapterRows, ...]
    ) -> torch.Tensor:
        """`DeviceCalls.forward`."""
        with self.turn:
            return self._opened().forward(ffn, rows, weights, adapters)

    def fill(
        self,
        ffn: FFN,
        rows: torch.Tensor,
        weights: torch.Tensor,
        adapters: tuple[AdapterRows, ...],
        out: torch.Tensor,
    ) -> None:
        """`DeviceCalls.fill`."""
        with self.turn:
            self._opened().fill(ffn, rows, weights, adapters, out)

    def _opened(self) -> DeviceCalls:
        from moe_ray.model.compute.torch.device_calls import DeviceCalls

        self._calls = self._calls or DeviceCalls(self._compute, self._hidden_size)
        return self._calls
