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

    def __init__(self, compute: Compute, hidden_size: int, waits: bool = True) -> None:
        """`waits`: also for results that stay on the card, so that what a call took is known when it returns."""
        self._compute, self._hidden_size, self._waits = compute, hidden_size, waits
        self.turn = threading.Lock()
        """Held while one computes."""
        self._calls: DeviceCalls | None = None

    def forward(
        self, ffn: FFN, rows: torch.Tensor, weights: torch.Tensor, adapters: tuple[AdapterRows, ...]
    ) -> torch.Tensor:
        """`DeviceCalls.forward`."""
        with self.turn:
            computed = self._opened().forward(ffn, rows, weights, adapters)
            if self._waits and self._compute.staging is not None and computed.device.type != "cpu":
                self._compute.staging.drain()
            return computed

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
