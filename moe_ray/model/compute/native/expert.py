"""An expert by the native kernels. Nothing here imports torch, unless a call comes as tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_ray.native.host import HostEntry
from moe_ray.native.kernels import Kernels, Packed

if TYPE_CHECKING:
    import torch

    from moe_ray.core import AdapterRows


class NativeFFN:
    """`base.FFN` by the native kernels: sums in float32, a row's result independent of its neighbours."""

    def __init__(self, w13: Packed, w2: Packed, kernels: Kernels, dtype: str) -> None:
        """w13: gate and up [I, D] in one block; w2 [D, I]; D and I multiples of 32. `dtype`: of rows."""
        self.w13, self.w2, self.kernels, self.dtype = w13, w2, kernels, dtype
        self.nbytes = w13.nbytes + w2.nbytes

    def forward(
        self, rows: torch.Tensor, weights: torch.Tensor, adapters: tuple[AdapterRows, ...] = ()
    ) -> torch.Tensor:
        return self.kernels.expert_ffn(rows.contiguous(), weights.contiguous(), self.w13, self.w2)

    def buffers(self) -> list[memoryview]:
        return [memoryview(self.w13.memory), memoryview(self.w2.memory)]

    def entry(self) -> HostEntry:
        """The kernel's own function over the packed weights."""
        return self.kernels.expert_entry(self.w13, self.w2, self.dtype)
